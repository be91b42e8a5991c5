"""Scaled dot-product attention for vision transformers, and the class token's attention that EViT selects tokens by.

    out = softmax(scale * Q K^T) V                    attention, attention_varlen
    scores_j = mean over heads of softmax(...)_{0, j}   ..._with_scores

The scores are differentiable and cost one row, not the N x N matrix. With g = dScores / H (0 at prefix tokens), p query
0's probabilities and t = sum_j p_j g_j, their gradient adds ds_j = p_j (g_j - t) to row 0 of the logits' gradient.
Source: EViT (Liang et al., ICLR 2022), section 3.2; FlashAttention-2 (Dao, 2023) for the backward without the matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xray_kernels import _checks
from xray_kernels.attention import backends, ops


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_lengths: Tensor | None = None,
    backend: str = "auto",
    **refused: Any,
) -> Tensor:
    """softmax(scale * query key^T) value, with the layout of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: (B, H, Nq, D), float32, float16 or bfloat16, any strides (a last stride other than 1 is copied).
        key, value: (B, H, Nk, D), same dtype and device as `query`.
        scale: factor of the logits; 1 / sqrt(D) when None.
        is_causal: query i sees keys 0..i (counted from the first query and key, as SDPA does).
        key_lengths: (B,) int32 or int64: row b sees its first key_lengths[b] keys only, for padded text or clips of
            unequal length. A length of 0 gives zeros and no gradient; one above Nk means all.
        backend: "xray" for this project's kernels, "sdpa" for PyTorch's, "flash_attn" or "xformers" for those packages;
            "auto" takes what the committed results of this device call fastest, else "xray", or "sdpa" where "xray"
            has no kernel.
        refused: nothing; `attn_mask`, `dropout_p` and `enable_gqa` of PyTorch's function are refused by name.

    Returns:
        (B, H, Nq, D) in the dtype of `value`, stored so that `out.transpose(1, 2).flatten(2)` is a free view.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong type or dtype, shape or value, device or backend; the message
            names it.
    """
    scale = _check(query, key, value, scale, "(B, H, N, D)", refused)
    _check_lengths(key_lengths, query)
    chosen = backends.choose(backend, "attention", query)
    if chosen == "xray":
        return ops.attention(query, key, value, scale, is_causal, key_lengths, None, query.shape[2])[0]
    return backends.attention(chosen, query, key, value, scale, is_causal, key_lengths)


def attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    num_prefix_tokens: int = 1,
    key_lengths: Tensor | None = None,
    backend: str = "auto",
    **refused: Any,
) -> tuple[Tensor, Tensor]:
    """`attention`, and how much the class token (query 0) attends to each non-prefix token: EViT's attentiveness.

    Args:
        query, key, value: (B, H, N, D), float32, float16 or bfloat16, any strides; N > num_prefix_tokens.
        scale: factor of the logits; 1 / sqrt(D) when None.
        num_prefix_tokens: P, the leading tokens (class token, registers) that get no score; at least 1.
        key_lengths: as in `attention`; tokens past a row's length score 0.
        backend: as in `attention`. Scores come with any of them, from the class token's row alone.
        refused: as in `attention`.

    Returns:
        out: (B, H, N, D), as from `attention`.
        scores: (B, N - P) float32: mean over heads of query 0's softmax probabilities over the non-prefix keys, not
            renormalised. Differentiable.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong type or dtype, shape or value, device or backend; the message
            names it.
    """
    scale = _check(query, key, value, scale, "(B, H, N, D)", refused)
    length = key.shape[2]
    if query.shape[2] != length:
        raise ValueError(
            f"query and key must have the same number of tokens to score them, got {query.shape[2]} and {length}"
        )
    if length == 1:
        raise ValueError("query and key need a token beside the class token to score, got N = 1")
    _checks.check_int("num_prefix_tokens", num_prefix_tokens, 1, length - 1, "at least the class token, fewer than N")
    _check_lengths(key_lengths, query)
    chosen = backends.choose(backend, "attention_with_scores", query)
    if chosen == "xray":
        out, scores, _, _ = ops.attention_with_scores(
            query, key, value, scale, num_prefix_tokens, key_lengths, None, length
        )
        return out, scores
    query, key, scores = ops.with_scores(query, key, scale, num_prefix_tokens, key_lengths)
    return backends.attention(chosen, query, key, value, scale, False, key_lengths), scores


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Self-attention within each of B sequences of unequal length that are packed one after another, without padding.

    Args:
        query, key, value: (T, H, D), float32, float16 or bfloat16, any strides: the tokens of all sequences.
        cu_seqlens: (B + 1,) int32 or int64 on the device of `query`: sequence b is tokens cu_seqlens[b] to
            cu_seqlens[b + 1] - 1; starts with 0, does not fall, ends with T. A sequence may be empty.
        max_seqlen: the longest length, which sizes launches on a GPU; T when None, which is right and launches more
            than it needs.
        scale: factor of the logits; 1 / sqrt(D) when None.
        is_causal: a token sees itself and those before it in its sequence.

    Returns:
        (T, H, D) in the dtype of `value`, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong type or dtype, shape, value or device; the message names it. The
            values of `cu_seqlens` are looked at on a CPU only.
    """
    scale = _check(query, key, value, scale, "(T, H, D)", {})
    longest = _check_packed(query, cu_seqlens, max_seqlen)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return ops.attention(query, key, value, scale, is_causal, None, cu_seqlens, longest)[0][0].transpose(0, 1)


