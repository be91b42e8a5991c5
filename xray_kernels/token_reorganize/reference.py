"""What token reorganisation means, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _order(scores: Tensor) -> Tensor:
    """Token indices by descending score: NaN ranks highest, and of equal scores the lower index comes first."""
    return scores.sort(dim=1, descending=True, stable=True).indices


def _rows(tokens: Tensor, indices: Tensor) -> Tensor:
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[2]))


def reorganize_tokens(
    tokens: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    """[prefix, the num_keep highest scores in descending order, sum of score * token over the rest]; kept indices."""
    order = _order(scores)
    indices, dropped = order[:, :num_keep].contiguous(), order[:, num_keep:]
    parts = [tokens[:, :num_prefix_tokens], _rows(tokens, indices + num_prefix_tokens)]
    if fuse:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        weight = scores.gather(1, dropped).to(wide)[:, None]
        parts.append((weight @ _rows(tokens, dropped + num_prefix_tokens).to(wide)).to(tokens.dtype))
    return torch.cat(parts, 1), indices


def reorganize_tokens_backward(
    grad: Tensor, tokens: Tensor, scores: Tensor, indices: Tensor, num_prefix_tokens: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    """Kept and prefix rows copy their gradient; dropped row j gets score_j * dFused, its score <dFused, token_j>."""
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices, True)
    grad_tokens = torch.zeros_like(tokens, memory_format=torch.contiguous_format)
    grad_scores = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    if fuse:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        grad_fused = grad[:, -1:].to(wide)
        weight = scores.to(wide).masked_fill(kept, 0.0)[..., None]
        grad_tokens[:, num_prefix_tokens:] = torch.where(kept[..., None], 0.0, weight * grad_fused).to(grad.dtype)
        products = tokens[:, num_prefix_tokens:].to(wide) @ grad_fused.transpose(1, 2)
        grad_scores.copy_(products.squeeze(2).masked_fill(kept, 0.0))
    grad_tokens[:, :num_prefix_tokens] = grad[:, :num_prefix_tokens]
    where = (indices + num_prefix_tokens)[..., None].expand(-1, -1, tokens.shape[2])
    last = num_prefix_tokens + indices.shape[1]
    return grad_tokens.scatter(1, where, grad[:, num_prefix_tokens:last]), grad_scores


def add_reorganize_norm(
    residual: Tensor,
    update: Tensor,
    scores: Tensor,
    num_keep: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    num_prefix_tokens: int,
    fuse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reorganise residual + update; return the new stream, its LayerNorm and the kept indices."""
    stream, indices = reorganize_tokens(residual + update, scores, num_keep, num_prefix_tokens, fuse)
    return stream, F.layer_norm(stream, stream.shape[-1:], weight, bias, eps), indices


def add_reorganize_norm_backward(
    grad_stream: Tensor,
    grad_normed: Tensor,
    residual: Tensor,
    update: Tensor,
    scores: Tensor,
    indices: Tensor,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    num_prefix_tokens: int,
    fuse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual (which are update's too), scores, weight and bias: LayerNorm's, then reorganisation's."""
    wide = torch.promote_types(stream.dtype, torch.float32)
    apart = stream.to(wide) - stream.to(wide).mean(-1, keepdim=True)
    inverse = (apart.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit = apart * inverse
    grad_normed = grad_normed.to(wide)
    grad_unit = grad_normed * weight.to(wide)
    along = (grad_unit * unit).mean(-1, keepdim=True)
    grad = grad_stream.to(wide) + inverse * (grad_unit - grad_unit.mean(-1, keepdim=True) - unit * along)
    grad_tokens, grad_scores = reorganize_tokens_backward(
        grad.to(stream.dtype), residual + update, scores, indices, num_prefix_tokens, fuse
    )
    grad_weight = (grad_normed * unit).sum((0, 1)).to(weight.dtype)
    return grad_tokens, grad_scores, grad_weight, grad_normed.sum((0, 1)).to(bias.dtype)
