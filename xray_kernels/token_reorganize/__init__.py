"""EViT token reorganisation: keep the tokens the class token attends to, fuse the others into one.

    result = [prefix tokens, the num_keep highest-scoring tokens, sum over the others of score * token]

`add_reorganize_norm` is the same at the block's natural seam: residual add before it, LayerNorm after it.
Source: EViT (Liang et al., ICLR 2022), section 3.2; the fusion weights are the raw scores, as in the official code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xray_kernels import _checks, _library
from xray_kernels.token_reorganize import reference


def _fake_reorganize(
    tokens: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    batch, _, channels = tokens.shape
    out = tokens.new_empty(batch, num_prefix_tokens + num_keep + int(fuse), channels)
    return out, scores.new_empty(batch, num_keep, dtype=torch.int64)


def _fake_reorganize_backward(
    grad: Tensor, tokens: Tensor, scores: Tensor, indices: Tensor, num_prefix_tokens: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), scores.new_empty(scores.shape)


def _fake_add_reorganize_norm(
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
    stream, indices = _fake_reorganize(residual, scores, num_keep, num_prefix_tokens, fuse)
    return stream, stream.new_empty(stream.shape), indices


def _fake_add_reorganize_norm_backward(
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
    return (
        residual.new_empty(residual.shape),
        scores.new_empty(scores.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


def _setup_reorganize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, scores, _, ctx.num_prefix_tokens, ctx.fuse = inputs
    ctx.save_for_backward(tokens, scores, output[1])


def _backward_reorganize(ctx: Any, grad: Tensor, grad_indices: None) -> tuple[Any, ...]:
    tokens, scores, indices = ctx.saved_tensors
    grads = _reorganize_backward(grad, tokens, scores, indices, ctx.num_prefix_tokens, ctx.fuse)
    return *grads, None, None, None


def _setup_add_reorganize_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    residual, update, scores, _, weight, bias, ctx.eps, ctx.num_prefix_tokens, ctx.fuse = inputs
    ctx.save_for_backward(residual, update, scores, output[2], output[0], weight, bias)


def _backward_add_reorganize_norm(
    ctx: Any, grad_stream: Tensor, grad_normed: Tensor, grad_indices: None
) -> tuple[Any, ...]:
    grad_tokens, grad_scores, grad_weight, grad_bias = _add_reorganize_norm_backward(
        grad_stream, grad_normed, *ctx.saved_tensors, ctx.eps, ctx.num_prefix_tokens, ctx.fuse
    )
    return grad_tokens, grad_tokens, grad_scores, None, grad_weight, grad_bias, None, None, None


_TRITON = "xray_kernels.token_reorganize.triton"

_reorganize_backward = _library.define(
    "reorganize_tokens_backward(Tensor grad, Tensor tokens, Tensor scores, Tensor indices,"
    " SymInt num_prefix_tokens, bool fuse) -> (Tensor, Tensor)",
    reference=reference.reorganize_tokens_backward,
    triton=_TRITON,
    fake=_fake_reorganize_backward,
)
_reorganize = _library.define(
    "reorganize_tokens(Tensor tokens, Tensor scores, SymInt num_keep, SymInt num_prefix_tokens, bool fuse)"
    " -> (Tensor, Tensor)",
    reference=reference.reorganize_tokens,
    triton=_TRITON,
    fake=_fake_reorganize,
    backward=_backward_reorganize,
    setup_context=_setup_reorganize,
)
_add_reorganize_norm_backward = _library.define(
    "add_reorganize_norm_backward(Tensor grad_stream, Tensor grad_normed, Tensor residual, Tensor update,"
    " Tensor scores, Tensor indices, Tensor stream, Tensor weight, Tensor bias, float eps,"
    " SymInt num_prefix_tokens, bool fuse) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.add_reorganize_norm_backward,
    triton=_TRITON,
    fake=_fake_add_reorganize_norm_backward,
)
_add_reorganize_norm = _library.define(
    "add_reorganize_norm(Tensor residual, Tensor update, Tensor scores, SymInt num_keep, Tensor weight, Tensor bias,"
    " float eps, SymInt num_prefix_tokens, bool fuse) -> (Tensor, Tensor, Tensor)",
    reference=reference.add_reorganize_norm,
    triton=_TRITON,
    fake=_fake_add_reorganize_norm,
    backward=_backward_add_reorganize_norm,
    setup_context=_setup_add_reorganize_norm,
)


def reorganize_tokens(
    tokens: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1, fuse: bool = True
) -> tuple[Tensor, Tensor]:
    """Keep the `num_keep` highest-scoring tokens and fuse the rest into one, weighted by their scores.

    Args:
        tokens: (B, N, C), float32, float16 or bfloat16, any strides.
        scores: (B, N - P), float32 or the dtype of `tokens`, a score for each non-prefix token, such as those of
            `attention_with_scores`.
        num_keep: K, from 1 to N - P.
        num_prefix_tokens: P, the leading tokens (class token, registers) that are always kept, in place.
        fuse: append the sum over dropped tokens of score * token; without it they are gone.

    Returns:
        tokens: (B, P + K + 1, C), without the last one when `fuse` is False: prefix, kept tokens by descending
            score, fused token. With K == N - P there is nothing to drop: the input itself comes back, in its order.
        indices: (B, K) int64 into the non-prefix tokens. Of equal scores the lower index comes first; NaN ranks
            highest, as in `torch.topk`.

    Gradients flow to `tokens`, and through the fused token to the scores of dropped tokens.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong type or dtype, shape or value, or device; the message names it.
    """
    _check(tokens, scores, num_keep, num_prefix_tokens, "tokens")
    if num_keep == tokens.shape[1] - num_prefix_tokens:
        return tokens, _all_indices(tokens, num_keep)
    return _reorganize(tokens, scores, num_keep, num_prefix_tokens, fuse)


def add_reorganize_norm(
    residual: Tensor,
    update: Tensor,
    scores: Tensor,
    num_keep: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    num_prefix_tokens: int = 1,
    fuse: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reorganize_tokens(residual + update, ...)` and its LayerNorm: the seam of an EViT block between its halves.

    Args:
        residual, update: (B, N, C), same dtype: the residual stream and the attention's output.
        scores, num_keep, num_prefix_tokens, fuse: as in `reorganize_tokens`.
        weight, bias: (C,) LayerNorm parameters in the dtype of `residual`.
        eps: added to the variance.

    Returns:
        stream: the new residual stream, as the tokens of `reorganize_tokens`.
        normed: LayerNorm(stream), same shape.
        indices: (B, K) int64, as in `reorganize_tokens`.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong type or dtype, shape or value, or device; the message names it.
    """
    _check(residual, scores, num_keep, num_prefix_tokens, "residual")
    _checks.check_tensor("update", update, layout="(B, N, C)")
    _checks.check_same("update", update, "residual", residual)
    _checks.check_shape("update", update, tuple(residual.shape), "the shape of residual")
    for name, parameter in (("weight", weight), ("bias", bias)):
        _checks.check_tensor(name, parameter, layout="(C,)")
        _checks.check_same(name, parameter, "residual", residual)
        _checks.check_shape(name, parameter, (residual.shape[2],), "one value for each channel of residual")
    if num_keep == residual.shape[1] - num_prefix_tokens:
        stream = residual + update
        normed = F.layer_norm(stream, stream.shape[-1:], weight, bias, eps)
        return stream, normed, _all_indices(stream, num_keep)
    return _add_reorganize_norm(residual, update, scores, num_keep, weight, bias, eps, num_prefix_tokens, fuse)


def _all_indices(tokens: Tensor, num_keep: int) -> Tensor:
    return torch.arange(num_keep, device=tokens.device).repeat(tokens.shape[0], 1)


def _check(tokens: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int, name: str) -> None:
    _checks.check_tensor(name, tokens, layout="(B, N, C)")
    _checks.check_float(name, tokens)
    length = tokens.shape[1]
    _checks.check_int("num_prefix_tokens", num_prefix_tokens, 0, length - 1, f"fewer than the {length} tokens")
    candidates = length - num_prefix_tokens
    _checks.check_tensor("scores", scores, layout="(B, N - P)")
    _checks.check_same("scores", scores, name, tokens, dtype=False)
    if scores.dtype not in (torch.float32, tokens.dtype):
        raise TypeError(f"scores must be float32 or the dtype of {name} ({tokens.dtype}), got {scores.dtype}")
    _checks.check_shape("scores", scores, (tokens.shape[0], candidates), f"a score for each non-prefix token of {name}")
    _checks.check_int("num_keep", num_keep, 1, candidates, f"{name} has {candidates} non-prefix tokens")
