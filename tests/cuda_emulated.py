"""CUDA kernels of a family on the CPU: their own source, compiled by g++ with the stand-ins in `cuda_emulation/`."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import xray_kernels  # noqa: F401  # defines the ops whose schemas are taken

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "xray_emulated"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SetGpu = Callable[[int, int], None]
"""Takes a number of processors and an order of threads."""


def cuda_include() -> Path | None:
    """The headers of the CUDA toolkit, as setup.py finds them."""
    nvcc = shutil.which("nvcc")
    homes = (os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda")
    return next((Path(h, "include") for h in homes if h and Path(h, "include/cuda_fp16.h").exists()), None)


@contextmanager
def emulating(kernels: ctypes.CDLL) -> Iterator[SetGpu]:
    """Uninitialised tensors are filled with NaN; yields what sets the GPU, which has four processors at first."""
    torch.use_deterministic_algorithms(True)
    try:
        kernels.set_emulated_gpu(4, 0)
        yield kernels.set_emulated_gpu
    finally:
        torch.use_deterministic_algorithms(False)


def load(family: str, ops: list[str], folder: Path) -> tuple[torch.library.Library, ctypes.CDLL]:
    """Compile `cuda_emulation/<family>.cpp`, loaded as ops `xray_emulated::*` with the schemas of `xray_kernels::*`.

    Returns their library, and the binary, whose `set_emulated_gpu` is a `SetGpu`.
    """
    include = cuda_include()
    if include is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and the headers of a CUDA toolkit")
    file = folder / f"{family}.so"
    folders = [ROOT / "tests/cuda_emulation", ROOT / "csrc", include, *cpp_extension.include_paths()]
    libraries = Path(torch.__file__).parent / "lib"
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-class-memaccess"]
    # a misaligned vector, an index past an array or an overflow ends the process
    command += ["-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{folder}" for folder in folders)]
    command += [str(ROOT / f"tests/cuda_emulation/{family}.cpp"), "-o", str(file)]
    command += [f"-L{libraries}", "-ltorch", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for op in ops:
        schema = getattr(torch.ops.xray_kernels, op).default._schema
        library.define(str(schema).split("::", 1)[1])
    torch.ops.load_library(file)
    kernels = ctypes.CDLL(str(file))
    kernels.library = library  # type: ignore[attr-defined]  # the definitions live as long as the kernels
    return library, kernels