def attention_varlen_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    num_prefix_tokens: int = 1,
) -> tuple[Tensor, Tensor]:
    """`attention_varlen`, and how much each sequence's first token attends to the others of its sequence.

    Args:
        query, key, value, cu_seqlens, max_seqlen, scale: as in `attention_varlen`.
        num_prefix_tokens: P, the leading tokens of each sequence (class token, registers) that get no score.

    Returns:
        out: (T, H, D), as from `attention_varlen`.
        scores: (T,) float32, a score for each packed token as in `attention_with_scores`, 0 for prefix tokens.
            Differentiable.

    Raises:
        TypeError, ValueError, RuntimeError: as in `attention_varlen`.
    """
    scale = _check(query, key, value, scale, "(T, H, D)", {})
    longest = _check_packed(query, cu_seqlens, max_seqlen)
    _checks.check_int("num_prefix_tokens", num_prefix_tokens, 1, None, "at least the class token")
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out, scores, _, _ = ops.attention_with_scores(
        query, key, value, scale, num_prefix_tokens, None, cu_seqlens, longest
    )
    return out[0].transpose(0, 1), scores[0]


REFUSED = {
    "attn_mask": "key_lengths and is_causal are what it can mask by",
    "dropout_p": "it has no dropout; vision transformers regularise by dropping whole paths or tokens",
    "enable_gqa": "key and value need as many heads as query: repeat_interleave them",
}


def _check(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, layout: str, refused: dict[str, Any]
) -> float:
    for name in refused:
        if name not in REFUSED:
            raise TypeError(f"attention has no argument {name!r}")
        raise TypeError(f"attention does not take {name}: {REFUSED[name]}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _checks.check_tensor(name, tensor, layout=layout)
    _checks.check_float("query", query)
    packed = query.dim() == 3
    expected = list(query.shape)
    if not packed:
        expected[2] = key.shape[2]
    why = "T, H and D of query" if packed else "B, H, D of query and N of key"
    for name, tensor in (("key", key), ("value", value)):
        _checks.check_same(name, tensor, "query", query)
        _checks.check_shape(name, tensor, tuple(expected), why)
    if query.shape[-1] == 0 or (not packed and (query.shape[2] == 0 or key.shape[2] == 0)):
        raise ValueError(
            f"query and key need at least one token and D >= 1, got {tuple(query.shape)}, {tuple(key.shape)}"
        )
    if scale is None:
        return 1.0 / math.sqrt(query.shape[-1])
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    return float(scale)


def _check_integers(name: str, value: Tensor, query: Tensor, layout: str) -> None:
    _checks.check_tensor(name, value, layout=layout)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")
    _checks.check_same(name, value, "query", query, dtype=False)


def _check_lengths(key_lengths: Tensor | None, query: Tensor) -> None:
    if key_lengths is not None:
        _check_integers("key_lengths", key_lengths, query, "(B,)")
        _checks.check_shape("key_lengths", key_lengths, (query.shape[0],), "one length for each row of the batch")


def _check_packed(query: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> int:
    """The longest length, for launches."""
    total = query.shape[0]
    _check_integers("cu_seqlens", cu_seqlens, query, "(B + 1,)")
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must have shape (B + 1,), got (0,)")
    if max_seqlen is not None:
        _checks.check_int("max_seqlen", max_seqlen, 0, None, "the longest sequence")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling() and type(cu_seqlens) is Tensor:
        lengths = cu_seqlens.diff()
        longest = int(lengths.max()) if lengths.numel() else 0
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (lengths < 0).any():
            raise ValueError(
                f"cu_seqlens must start with 0, never fall and end with {total}, the number of tokens,"
                f" got {cu_seqlens.tolist()}"
            )
        if max_seqlen is not None and max_seqlen < longest:
            raise ValueError(f"max_seqlen must be at least {longest}, the longest sequence, got {max_seqlen}")
    return total if max_seqlen is None else min(max_seqlen, total)
