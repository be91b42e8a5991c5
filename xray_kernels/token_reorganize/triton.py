"""Token reorganisation on GPUs by Triton.

Selection. A score becomes a 64-bit word, its ordered bits above the complement of its index, so that one comparison
decides order, ties and NaN. A token's place is the number of words above its own:
    up to 256 candidates    counted by the kernel that moves the tokens: one launch in all;
    up to 1,024             counted by `rank_kernel`, then moved;
    more                    counted inside tiles of 256, which gives sorted tiles, then `merge_kernel` adds up a
                            binary search in every tile: 256 + 9 N / 256 steps a token instead of N.
Forward. Programs of one kind copy rows to their places; programs of the other kind walk over the list of dropped
tokens only and sum the fused token in fp32. Each token row is read once, each result row written once.
Backward. A program writes rows of the gradient: a copy for kept tokens; for dropped ones score * dFused and the product
<dFused, token>. With LayerNorm, a program also keeps its sums for weight and bias, which a second launch adds in order.
Bytes: B C size (N + P + K + 1) forward and backward, as `spec.traffic`; the seam reads residual and update (2 N) and
writes stream and normed (2 (P + K + 1)). No atomics: two runs give the same bits. No host synchronisation.

Sizes of blocks are chosen by reasoning about occupancy; none is measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from xray_kernels._triton import FUSION, on
from xray_kernels.token_reorganize import reference
from xray_kernels.token_reorganize import triton_kernels as kernels

COUNTED = 256
"""Scores that are compared at once; also the size of a sorted tile."""
MOST_IN_ONE_TILE = 1024
MOST_NORM_CHANNELS = 4096
"""LayerNorm keeps whole rows in registers; wider ones go to the reference."""


def _width(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def _block(channels: int) -> int:
    """Channels of one step: few idle lanes, then long rows."""
    return min((256, 128), key=lambda block: -(-channels // block) * block) if channels > 128 else _width(channels)


def _rows(elements: int, block: int, most: int) -> int:
    return min(max(elements // block, 1), most)


def _rank(scores: Tensor, order: Tensor, indices: Tensor) -> None:
    """Fill `order` with the candidates by rank, and `indices` with the first of them."""
    batch, candidates = scores.shape
    keep = indices.shape[1]
    if candidates <= MOST_IN_ONE_TILE:
        tile = triton.cdiv(candidates, COUNTED) * COUNTED
        kernels.rank_kernel[(batch * tile // 32,)](
            scores, *scores.stride(), order, indices, order, candidates, keep, tile,
            TILED=False, ROWS=32, WIDTH=COUNTED, num_warps=8, **FUSION,
        )  # fmt: skip
        return
    tiles = triton.cdiv(candidates, COUNTED)
    words = scores.new_empty(batch, tiles * COUNTED, dtype=torch.int64)
    kernels.rank_kernel[(batch * tiles * COUNTED // 32,)](
        scores, *scores.stride(), order, indices, words, candidates, keep, COUNTED,
        TILED=True, ROWS=32, WIDTH=COUNTED, num_warps=8, **FUSION,
    )  # fmt: skip
    kernels.merge_kernel[(batch * triton.cdiv(candidates, 32),)](
        scores, *scores.stride(), order, indices, words, candidates, keep, tiles,
        ROWS=32, SEARCHED=32, WIDTH=COUNTED, num_warps=8, **FUSION,
    )  # fmt: skip


def _forward(
    tokens: Tensor, update: Tensor | None, scores: Tensor, keep: int, norm: tuple[Tensor, Tensor, float] | None,
    prefix: int, fuse: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    batch, length, channels = tokens.shape
    candidates, out_rows = length - prefix, prefix + keep + fuse
    out = tokens.new_empty(batch, out_rows, channels)
    normed = torch.empty_like(out) if norm else None
    indices = scores.new_empty(batch, keep, dtype=torch.int64)
    if batch == 0:
        return out, normed, indices
    weight, bias, eps = norm or (None, None, 0.0)
    order = scores.new_empty(batch, candidates, dtype=torch.int32)
    ranked = candidates > COUNTED
    block = _width(channels) if norm else _block(channels)
    rows = _rows(4096, block, 64 if ranked else 16)
    if ranked or (not norm and batch < 64):
        fused_block = min(128, _width(channels))
    else:
        fused_block = block if norm else min(1024, _width(channels))
    fused_rows = _rows(8192, fused_block, 64 if ranked else 32)
    fused_programs = batch * triton.cdiv(channels, fused_block) if fuse else 0
    copy_parts = triton.cdiv(prefix + keep if ranked else length, rows)
    with on(tokens):
        if ranked:
            _rank(scores, order, indices)
        kernels.move_kernel[(fused_programs + batch * copy_parts,)](
            tokens, *tokens.stride(), update, *(update.stride() if update is not None else (None, None, None)),
            scores, *scores.stride(), out, normed, indices, order, weight, bias, eps,
            candidates, keep, prefix, out_rows, fused_programs, copy_parts,
            CHANNELS=channels, NORM=norm is not None, RANKED=ranked, ROWS=rows, BLOCK_C=block,
            FUSED_ROWS=fused_rows, FUSED_C=fused_block, WIDTH=COUNTED,
            num_warps=8 if rows * block >= 4096 else 4, **FUSION,
        )  # fmt: skip
        if norm and fuse and fused_block < channels:
            kernels.norm_kernel[(batch,)](
                out, normed, weight, bias, out_rows, eps, CHANNELS=channels, BLOCK_C=block, num_warps=4, **FUSION
            )
    return out, normed, indices


def _places(scores: Tensor, indices: Tensor) -> Tensor | None:
    """The inverse of `indices`, or None where the backward kernels find it themselves."""
    batch, candidates = scores.shape
    keep = indices.shape[1]
    if keep <= COUNTED:
        return None
    place = scores.new_empty(batch, candidates, dtype=torch.int32)
    kernels.place_kernel[(batch,)](indices, place, candidates, keep, WIDTH=1024, num_warps=8, **FUSION)
    return place


def reorganize_tokens(
    tokens: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    """As the reference; float64 goes there."""
    if tokens.dtype == torch.float64 or tokens.shape[2] == 0:
        return reference.reorganize_tokens(tokens, scores, num_keep, num_prefix_tokens, fuse)
    out, _, indices = _forward(tokens, None, scores, num_keep, None, num_prefix_tokens, fuse)
    return out, indices


def reorganize_tokens_backward(
    grad: Tensor, tokens: Tensor, scores: Tensor, indices: Tensor, num_prefix_tokens: int, fuse: bool
) -> tuple[Tensor, Tensor]:
    """As the reference; float64 goes there."""
    batch, length, channels = tokens.shape
    if tokens.dtype == torch.float64 or channels == 0:
        return reference.reorganize_tokens_backward(grad, tokens, scores, indices, num_prefix_tokens, fuse)
    grad_tokens, grad_scores = tokens.new_empty(tokens.shape), scores.new_empty(scores.shape)
    if batch == 0:
        return grad_tokens, grad_scores
    indices, block = indices.contiguous(), _block(channels)
    with on(tokens):
        place = _places(scores, indices)
        rows = _rows(4096, block, 16 if place is None else 64)
        parts = triton.cdiv(length, rows)
        kernels.backward_kernel[(batch * parts,)](
            grad, *grad.stride(), tokens, *tokens.stride(), scores, *scores.stride(), indices, place,
            grad_tokens, grad_scores, scores.shape[1], indices.shape[1], num_prefix_tokens, parts,
            CHANNELS=channels, FUSE=fuse, PLACED=place is not None, ROWS=rows, BLOCK_C=block, WIDTH=COUNTED,
            num_warps=8 if rows * block >= 4096 else 4, **FUSION,
        )  # fmt: skip
    return grad_tokens, grad_scores


def add_reorganize_norm(
    residual: Tensor, update: Tensor, scores: Tensor, num_keep: int, weight: Tensor, bias: Tensor, eps: float,
    num_prefix_tokens: int, fuse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference; float64 and more than 4,096 channels go there."""
    if residual.dtype == torch.float64 or not 0 < residual.shape[2] <= MOST_NORM_CHANNELS:
        return reference.add_reorganize_norm(
            residual, update, scores, num_keep, weight, bias, eps, num_prefix_tokens, fuse
        )
    norm = (weight.contiguous(), bias.contiguous(), eps)
    out, normed, indices = _forward(residual, update, scores, num_keep, norm, num_prefix_tokens, fuse)
    assert normed is not None
    return out, normed, indices


