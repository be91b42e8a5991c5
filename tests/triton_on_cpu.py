"""Triton's interpreter in place of the CPU's kernels; for the files that run with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from xray_kernels import _library


@contextmanager
def interpreted(ops: Sequence[str]) -> Iterator[None]:
    """The Triton functions stand at the CPU key, and every uninitialised element is NaN."""
    library = torch.library.Library(_library.NAMESPACE, "IMPL")
    for op in ops:
        _library.override(library, op, _library.cuda_function(op, "triton"), "CPU")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    library._destroy()
