"""The AVX-512 and AMX variants of CPU kernels on machines that lack them: their own source, compiled for AVX2.

Vectors of 16 lanes are split by the compiler, and tiles are emulated by their documented semantics (`cpu_emulation/`),
which end the process where hardware would fault. Scratch is NaN before it is written and ends before a guard page.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from xray_kernels import _library

ROOT = Path(__file__).resolve().parent.parent
AVX512, AMX = 2, 3
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LEVELS = [(AVX512, dtype) for dtype in DTYPES] + [(AMX, torch.bfloat16)]
"""What has kernels of its own."""
SetLevel = Callable[[int], None]
KINDS = ["emulated", *(["hardware"] if "avx512" in _library.cpu_capabilities() else [])]


def processor_flags() -> set[str]:
    file = Path("/proc/cpuinfo")
    return set(file.read_text().partition("\nflags")[2].partition("\n")[0].split()) if file.exists() else set()


def load(name: str, sources: tuple[str, ...], folder: Path) -> ctypes.CDLL:
    """Compile `csrc/<source>.cpp` for the emulation, loaded as ops of a namespace of their own."""
    if shutil.which("g++") is None or platform.machine() != "x86_64" or "avx2" not in processor_flags():
        pytest.skip("needs g++ and a processor with AVX2")
    namespace = f"xray_emulated_cpu_{name}"
    includes = [ROOT / "tests/cpu_emulation", ROOT / "csrc", *cpp_extension.include_paths()]
    command = ["g++", "-c", "-O1", "-std=c++17", "-fPIC", "-mavx2", "-mfma", "-mf16c", "-fvisibility=hidden"]
    command += ["-fexpensive-optimizations"]  # fuses multiplications and additions, as -O3 does
    command += ["-Wno-psabi", "-Wno-ignored-attributes", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-Dxray_kernels={namespace}", *(f"-I{include}" for include in includes)]

    def compile(source: Path) -> Path:
        to = folder / f"{source.parent.name}_{source.stem}.o"
        done = subprocess.run([*command, str(source), "-o", str(to)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return to

    files = [ROOT / f"csrc/{source}.cpp" for source in sources] + [ROOT / "tests/cpu_emulation/emulation.cpp"]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile, files))
    file, libraries = folder / f"{name}.so", Path(torch.__file__).parent / "lib"
    # its own new[] serves itself and nobody else
    command = ["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(file)]
    done = subprocess.run([*command, f"-L{libraries}", "-ltorch", "-ltorch_cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    definitions = torch.library.Library(namespace, "DEF")
    for op in _library.REFERENCES:
        definitions.define(str(getattr(torch.ops.xray_kernels, op).default._schema).split("::", 1)[1])
    torch.ops.load_library(file)
    loaded = ctypes.CDLL(str(file))
    loaded.emulated_products.restype = ctypes.c_int64
    loaded.definitions = definitions  # type: ignore[attr-defined]  # live as long as the library
    return loaded


@contextlib.contextmanager
def running(kind: str, library: Callable[[], ctypes.CDLL]) -> Iterator[SetLevel]:
    """The package's ops run on one of `KINDS`; call what comes with a level. Uninitialised tensors are NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        with on_hardware() if kind == "hardware" else emulated(library()) as set_level:
            yield set_level
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def emulated(library: ctypes.CDLL) -> Iterator[SetLevel]:
    namespace = library.definitions.ns  # type: ignore[attr-defined]
    overrides = torch.library.Library(_library.NAMESPACE, "IMPL")
    for name in _library.REFERENCES:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", "CPU"):
            op = getattr(getattr(torch.ops, namespace), name).default
            _library.override(overrides, name, lambda keyset, *args, op=op: op(*args), "CPU")
    try:
        yield library.set_emulated_capability
    finally:
        overrides._destroy()


@contextlib.contextmanager
def on_hardware() -> Iterator[SetLevel]:
    with contextlib.ExitStack() as stack:

        def set_level(level: int) -> None:
            if level >= len(_library.cpu_capabilities()):
                pytest.skip(f"this machine has no {_library.CAPABILITIES[level]}")
            stack.enter_context(_library.cpu_capability(_library.CAPABILITIES[level]))

        yield set_level
