"""How the n x N logits are cut into tiles, so that no more than a given workspace is ever held."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

SMALLEST_SIDE = 16
TILE_COPIES = 3
"""Tiles of one shape that the references hold at a time: logits, probabilities and one intermediate."""
OPERAND_COPIES = 2
"""Copies of a tile's rows of features: widened to float32, and one intermediate."""


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


def spans(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover `length`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def positives(rows: slice, columns: slice, offset: int) -> tuple[int, slice]:
    """Which diagonal of a tile holds positives, those at (i, offset + i), and their rows i, maybe none."""
    first = max(rows.start, columns.start - offset)
    last = min(rows.stop, columns.stop - offset)
    return offset + rows.start - columns.start, slice(first, max(first, last))
