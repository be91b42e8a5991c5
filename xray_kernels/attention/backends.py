"""Attention by other libraries: PyTorch's SDPA, flash-attn, xformers; used when asked for or measured fastest.

Each takes and returns (B, H, N, D). The packages are imported at their first use, and are not needed otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xray_kernels import _library

BACKENDS = ("xray", "sdpa", "flash_attn", "xformers")


def choose(asked: str, name: str, query: Tensor) -> str:
    """The backend of a call: what was asked for, else what was measured fastest on this device, else this project's.

    Args:
        asked: one of `BACKENDS`, or "auto".
        name: the function that is called, as result files name it.
        query: its first argument.

    Raises:
        ValueError: `asked` is no backend.
        RuntimeError: its package is not installed, or it does not run on the device of `query`.
    """
    if asked not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}, got {asked!r}")
    kind = query.device.type
    if asked == "auto":
        return _fastest(name, kind, query.device.index, query.dtype)
    missing = _missing(asked)
    if missing:
        raise RuntimeError(f"backend {asked!r} needs {missing}, which is not installed; 'sdpa' and 'xray' always are")
    if asked == "flash_attn" and kind != "cuda":
        raise RuntimeError(f"backend 'flash_attn' runs on CUDA devices, but query is on {query.device}")
    return asked


def _fastest(name: str, kind: str, index: int | None, dtype: torch.dtype) -> str:
    if not _library.is_free() or kind not in ("cpu", "cuda"):
        return "xray"
    if kind == "cuda":
        measured = _library.fastest(name, dtype, torch.cuda.get_device_name(index))
        if measured in BACKENDS and _missing(measured) is None:
            return measured
    return "xray" if dtype == torch.float64 or _library.has_kernel(name, kind, index, dtype) else "sdpa"


# torch.compiler.assume_constant_result does this, and imports the compiler, which takes longer than all the rest
_fastest._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _missing(backend: str) -> str | None:
    """The package that a backend lacks here, or None."""
    if backend in ("xray", "sdpa"):
        return None
    return None if importlib.util.find_spec(backend) else backend.replace("_", "-")


def attention(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    is_causal: bool,
    key_lengths: Tensor | None,
) -> Tensor:
    """softmax(scale * query key^T) value by one of the backends but "xray"; in the dtype of its arguments, whatever
    `torch.autocast` the caller is in.

    Raises:
        ValueError: the backend can not do what is asked; the message says what can.
    """
    with torch.autocast(query.device.type, enabled=False):
        if backend == "sdpa":
            return _sdpa(query, key, value, scale, is_causal, key_lengths)
        return _package(backend, query, key, value, scale, is_causal, key_lengths)


def _package(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    is_causal: bool,
    key_lengths: Tensor | None,
) -> Tensor:
    if key_lengths is not None:
        raise ValueError(f"backend {backend!r} does not take key_lengths; 'xray' and 'sdpa' do")
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"backend {backend!r} counts causal positions from the last key, so with is_causal it needs as many queries"
            f" as keys, got {query.shape[2]} and {key.shape[2]}; 'xray' and 'sdpa' count from the first"
        )
    if backend == "flash_attn" and query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"backend 'flash_attn' takes float16 and bfloat16, got {query.dtype}")
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    library: Any = importlib.import_module("flash_attn" if backend == "flash_attn" else "xformers.ops")
    if backend == "flash_attn":
        out = library.flash_attn_func(query, key, value, softmax_scale=scale, causal=is_causal)
    else:
        bias = library.LowerTriangularMask() if is_causal else None
        out = library.memory_efficient_attention(query, key, value, attn_bias=bias, scale=scale)
    return out.transpose(1, 2)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, key_lengths: Tensor | None
) -> Tensor:
    if key_lengths is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    column = torch.arange(key.shape[2], device=key.device)
    lengths = key_lengths[:, None, None, None]
    # a row without keys, which would be NaN with a NaN gradient, looks at all of them and is then put to zero
    allowed = (column < lengths) | (lengths <= 0)
    if is_causal:
        allowed = allowed & (column <= torch.arange(query.shape[2], device=key.device)[:, None])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale)
    return out.where(lengths > 0, 0.0)
