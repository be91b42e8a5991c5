"""Attention on GPUs by Triton.

Forward, FlashAttention-2: a program owns a tile of queries of one head and walks over tiles of keys with an online
softmax. Scores: the program of the first queries leaves the class token's logits, which it has anyway, in `class_row`;
a second small kernel makes them probabilities by the statistics, and means over heads by a sum in a fixed order.
    bytes  size (Q + K + V + out) once, if a head's K and V stay in L2 between its programs; 8 B H N of statistics; with
           scores 12 B H N of class row, which is 2% of the first at D = 64 in half types
    FLOPs  4 Nq Nk D a head
Backward, two ways:
    whole  one program a head holds the gradients of all its keys and walks over queries: 5 products, each tensor read
           once, `out` not at all (delta = sum_j p_j dP_j is at hand, unrounded), one launch. Half types, D <= 64 and up
           to 128 keys (256 at D <= 32): text, 50 tokens of 32-pixel patches, EViT's later layers. At 197 keys and
           D = 64 its accumulators are 256 x 64 x 2 floats, half the registers of 8 warps: it spilled on sm_80 and sm_90
           with 32 queries a step, and with 16 queries still on sm_80.
    split  a kernel over tiles of queries makes dQ, and delta = <dOut, out> on its way, which saves the usual third
           launch and its pass over dOut; a kernel over tiles of keys then makes dK and dV: 7 products, each input read
           by both. dQ by atomics would be 5, but not the same bits twice.
The class token's row adds dScores / H to its dP, and its delta sum_j p_j dScores_j / H: nothing else changes.
    bytes  whole: size (3 Q + 4 K); split: size (6 Q + 6 K) and 8 B H N of delta
    FLOPs  whole 10, split 14 Nq Nk D a head
Heads of 72, 80, 96 channels are two blocks, 64 + 16 or 64 + 32 columns: padding to 128 would cost 1.3 to 1.6 times.
No atomics, no host synchronisation, no matrix of logits in memory. Strides may be anything, the last one too.
Precision: products of float32 are exact ("ieee"); `tf32x3` would use matrix units, but rounds products at 2^-22 or so,
where exp multiplies errors of sharp logits. Half types round p and dS before their products, as everyone does.
Not taken: separate loops for full and partial tiles, which save a comparison a logit where sequences have 2 to 9 tiles;
tensor descriptors, which need a contiguous last dimension and 16-byte strides; autotuning, which would measure inside a
user's first step.

Sizes of tiles come from `configuration`; none is measured on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from xray_kernels._triton import FUSION, on
from xray_kernels.attention import reference
from xray_kernels.attention import triton_backward_kernels as backward_kernels
from xray_kernels.attention import triton_kernels as kernels
from xray_kernels.attention.samples import samples

__all__ = [
    "attention",
    "attention_backward",
    "attention_with_scores",
    "class_scores",
    "class_scores_backward",
    "samples",
]
MOST_CHANNELS = 256


class Tiles(NamedTuple):
    """How one kernel is launched: queries and keys of a tile, warps, stages of the load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


OWN = {128: 1.0, 64: 1.1, 32: 1.4}
"""Cost of a row by the rows a program owns: one of 64 loads each key for half as many rows as one of 128; one of 32 has
two warps, too few for Hopper's and Blackwell's matrix units."""
INNER = {64: 1.0, 32: 1.15}
"""Cost of a row by the size of the tiles walked over: smaller ones rescale and wait more often."""


