"""How the n x N logits are cut into tiles, so that no more than a given workspace is ever held."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

SMALLEST_SIDE = 16
TILE_COPIES = 4
"""Tiles of one shape that the references hold at a time: logits, probabilities and intermediates."""
OPERAND_COPIES = 2
"""Copies of a tile's rows of features: widened to float32, and one intermediate."""


TILES_SHARE, LEAST_TILES_BYTES = 8, 24 * 2**20
"""When logits are kept, one part in so many of the workspace is for tiles, or so much if that is more."""
KEPT_UNIT = 480
"""Kept rows are a multiple of this, unless all are kept, so that kernels need not cut their tiles."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _elements(rows: int, columns: int, width: int) -> int:
    return TILE_COPIES * rows * columns + OPERAND_COPIES * width * (rows + columns)


def smallest_workspace(rows: int, columns: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of the smallest tile worth computing, for rows x columns logits of features `width` wide."""
    side_rows, side_columns = min(rows, SMALLEST_SIDE), min(columns, SMALLEST_SIDE)
    return _elements(side_rows, side_columns, width) * wide_dtype(dtype).itemsize


def tile_shape(rows: int, columns: int, width: int, dtype: torch.dtype, max_bytes: int) -> tuple[int, int]:
    """The largest tile that fits `max_bytes`, square unless the logits are shorter or narrower than that."""
    budget, operand = max_bytes // wide_dtype(dtype).itemsize, OPERAND_COPIES * width
    # the side t of a square tile solves TILE_COPIES t^2 + 2 operand t = budget; a shorter side leaves room for
    # the other
    side = max((math.isqrt(operand**2 + TILE_COPIES * budget) - operand) // TILE_COPIES, 1)
    tall = min(rows, side)
    broad = max(min(columns, (budget - operand * tall) // (TILE_COPIES * tall + operand)), 1)
    tall = max(min(rows, (budget - operand * broad) // (TILE_COPIES * broad + operand)), 1)
    return tall, broad


def plan(rows: int, columns: int, width: int, dtype: torch.dtype, max_bytes: int, keep: bool) -> tuple[int, int]:
    """How many rows of logits a forward pass keeps for the backward, and the bytes that are left for tiles.

    A kept row is not computed again: with all rows kept, CLIP's loss costs 3 products instead of 4.
    """
    if not keep:
        return 0, max_bytes
    wide = wide_dtype(dtype)
    sums = 0 if wide == dtype else (rows + columns) * width * wide.itemsize  # of gradients, beside these themselves
    tiles = max(max_bytes // TILES_SHARE, LEAST_TILES_BYTES)
    kept = min(max(max_bytes - tiles - sums, 0) // (columns * wide.itemsize), rows)
    if kept < rows:
        kept = kept // KEPT_UNIT * KEPT_UNIT
    return kept, max_bytes - kept * columns * wide.itemsize


def spans(length: int, step: int, start: int = 0) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover [start, length)."""
    for first in range(start, length, step):
        yield slice(first, min(first + step, length))
