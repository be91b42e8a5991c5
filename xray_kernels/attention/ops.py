"""The ops behind attention: schemas, shapes for tracing, gradients.

Tensors are (B, H, N, D). Packed sequences are one row of the batch, (1, H, T, D), with `cu_seqlens`; `max_seqlen` then
bounds their lengths. `statistics` (2, B, H, Nq) float32 holds each query's largest logit and the logarithm of its sum
of exp(logit - largest), 0 and infinity where it has no key: p = exp(logit - largest - log_sum). It is two numbers
because one, their sum, would round away what exp needs when logits are in the hundreds. `class_row` (B, H, N) float32
holds the class token's probabilities in each head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xray_kernels import _library
from xray_kernels.attention import reference

_TRITON = "xray_kernels.attention.triton"


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, *packing: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    out = value.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty(2, batch, heads, length, dtype=wide)


def _fake_class_scores(
    query: Tensor,
    key: Tensor,
    scale: float,
    num_prefix_tokens: int,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = key.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    row = query.new_empty(batch, heads, length, dtype=wide)
    return row.new_empty(batch, length if cu_seqlens is not None else length - num_prefix_tokens), row


def _fake_attention_with_scores(
    query: Tensor, key: Tensor, value: Tensor, scale: float, num_prefix_tokens: int, *packing: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, statistics = _fake_attention(query, key, value, scale, False)
    scores, class_row = _fake_class_scores(query, key, scale, num_prefix_tokens, *packing)
    return out, scores, statistics, class_row


def _fake_attention_backward(
    grad_out: Tensor, grad_scores: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    # stored as `out` is: of self-attention from one projection, the three are then joined by plain copies of rows
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))


def _fake_class_scores_backward(*arguments: Any) -> None:
    return None


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, ctx.scale, ctx.is_causal, key_lengths, cu_seqlens, ctx.max_seqlen = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, key_lengths, cu_seqlens)


def _backward_attention(ctx: Any, grad_out: Tensor | None, grad_statistics: None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 8
    query, key, value, out, statistics, key_lengths, cu_seqlens = ctx.saved_tensors
    grads = attention_backward(
        grad_out, None, query, key, value, out, statistics, None, ctx.scale, ctx.is_causal, key_lengths, cu_seqlens,
        ctx.max_seqlen, 0,
    )  # fmt: skip
    return *grads, *(None,) * 5


def _setup_attention_with_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, ctx.scale, ctx.num_prefix_tokens, key_lengths, cu_seqlens, ctx.max_seqlen = inputs
    out, _, statistics, class_row = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, out, statistics, class_row, key_lengths, cu_seqlens)


def _backward_attention_with_scores(
    ctx: Any, grad_out: Tensor | None, grad_scores: Tensor | None, *unused: None
) -> tuple[Any, ...]:
    query, key, value, out, statistics, class_row, key_lengths, cu_seqlens = ctx.saved_tensors
    if grad_out is None and grad_scores is None:
        return (None,) * 8
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = attention_backward(
        grad_out, grad_scores, query, key, value, out, statistics, class_row, ctx.scale, False, key_lengths, cu_seqlens,
        ctx.max_seqlen, ctx.num_prefix_tokens,
    )  # fmt: skip
    return *grads, *(None,) * 5


attention_backward = _library.define(
    "attention_backward(Tensor grad_out, Tensor? grad_scores, Tensor query, Tensor key, Tensor value, Tensor out,"
    " Tensor statistics, Tensor? class_row, float scale, bool is_causal, Tensor? key_lengths, Tensor? cu_seqlens,"
    " SymInt max_seqlen, SymInt num_prefix_tokens) -> (Tensor, Tensor, Tensor)",
    reference=reference.attention_backward,
    triton=_TRITON,
    fake=_fake_attention_backward,
)
attention = _library.define(
    "attention(Tensor query, Tensor key, Tensor value, float scale, bool is_causal, Tensor? key_lengths,"
    " Tensor? cu_seqlens, SymInt max_seqlen) -> (Tensor, Tensor)",
    reference=reference.attention,
    triton=_TRITON,
    fake=_fake_attention,
    backward=_backward_attention,
    setup_context=_setup_attention,
)
attention_with_scores = _library.define(
    "attention_with_scores(Tensor query, Tensor key, Tensor value, float scale, SymInt num_prefix_tokens,"
    " Tensor? key_lengths, Tensor? cu_seqlens, SymInt max_seqlen) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.attention_with_scores,
    triton=_TRITON,
    fake=_fake_attention_with_scores,
    backward=_backward_attention_with_scores,
    setup_context=_setup_attention_with_scores,
)
class_scores = _library.define(
    "class_scores(Tensor query, Tensor key, float scale, SymInt num_prefix_tokens, Tensor? key_lengths,"
    " Tensor? cu_seqlens, SymInt max_seqlen) -> (Tensor, Tensor)",
    reference=reference.class_scores,
    triton=_TRITON,
    fake=_fake_class_scores,
)
class_scores_backward = _library.define(
    "class_scores_backward(Tensor grad_scores, Tensor query, Tensor key, Tensor class_row, float scale,"
    " SymInt num_prefix_tokens, Tensor? cu_seqlens, SymInt max_seqlen, Tensor(a!) grad_query, Tensor(b!) grad_key)"
    " -> ()",
    reference=reference.class_scores_backward,
    triton=_TRITON,
    fake=_fake_class_scores_backward,
)


class _WithScores(torch.autograd.Function):
    """Scores beside an attention of any make. Query and key pass through on their way to it, so that on the way back
    their gradients arrive here, and those of the scores are added to them in place: no further pass over memory."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, scale: float, num_prefix_tokens: int, key_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, class_row = class_scores(query, key, scale, num_prefix_tokens, key_lengths, None, key.shape[2])
        ctx.scale, ctx.num_prefix_tokens = scale, num_prefix_tokens
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, class_row)
        return query.view_as(query), key.view_as(key), scores

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_query: Tensor | None, grad_key: Tensor | None, grad_scores: Tensor | None
    ) -> tuple[Any, ...]:
        if grad_scores is not None:
            query, key, class_row = ctx.saved_tensors
            grad_query = torch.zeros_like(query) if grad_query is None else _owned(grad_query)
            grad_key = torch.zeros_like(key) if grad_key is None else _owned(grad_key)
            class_scores_backward(
                grad_scores, query, key, class_row, ctx.scale, ctx.num_prefix_tokens, None, key.shape[2],
                grad_query, grad_key,
            )  # fmt: skip
        return grad_query, grad_key, None, None, None


def _owned(grad: Tensor) -> Tensor:
    """A gradient that can be added to: a broadcast one has no memory of its own, and kernels want dense rows."""
    return grad.contiguous() if 0 in grad.stride() or grad.stride(-1) != 1 else grad


def with_scores(
    query: Tensor, key: Tensor, scale: float, num_prefix_tokens: int, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key to hand to an attention, and the class token's scores."""
    return _WithScores.apply(query, key, scale, num_prefix_tokens, key_lengths)