def _cheapest(length: int, cost: dict[int, float]) -> int:
    """The tile whose padded work on `length` tokens costs least; the larger one of equals."""
    return min(sorted(cost, reverse=True), key=lambda block: -(-length // block) * block * cost[block])


def configuration(kernel: str, queries: int, keys: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The launch of one kernel for given lengths: chosen by reasoning and by what compiles without spills.

    Nothing here is measured on a GPU. Half types: 64 x 64 tiles, or those that pad a short odd length less: 197 tokens
    are 2 x 128 queries by 4 x 64 keys, 140 are 3 x 64 by 5 x 32, 257 are 5 x 64 by 5 x 64. float32 has no matrix unit
    here, and a thread holds its rows' and columns' operands: small tiles, and smaller ones the longer a row is.

    Args:
        kernel: "forward"; "query" and "key", the gradients by those names; "whole", all three.
        queries, keys: tokens, of the longest sequence when packed.
        head_dim, dtype: of query, key and value.
    """
    columns = sum(blocks(head_dim))
    if dtype == torch.float32:
        if columns <= 96:
            return Tiles(32, 32, 4 if kernel == "forward" else 8, 1)
        if columns <= 128:
            return Tiles(32, 32 if kernel == "forward" else 16, 8, 1)
        return Tiles(16 if kernel == "key" else 32, 16, 8, 1)
    if kernel == "whole":
        block = max(32, triton.next_power_of_2(keys))
        return Tiles(32, block, 8 if block > 32 else 4, 1)
    if kernel == "forward":
        if columns > 128:
            return Tiles(64, 32, 8, 2)
        block = _cheapest(queries, OWN)
        return Tiles(block, _cheapest(keys, INNER), block // 16, 2)
    own, inner, warps, stages = 64, _cheapest(keys if kernel == "query" else queries, INNER), 4, 2
    if 64 < columns < 128:
        inner = 32
    elif columns == 128:
        warps = 8
    elif columns > 128:
        own, inner, warps, stages = 32, 64, 8, 1
    return Tiles(own, inner, warps, stages) if kernel == "query" else Tiles(inner, own, warps, stages)


def _is_whole(keys: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether a program can hold the gradients of all keys of a head: up to 128 x 64 of each."""
    columns = sum(blocks(head_dim))
    return dtype != torch.float32 and columns <= 64 and max(32, triton.next_power_of_2(keys)) * columns <= 128 * 64


def blocks(head_dim: int) -> tuple[int, int]:
    """A head's channels as one or two blocks whose sizes are powers of two."""
    whole = max(16, triton.next_power_of_2(head_dim))
    first = whole // 2
    rest = max(16, triton.next_power_of_2(max(head_dim - first, 1)))
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


def _eight(*tensors: Tensor) -> bool:
    """Whether rows of the tensors can be read 8 channels at once."""
    return all(x.stride(3) == 1 and all(stride % 8 == 0 for stride in x.stride()[:3]) for x in tensors)


def _strided(eight: bool, *tensors: Tensor) -> list[Any]:
    """Each tensor and its strides, but the last in units of 8 when `eight`: then no value is needed to see that rows
    start at multiples of 16 bytes, which heads of 72 channels would not show."""
    unit = 8 if eight else 1
    return [a for x in tensors for a in (x, *(stride // unit for stride in x.stride()[:3]), x.stride(3))]


def _sequences(query: Tensor, cu_seqlens: Tensor | None) -> int:
    return query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _takes(query: Tensor) -> bool:
    return query.dtype != torch.float64 and 0 < query.shape[3] <= MOST_CHANNELS


def _forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, key_lengths: Tensor | None,
    cu_seqlens: Tensor | None, max_seqlen: int, class_row: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, length, head_dim = query.shape
    out = value.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    statistics = query.new_empty(2, batch, heads, length, dtype=torch.float32)
    packed = cu_seqlens is not None
    longest, longest_key = (max_seqlen, max_seqlen) if packed else (length, key.shape[2])
    tile = configuration("forward", longest, longest_key, head_dim, query.dtype)
    width, rest = blocks(head_dim)
    tiles, eight = triton.cdiv(longest, tile.block_m), _eight(query, key, value)
    programs = _sequences(query, cu_seqlens) * heads * tiles
    if programs:
        with on(query):
            kernels.forward_kernel[(programs,)](
                *_strided(eight, query, key, value), out, statistics, class_row,
                key_lengths, cu_seqlens, scale, heads, length, key.shape[2], tiles, statistics.stride(0),
                HEAD_DIM=head_dim, WIDTH=width, REST=rest, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                CAUSAL=is_causal, EIGHT=eight, num_warps=tile.warps, num_stages=tile.stages,
                **FUSION,
            )  # fmt: skip
    return out, statistics


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, key_lengths: Tensor | None,
    cu_seqlens: Tensor | None, max_seqlen: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference; float64 and heads of more than 256 channels go there."""
    if not _takes(query):
        return reference.attention(query, key, value, scale, is_causal, key_lengths, cu_seqlens, max_seqlen)
    return _forward(query, key, value, scale, is_causal, key_lengths, cu_seqlens, max_seqlen, None)


def attention_with_scores(
    query: Tensor, key: Tensor, value: Tensor, scale: float, num_prefix_tokens: int, key_lengths: Tensor | None,
    cu_seqlens: Tensor | None, max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference; float64 and heads of more than 256 channels go there."""
    if not _takes(query):
        return reference.attention_with_scores(
            query, key, value, scale, num_prefix_tokens, key_lengths, cu_seqlens, max_seqlen
        )
    batch, heads, length, _ = query.shape
    class_row = query.new_empty(batch, heads, length, dtype=torch.float32)
    out, statistics = _forward(query, key, value, scale, False, key_lengths, cu_seqlens, max_seqlen, class_row)
    strides = (heads * length, length, 1) if cu_seqlens is None else (0, length, 1)
    scores = _scores(class_row, statistics, strides, num_prefix_tokens, key_lengths, cu_seqlens, max_seqlen)
    return out, scores, statistics, class_row


def _scores(
    class_row: Tensor, statistics: Tensor, strides: tuple[int, int, int], prefix: int, key_lengths: Tensor | None,
    cu_seqlens: Tensor | None, max_seqlen: int,
) -> Tensor:  # fmt: skip
    """Turns logits in `class_row` into probabilities, in place, and returns their mean over heads without the prefix.

    strides: of `statistics` between sequences, heads, and tokens before the class token's.
    """
    batch, heads, length = class_row.shape
    packed = cu_seqlens is not None
    scores = class_row.new_empty(batch, length if packed else length - prefix)
    tiles = triton.cdiv(max_seqlen if packed else length, 64)
    programs = _sequences(class_row, cu_seqlens) * tiles
    if programs and heads:
        with on(class_row):
            kernels.scores_kernel[(programs,)](
                class_row, statistics, *strides, scores, key_lengths, cu_seqlens, heads, length, tiles,
                statistics.stride(0), prefix, HEADS=16, BLOCK_N=64, num_warps=4, **FUSION,
            )  # fmt: skip
    return scores


def attention_backward(
    grad_out: Tensor, grad_scores: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
    statistics: Tensor, class_row: Tensor | None, scale: float, is_causal: bool, key_lengths: Tensor | None,
    cu_seqlens: Tensor | None, max_seqlen: int, num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference; float64 and heads of more than 256 channels go there."""
    if not _takes(query):
        return reference.attention_backward(
            grad_out, grad_scores, query, key, value, out, statistics, class_row, scale, is_causal, key_lengths,
            cu_seqlens, max_seqlen, num_prefix_tokens,
        )  # fmt: skip
    batch, heads, length, head_dim = query.shape
    keys, packed = key.shape[2], cu_seqlens is not None
    grad_query = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    grad_key = key.new_empty(batch, keys, heads, head_dim).transpose(1, 2)
    grad_value = value.new_empty(batch, keys, heads, head_dim).transpose(1, 2)
    if grad_scores is None or class_row is None:
        grad_scores = class_row = None
    else:
        class_row = class_row.contiguous()
    scores = (grad_scores, *(grad_scores.stride() if grad_scores is not None else (None, None)))
    statistics = statistics.contiguous()
    longest, longest_key = (max_seqlen, max_seqlen) if packed else (length, keys)
    programs = _sequences(query, cu_seqlens) * heads
    eight = _eight(grad_out, query, key, value, out)
    tensors = _strided(eight, grad_out, query, key, value)
    sizes = (key_lengths, cu_seqlens, scale, heads, length, keys)
    width, rest = blocks(head_dim)

    def launch(kernel: Any, grid: int, tile: Tiles, *args: Any) -> None:
        if grid:
            kernel[(grid,)](
                *tensors, *args, HEAD_DIM=head_dim, WIDTH=width, REST=rest, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                CAUSAL=is_causal, EIGHT=eight, num_warps=tile.warps,
                num_stages=tile.stages, **FUSION,
            )  # fmt: skip

    half = statistics.stride(0)
    with on(query):
        if _is_whole(longest_key, head_dim, query.dtype):
            tile = configuration("whole", longest, longest_key, head_dim, query.dtype)
            launch(
                backward_kernels.whole_gradient_kernel, programs, tile, statistics, grad_query, grad_key, grad_value,
                *scores, *sizes, half, num_prefix_tokens,
            )  # fmt: skip
            return grad_query, grad_key, grad_value
        delta = torch.empty_like(statistics[0])
        tile = configuration("query", longest, longest_key, head_dim, query.dtype)
        tiles = triton.cdiv(longest, tile.block_m)
        launch(
            backward_kernels.query_gradient_kernel, programs * tiles, tile, *_strided(eight, out), statistics, delta,
            grad_query, *scores, class_row, *sizes, tiles, half, num_prefix_tokens,
        )  # fmt: skip
        tile = configuration("key", longest, longest_key, head_dim, query.dtype)
        tiles = triton.cdiv(longest_key, tile.block_n)
        launch(
            backward_kernels.key_gradient_kernel, programs * tiles, tile, statistics, delta, grad_key, grad_value,
            *scores, *sizes, tiles, half, num_prefix_tokens,
        )  # fmt: skip
    return grad_query, grad_key, grad_value


def class_scores(
    query: Tensor, key: Tensor, scale: float, num_prefix_tokens: int, key_lengths: Tensor | None,
    cu_seqlens: Tensor | None, max_seqlen: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the reference; float64 and heads of more than 256 channels go there."""
    if not _takes(query):
        return reference.class_scores(query, key, scale, num_prefix_tokens, key_lengths, cu_seqlens, max_seqlen)
    batch, heads, length, head_dim = key.shape
    sequences = _sequences(query, cu_seqlens)
    class_row = query.new_empty(batch, heads, length, dtype=torch.float32)
    statistics = query.new_empty(2, sequences, heads, dtype=torch.float32)
    eight = _eight(query, key)
    if sequences * heads * length:
        with on(query):
            kernels.class_logits_kernel[(sequences * heads,)](
                *_strided(eight, query, key), class_row, statistics, key_lengths, cu_seqlens, scale,
                heads, length, statistics.stride(0), HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim),
                BLOCK_N=_class_block(head_dim), EIGHT=eight, num_warps=4, num_stages=2, **FUSION,
            )  # fmt: skip
    strides = (heads, 1, 0)
    return _scores(class_row, statistics, strides, num_prefix_tokens, key_lengths, cu_seqlens, max_seqlen), class_row


def _class_block(head_dim: int) -> int:
    """Keys that one step of a class token's kernel reads: 8 KiB of float32 in registers."""
    return max(16, min(128, 2048 // triton.next_power_of_2(head_dim)))


def class_scores_backward(
    grad_scores: Tensor, query: Tensor, key: Tensor, class_row: Tensor, scale: float, num_prefix_tokens: int,
    cu_seqlens: Tensor | None, max_seqlen: int, grad_query: Tensor, grad_key: Tensor,
) -> None:  # fmt: skip
    """As the reference, rounding once; float64 and heads of more than 256 channels go there."""
    if not _takes(query) or class_row.dtype == torch.float64:
        reference.class_scores_backward(
            grad_scores, query, key, class_row, scale, num_prefix_tokens, cu_seqlens, max_seqlen, grad_query, grad_key
        )
        return
    _, heads, length, head_dim = key.shape
    eight = _eight(query, key, grad_query, grad_key)
    sequences = _sequences(query, cu_seqlens)
    if sequences * heads * length:
        with on(query):
            backward_kernels.class_gradient_kernel[(sequences * heads,)](
                grad_scores, *grad_scores.stride(), *_strided(eight, query, key), class_row.contiguous(),
                *_strided(eight, grad_query, grad_key), cu_seqlens, scale, heads, length,
                num_prefix_tokens, HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim),
                BLOCK_N=_class_block(head_dim), EIGHT=eight, num_warps=4,
                num_stages=2, **FUSION,
            )  # fmt: skip
