"""Scaled dot-product attention for vision transformers, and the class token's attention that EViT selects tokens by.

    out = softmax(scale * Q K^T) V                    attention
    scores_j = mean over heads of softmax(...)_{0, j}   attention_with_scores

The scores are differentiable and cost one row, not the N x N matrix: p_j = exp(scale * q_0 . k_j - lse_0).
Source: EViT (Liang et al., ICLR 2022), section 3.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xray_kernels import _checks, _library
from xray_kernels.attention import reference


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    out = value.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty(batch, heads, length, dtype=torch.promote_types(query.dtype, torch.float32))
    return out, lse


def _fake_attention_with_scores(
    query: Tensor, key: Tensor, value: Tensor, scale: float, num_prefix_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _fake_attention(query, key, value, scale, False, None)
    return out, lse.new_empty(query.shape[0], key.shape[2] - num_prefix_tokens), lse


def _fake_backward(
    grad_out: Tensor, grad_scores: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.scale, ctx.is_causal, key_lengths = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, output[0], key_lengths)


def _backward_attention(ctx: Any, grad_out: Tensor | None, grad_lse: None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 6
    query, key, value, out, key_lengths = ctx.saved_tensors
    grads = _attention_backward(grad_out, None, query, key, value, out, ctx.scale, ctx.is_causal, key_lengths, 0)
    return *grads, None, None, None


def _setup_attention_with_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, ctx.scale, ctx.num_prefix_tokens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, output[0])


def _backward_attention_with_scores(
    ctx: Any, grad_out: Tensor | None, grad_scores: Tensor | None, grad_lse: None
) -> tuple[Any, ...]:
    query, key, value, out = ctx.saved_tensors
    if grad_out is None and grad_scores is None:
        return (None,) * 5
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = _attention_backward(
        grad_out, grad_scores, query, key, value, out, ctx.scale, False, None, ctx.num_prefix_tokens
    )
    return *grads, None, None


_attention_backward = _library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_scores, Tensor query, Tensor key, Tensor value, Tensor out,"
    " float scale, bool is_causal, Tensor? key_lengths, SymInt num_prefix_tokens) -> (Tensor, Tensor, Tensor)",
    reference=reference.attention_backward,
    fake=_fake_backward,
)
_attention = _library.define(
    "attention(Tensor query, Tensor key, Tensor value, float scale, bool is_causal, Tensor? key_lengths)"
    " -> (Tensor, Tensor)",
    reference=reference.attention,
    fake=_fake_attention,
    backward=_backward_attention,
    setup_context=_setup_attention,
)
_attention_with_scores = _library.define(
    "attention_with_scores(Tensor query, Tensor key, Tensor value, float scale, SymInt num_prefix_tokens)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.attention_with_scores,
    fake=_fake_attention_with_scores,
    backward=_backward_attention_with_scores,
    setup_context=_setup_attention_with_scores,
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """softmax(scale * query key^T) value, with the layout of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (B, H, Nq, D), float32, float16 or bfloat16, any strides.
        key, value: (B, H, Nk, D), same dtype and device as `query`.
        scale: factor of the logits; 1 / sqrt(D) when None.
        is_causal: query i sees keys 0..i (counted from the first query and key, as SDPA does).
        key_lengths: (B,) int32 or int64: row b sees its first key_lengths[b] keys only, for padded text or clips of
            unequal length. A length of 0 gives zeros and no gradient.

    Returns:
        (B, H, Nq, D) in the dtype of `value`, stored so that `out.transpose(1, 2).flatten(2)` is a free view.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong type or dtype, shape or value, or device; the message names it.
    """
    scale = _check(query, key, value, scale)
    if key_lengths is not None:
        _checks.check_tensor("key_lengths", key_lengths, layout="(B,)")
        if key_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"key_lengths must be int32 or int64, got {key_lengths.dtype}")
        _checks.check_same("key_lengths", key_lengths, "query", query, dtype=False)
        _checks.check_shape("key_lengths", key_lengths, (query.shape[0],), "one length for each row of the batch")
    return _attention(query, key, value, scale, is_causal, key_lengths)[0]


def attention_with_scores(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """`attention`, and how much the class token (query 0) attends to each non-prefix token: EViT's attentiveness.

    Args:
        query, key, value: (B, H, N, D), float32, float16 or bfloat16, any strides; N > num_prefix_tokens.
        scale: factor of the logits; 1 / sqrt(D) when None.
        num_prefix_tokens: P, the leading tokens (class token, registers) that get no score; at least 1.

    Returns:
        out: (B, H, N, D), as from `attention`.
        scores: (B, N - P) float32: mean over heads of query 0's softmax probabilities over the non-prefix keys, not
            renormalised. Differentiable.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong type or dtype, shape or value, or device; the message names it.
    """
    scale = _check(query, key, value, scale)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query and key must have the same number of tokens to score them, got {query.shape[2]} and {key.shape[2]}"
        )
    _checks.check_int(
        "num_prefix_tokens", num_prefix_tokens, 1, key.shape[2] - 1, "at least the class token, fewer than N"
    )
    out, scores, _ = _attention_with_scores(query, key, value, scale, num_prefix_tokens)
    return out, scores


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> float:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.check_tensor(name, tensor, layout="(B, H, N, D)")
    _checks.check_float("query", query)
    batch, heads, _, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        _checks.check_same(name, tensor, "query", query)
        _checks.check_shape(name, tensor, (batch, heads, key.shape[2], head_dim), "B, H, D of query and N of key")
    if query.shape[2] == 0 or key.shape[2] == 0 or head_dim == 0:
        raise ValueError(
            f"query and key need at least one token and D >= 1, got {tuple(query.shape)}, {tuple(key.shape)}"
        )
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not isinstance(scale, int | float) or scale != scale or abs(scale) == math.inf:
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    return float(scale)
