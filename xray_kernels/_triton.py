"""What the launchers of Triton kernels share."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

FUSION: dict[str, Any] = {"enable_fp_fusion": True}
"""Products and sums may be one instruction; the default differs between versions of Triton."""


def on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device; this makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