def add_reorganize_norm_backward(
    grad_stream: Tensor, grad_normed: Tensor, residual: Tensor, update: Tensor, scores: Tensor, indices: Tensor,
    stream: Tensor, weight: Tensor, bias: Tensor, eps: float, num_prefix_tokens: int, fuse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference; float64 and more than 4,096 channels go there."""
    batch, length, channels = residual.shape
    if residual.dtype == torch.float64 or not 0 < channels <= MOST_NORM_CHANNELS:
        return reference.add_reorganize_norm_backward(
            grad_stream, grad_normed, residual, update, scores, indices, stream, weight, bias, eps,
            num_prefix_tokens, fuse,
        )  # fmt: skip
    grad_weight, grad_bias = weight.new_empty(channels), bias.new_empty(channels)
    grad_tokens, grad_scores = residual.new_empty(residual.shape), scores.new_empty(scores.shape)
    if batch == 0:
        return grad_tokens, grad_scores, grad_weight.zero_(), grad_bias.zero_()
    indices, block = indices.contiguous(), _width(channels)
    rows = _rows(1024, block, 8 if indices.shape[1] <= COUNTED else 32)
    split_rows = triton.cdiv(max(8, triton.cdiv(length * batch, 512)), rows) * rows
    splits = triton.cdiv(length, split_rows)
    groups = min(batch, 1024)
    partial = scores.new_empty(groups * splits, 2, channels, dtype=torch.float32)
    with on(residual):
        place = _places(scores, indices)
        kernels.norm_backward_kernel[(splits, groups)](
            grad_stream, *grad_stream.stride(), grad_normed, *grad_normed.stride(),
            residual, *residual.stride(), update, *update.stride(), scores, *scores.stride(),
            indices, place, stream.contiguous(), weight.contiguous(), grad_tokens, grad_scores, partial, eps,
            scores.shape[1], indices.shape[1], num_prefix_tokens, batch, split_rows,
            CHANNELS=channels, FUSE=fuse, PLACED=place is not None, ROWS=rows, BLOCK_C=block, WIDTH=COUNTED,
            num_warps=min(max(block // 256, 4), 16), **FUSION,
        )  # fmt: skip
        kernels.sum_kernel[(triton.cdiv(2 * channels, 32),)](
            partial,
            grad_weight,
            grad_bias,
            groups * splits,
            CHANNELS=channels,
            ROWS=128,
            BLOCK_C=32,
            num_warps=4,
            **FUSION,
        )
    return grad_tokens, grad_scores, grad_weight, grad_bias


def samples(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Arguments of op `name` for its first-use check: one length for each way of ranking, with equal scores."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)

    for batch, length, keep in ((2, 70, 40), (1, 300, 200), (1, 1100, 700)):
        residual, update = normal(batch, length, 48), normal(batch, length, 48)
        levels = torch.randint(32, 96, (batch, length - 1), generator=generator, dtype=torch.int32, device="cpu")
        scores = (levels / (64 * (length - keep) ** 0.5)).to(device)
        if name == "reorganize_tokens":
            yield residual, scores, keep, 1, True
            continue
        weight, bias = normal(48), normal(48)
        if name == "add_reorganize_norm":
            yield residual, update, scores, keep, weight, bias, 1e-6, 1, True
            continue
        stream, _, indices = reference.add_reorganize_norm(residual, update, scores, keep, weight, bias, 1e-6, 1, True)
        grad, grad_normed = normal(*stream.shape), normal(*stream.shape)
        if name == "reorganize_tokens_backward":
            yield grad, residual, scores, indices, 1, True
        else:
            yield grad, grad_normed, residual, update, scores, indices, stream, weight, bias, 1e-6, 1, True
