"""Memory that ends where the process does."""

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor


def before_a_guard(value: Any) -> Any:
    """The same tensor at the end of a page, before one that must not be touched: a read past it ends the process."""
    if not isinstance(value, Tensor):
        return value
    size, page = value.numel() * value.element_size(), mmap.PAGESIZE
    whole = -(-size // page) * page
    area = mmap.mmap(-1, whole + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area)) + whole
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), page, 0) == 0
    data = torch.frombuffer(area, dtype=torch.uint8, offset=whole - size, count=size)
    return data.view(value.dtype).view(value.shape).copy_(value)
