"""What attention means, in plain PyTorch: it materialises the (B, H, Nq, Nk) probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def _probabilities(
    query: Tensor, key: Tensor, scale: float, is_causal: bool, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax rows (B, H, Nq, Nk) and their log-sum-exp (B, H, Nq), in float32 or wider; rows without a key are 0."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = (query.to(wide) @ key.to(wide).transpose(-2, -1)).mul_(scale)
    position = torch.arange(key.shape[2], device=key.device)
    if is_causal:
        row = torch.arange(query.shape[2], device=key.device)
        logits.masked_fill_(position > row[:, None], float("-inf"))
    if key_lengths is not None:
        logits.masked_fill_(position >= key_lengths[:, None, None, None], float("-inf"))
    p = logits.softmax(-1)
    lse = logits.amax(-1) - p.amax(-1).log()  # at the largest logit z: p = exp(z - lse)
    if key_lengths is None:
        return p, lse
    empty = (key_lengths <= 0)[:, None, None].expand_as(lse)
    return p.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, float("-inf"))


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale Q K^T) V, stored so that (B, Nq, H * D) is a free view; and the log-sum-exp of each row."""
    p, lse = _probabilities(query, key, scale, is_causal, key_lengths)
    out = (p @ value.to(p.dtype)).to(value.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_with_scores(
    query: Tensor, key: Tensor, value: Tensor, scale: float, num_prefix_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention`, and query 0's probabilities averaged over heads: EViT's attentiveness (B, N - P), float32."""
    p, lse = _probabilities(query, key, scale, False, None)
    out = (p @ value.to(p.dtype)).to(value.dtype)
    scores = p[:, :, 0, num_prefix_tokens:].mean(1)
    return out.transpose(1, 2).contiguous().transpose(1, 2), scores, lse


def attention_backward(
    grad_out: Tensor,
    grad_scores: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    scale: float,
    is_causal: bool,
    key_lengths: Tensor | None,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key, value. The scores add g / H to the probabilities' gradient in query 0's row."""
    p, _ = _probabilities(query, key, scale, is_causal, key_lengths)
    wide = p.dtype
    grad_out = grad_out.to(wide)
    grad_p = grad_out @ value.to(wide).transpose(-2, -1)
    if grad_scores is not None:
        grad_p[:, :, 0, num_prefix_tokens:] += grad_scores.to(wide)[:, None] / query.shape[1]
    grad_logits = torch._softmax_backward_data(grad_p, p, -1, wide)
    grad_query = scale * grad_logits @ key.to(wide)
    grad_key = scale * grad_logits.transpose(-2, -1) @ query.to(wide)
    grad_value = p.transpose(-2, -1) @ grad_out
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
