"""Input checks shared by the public functions: one sentence with the argument, what it got and what it needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(name: str, value: Any, *, layout: str) -> None:
    """`value` must be a tensor with as many dimensions as `layout` names, such as "(B, N, C)"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, got {type(value).__name__}")
    dims = 0 if layout == "()" else layout.count(",") + (not layout.endswith(",)"))
    if value.dim() != dims:
        raise ValueError(f"{name} must have shape {layout}, got {tuple(value.shape)}")


def check_float(name: str, value: Tensor) -> None:
    """`value` must be floating: float32, float16, bfloat16 (float64 for checking gradients)."""
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")


def check_same(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """`value` must lie on the device of `other` and, unless told otherwise, have its dtype."""
    if value.device != other.device:
        raise RuntimeError(f"{name} is on {value.device} but {other_name} is on {other.device}; move one of them")
    if dtype and value.dtype != other.dtype:
        raise TypeError(f"{name} is {value.dtype} but {other_name} is {other.dtype}; they must have one dtype")


def check_shape(name: str, value: Tensor, expected: tuple[int, ...], reason: str) -> None:
    """`value` must have exactly the shape `expected`; `reason` says where that shape comes from."""
    if value.shape != torch.Size(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)} ({reason}), got {tuple(value.shape)}")


def check_int(name: str, value: Any, low: int, high: int | None, meaning: str) -> None:
    """`value` must be an integer in [low, high]; `meaning` says what bounds it."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name} must be at least {low}{upper} ({meaning}), got {value}")
