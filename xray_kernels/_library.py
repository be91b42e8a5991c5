"""The one `torch.library.Library` of this package, and the rule by which an implementation is chosen.

PyTorch's dispatcher is the only dispatcher. An op is defined here once: its schema, its pure PyTorch reference for
every device, its shapes for tracing, its gradient. Compiled implementations register for one device key when their
library is loaded and so take the reference's place there.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

NAMESPACE = "xray_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
CHOICES = ("auto", "reference", "cpu", "triton", "cuda")

REFERENCES: dict[str, Callable[..., Any]] = {}
"""All ops defined so far, in order: name -> pure PyTorch reference."""
LOADED: dict[str, Path] = {}
"""Compiled op libraries that are in use: name -> file."""
FAILED: dict[str, str] = {}
"""Compiled op libraries that are not in use: name -> why."""


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Define one op of the package and return its overload, ready to call.

    Args:
        schema: `name(Tensor a, ...) -> ...` without the namespace.
        reference: what the op means, in PyTorch; runs on every device that has no kernel of its own.
        fake: allocates the outputs for given inputs and computes nothing; used for tracing.
        backward: `backward(ctx, *grads)`, a gradient for each input. None makes a second derivative a clear error
            (this is how backward ops are declared).
        setup_context: `setup_context(ctx, inputs, output)` for `backward`.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _without_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is None:

        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"{qualified} has no gradient: double backward is not supported by this op")

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    REFERENCES[name] = _without_autocast(reference)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference decides its own precision, as a kernel does, whatever `torch.autocast` the caller is in."""

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return reference(*args)

    return run


def choice() -> str:
    """The implementation asked for by the environment variable `XRAY_KERNELS`; `auto` when it is not set."""
    asked = os.environ.get("XRAY_KERNELS", "") or "auto"
    if asked not in CHOICES:
        raise ValueError(f"XRAY_KERNELS is {asked!r}; it must be one of {', '.join(CHOICES)}")
    return asked


def compiled_file(name: str) -> Path | None:
    """The built shared library `name` (`_cpu`, `_cuda`) beside this package, or None when it was not built."""
    return next(iter(sorted(Path(__file__).parent.glob(f"{name}.*so"))), None)


def load_compiled() -> None:
    """Load the op libraries that were built and are wanted; record what is in use and what is not, and why."""
    asked = choice()
    if asked == "triton":
        raise RuntimeError("XRAY_KERNELS=triton needs Triton kernels, and this version has none; use auto or cuda")
    _load("_cpu", wanted=asked in ("auto", "cpu"), required=asked == "cpu")
    if torch.version.cuda is None:
        FAILED["_cuda"] = "this PyTorch is built without CUDA"
        if asked == "cuda":
            raise RuntimeError("XRAY_KERNELS=cuda needs a PyTorch built with CUDA; this one is built for the CPU only")
    else:
        _load("_cuda", wanted=asked == "cuda", required=asked == "cuda")


def _load(name: str, *, wanted: bool, required: bool) -> None:
    file = compiled_file(name)
    if file is None:
        FAILED[name] = "not built (pip install -e . builds it; XRAY_CUDA=1 asks for _cuda)"
    elif not wanted:
        FAILED[name] = f"built, not selected (XRAY_KERNELS={choice()})"
    else:
        try:
            torch.ops.load_library(str(file))
            LOADED[name] = file
        except OSError as error:
            FAILED[name] = str(error)
            if not required:
                warnings.warn(
                    f"{file.name} did not load, so the PyTorch reference is used instead: {error}",
                    stacklevel=2,
                )
    if required and name not in LOADED:
        raise RuntimeError(f"XRAY_KERNELS={choice()} needs {name}, which is not usable: {FAILED[name]}")


def implementation(name: str, device: str) -> str:
    """Which implementation of op `name` runs on `device` ("cpu" or "cuda"): "reference", "cpu" or "cuda"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    has_own = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
    return device if has_own else "reference"


CAPABILITIES = ("baseline", "avx2", "avx512")
"""Instruction sets for which CPU kernels are compiled, from the least to the most; the index is their level."""


def cpu_capabilities() -> list[str]:
    """The instruction sets that compiled CPU kernels can use on this machine; empty when `_cpu` is not loaded."""
    if "_cpu" not in LOADED:
        return []
    return list(CAPABILITIES[: torch.ops.xray_kernels.cpu_capability_available() + 1])


@contextlib.contextmanager
def cpu_capability(name: str) -> Iterator[None]:
    """Limit compiled CPU kernels to one instruction set inside the block; for tests and benches, not thread-safe."""
    if name not in cpu_capabilities():
        raise ValueError(f"capability must be one of {cpu_capabilities()}, got {name!r}")
    before = torch.ops.xray_kernels.cpu_capability_set(CAPABILITIES.index(name))
    try:
        yield
    finally:
        torch.ops.xray_kernels.cpu_capability_set(before)
