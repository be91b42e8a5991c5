"""The one `torch.library.Library` of this package, and the rule by which an implementation is chosen.

PyTorch's dispatcher is the only dispatcher. An op is defined here once: its schema, its pure PyTorch reference for
every device, its shapes for tracing, its gradient. Compiled implementations register for one device key when their
library is loaded and so take the reference's place there. On CUDA, where an op can have Triton and C++ kernels side by
side, a small function holds the key and passes the call on to what `select` says.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

NAMESPACE = "xray_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
CHOICES = ("auto", "reference", "cpu", "triton", "cuda")
FORCED: list[str] = []
"""Implementations that `testing.use_implementation` forces, the innermost last."""

REFERENCES: dict[str, Callable[..., Any]] = {}
"""All ops defined so far, in order: name -> pure PyTorch reference."""
TRITON: dict[str, str] = {}
"""Ops that have a Triton kernel: name -> module with a function of that name. Importing it imports Triton."""
CUDA_KERNELS: dict[str, Any] = {}
"""Ops that have a C++ kernel for CUDA in a loaded library: name -> that kernel."""
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
    triton: str | None = None,
) -> Any:
    """Define one op of the package and return its overload, ready to call.

    Args:
        schema: `name(Tensor a, ...) -> ...` without the namespace.
        reference: what the op means, in PyTorch; runs on every device that has no kernel of its own.
        fake: allocates the outputs for given inputs and computes nothing; used for tracing.
        backward: `backward(ctx, *grads)`, a gradient for each input. None makes a second derivative a clear error
            (this is how backward ops are declared).
        setup_context: `setup_context(ctx, inputs, output)` for `backward`.
        triton: name of a module that holds the op's Triton implementation, a function with the name and the arguments
            of the op, and `samples(name, dtype, device)`, small arguments to check it with. It is imported when a
            CUDA device needs it, not before.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _without_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is None:

        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"{qualified} has no gradient: double backward is not supported by this op")

    if "!" not in schema:  # an op that writes to its arguments has no gradient of its own
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    REFERENCES[name] = _without_autocast(reference)
    if triton is not None:
        TRITON[name] = triton
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


def is_free() -> bool:
    """Whether nobody asked for an implementation, so that the fastest may run."""
    return choice() == "auto" and not FORCED


def compiled_file(name: str) -> Path | None:
    """The built shared library `name` (`_cpu`, `_cuda`) beside this package, or None when it was not built."""
    return next(iter(sorted(Path(__file__).parent.glob(f"{name}.*so"))), None)


def load_compiled() -> None:
    """Load the op libraries that were built and are wanted; record what is in use and what is not, and why."""
    asked = choice()
    if asked in ("triton", "cuda") and torch.version.cuda is None:
        raise RuntimeError(f"XRAY_KERNELS={asked} needs a PyTorch built with CUDA; this one is built for the CPU only")
    if asked == "triton" and not has_triton():
        raise RuntimeError("XRAY_KERNELS=triton needs Triton, which is not installed: pip install triton")
    _load("_cpu", wanted=asked in ("auto", "cpu"), required=asked == "cpu", otherwise="the PyTorch reference is used")
    if torch.version.cuda is None:
        FAILED["_cuda"] = "this PyTorch is built without CUDA"
        return
    _load("_cuda", wanted=asked in ("auto", "cuda"), required=asked == "cuda", otherwise="its kernels are not used")
    if "_cuda" in LOADED:
        for name in REFERENCES:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CUDA"):
                CUDA_KERNELS[name] = torch.library.get_kernel(f"{NAMESPACE}::{name}", "CUDA")
    if asked in ("auto", "triton"):
        for name in REFERENCES:
            if len(available_on_cuda(name)) > 1:
                override(LIBRARY, name, choose_on_cuda(name), "CUDA")


def _load(name: str, *, wanted: bool, required: bool, otherwise: str) -> None:
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
                warnings.warn(f"{file.name} did not load, so {otherwise} instead: {error}", stacklevel=2)
    if required and name not in LOADED:
        raise RuntimeError(f"XRAY_KERNELS={choice()} needs {name}, which is not usable: {FAILED[name]}")


def override(library: torch.library.Library, name: str, function: Callable[..., Any], key: str) -> None:
    """Register `function(keyset, *args)` for a key that may have a kernel, which comes back when `library` goes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        library.impl(name, function, key, with_keyset=True, allow_override=True)


def has_triton() -> bool:
    """Whether Triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


def available_on_cuda(name: str) -> list[str]:
    """The implementations that op `name` has for CUDA here, the reference first."""
    return [
        "reference",
        *(["triton"] if name in TRITON and has_triton() else []),
        *(["cuda"] if name in CUDA_KERNELS else []),
    ]


def select(asked: str, measured: str | None, available: Collection[str]) -> str:
    """The implementation of one op on CUDA: what was asked for, else what was measured fastest, else Triton.

    Args:
        asked: the value of `XRAY_KERNELS`.
        measured: the fastest in the result files of this device, None where there is none.
        available: what the op has; the reference stands in for what it lacks.
    """
    if asked != "auto":
        return asked if asked in available else "reference"
    if measured is not None and measured in available:
        return measured
    return "triton" if "triton" in available else "reference"


@functools.cache
def measured_table() -> dict[str, dict[str, dict[str, str]]]:
    """Device name -> op -> dtype -> the fastest implementation; `python -m bench.table` writes it from result files."""
    return json.loads((Path(__file__).parent / "measured.json").read_text(encoding="utf-8"))


def fastest(name: str, dtype: torch.dtype, device_name: str) -> str | None:
    """The fastest implementation of an op by the committed results of a device, None where there are none."""
    return measured_table().get(device_name, {}).get(name, {}).get(str(dtype).removeprefix("torch."))


def cuda_function(name: str, chosen: str) -> Callable[..., Any]:
    """An implementation of op `name` as `function(keyset, *args)`; the reference where the op lacks it."""
    if chosen == "cuda" and name in CUDA_KERNELS:
        return CUDA_KERNELS[name].call_boxed
    function = REFERENCES[name]
    if chosen == "triton" and name in TRITON:
        function = _without_autocast(getattr(importlib.import_module(TRITON[name]), name))
    return lambda keyset, *args: function(*args)


_DECIDED: dict[tuple[str, torch.dtype, int | None], tuple[str, Callable[..., Any]]] = {}
_DECIDING = threading.Lock()


def choose_on_cuda(name: str) -> Callable[..., Any]:
    """What stands at the CUDA key of op `name`: decides once for each dtype and device, then passes calls on."""

    def run(keyset: Any, *args: Any) -> Any:
        dtype, device = args[0].dtype, args[0].device
        decided = _DECIDED.get((name, dtype, device.index))
        if decided is None:
            with _DECIDING:
                decided = _DECIDED.get((name, dtype, device.index)) or _decide(name, dtype, device)
        return decided[1](keyset, *args)

    return run


def _decide(name: str, dtype: torch.dtype, device: torch.device) -> tuple[str, Callable[..., Any]]:
    """The implementation for a dtype and device; one that was not measured here is first compared with the reference.

    Comparing waits for the device, which a CUDA graph that is being captured does not allow: such a call gets the
    reference, and the next one decides.
    """
    asked, measured = choice(), fastest(name, dtype, torch.cuda.get_device_name(device))
    chosen = select(asked, measured, available_on_cuda(name))
    if chosen == "triton" and asked == "auto" and measured != "triton" and dtype != torch.float64:
        if torch.cuda.is_current_stream_capturing():
            return "reference", cuda_function(name, "reference")
        chosen = checked(name, dtype, device)
    _DECIDED[name, dtype, device.index] = chosen, cuda_function(name, chosen)
    return _DECIDED[name, dtype, device.index]


def checked(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """ "triton" when it agrees with the reference on small samples; otherwise "reference", and a warning says why."""
    try:
        module = importlib.import_module(TRITON[name])
        disagreement = next(
            (
                found
                for args in module.samples(name, dtype, device)
                if (found := compare(getattr(module, name), args, REFERENCES[name]))
            ),
            None,
        )
    except Exception as error:  # whatever goes wrong in a compiler or a driver, the reference is there
        disagreement = f"{type(error).__name__}: {error}"
    if disagreement is None:
        return "triton"
    warnings.warn(
        f"the Triton kernel of {name} is not used for {dtype} on {device}, where it failed its check against the"
        f" PyTorch reference, which is used instead and is slower: {disagreement}",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"


def results(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call on copies of `args` returns; of an op that returns nothing, its tensors after it wrote to them."""
    copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    returned = function(*copies)
    if isinstance(returned, torch.Tensor):
        return (returned,)
    return returned if returned is not None else tuple(copy for copy in copies if isinstance(copy, torch.Tensor))


def compare(function: Callable[..., Any], args: tuple[Any, ...], reference: Callable[..., Any]) -> str | None:
    """How results differ from the reference's in float64 by more than rounding; None when they do not."""
    wide = [arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args]
    pairs = zip(results(function, args), results(reference, tuple(wide)), strict=True)
    for number, (got, truth) in enumerate(pairs):
        if got.shape != truth.shape:
            return f"output {number} has shape {tuple(got.shape)}, the reference's has {tuple(truth.shape)}"
        if not got.is_floating_point():
            if not torch.equal(got, truth):
                return f"output {number}, {got.dtype}, differs"
            continue
        differs = got.double() != truth  # infinities that are equal do not, NaN does
        error = _largest(got.double() - truth, differs)
        allowed = (1e-4 + 4 * torch.finfo(got.dtype).eps) * max(1.0, _largest(truth, truth.isfinite()))
        if not error <= allowed:
            return f"output {number} differs by {error:.3g}, more than {allowed:.3g}"
    return None


def _largest(values: torch.Tensor, where: torch.Tensor) -> float:
    """The largest magnitude among some of the values, NaN if there is one, 0 if there are none."""
    chosen = values[where].abs()
    return float(chosen.amax()) if chosen.numel() else 0.0


@functools.cache
def _is_registered(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def has_kernel(name: str, device: str, index: int | None, dtype: torch.dtype) -> bool:
    """Whether op `name` has a kernel on a "cpu" or "cuda" device that is not known to be wrong; quick enough to ask at
    every call."""
    decided = _DECIDED.get((name, dtype, index))
    return _is_registered(name, device.upper()) and (decided is None or decided[0] != "reference")


def implementation(name: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """Which implementation of op `name` runs on `device` ("cpu" or "cuda"): "reference", "cpu", "triton" or "cuda".

    On CUDA an answer of "triton" holds until the first call, whose check may end with the reference.
    """
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
        return "reference"
    if device == "cpu":
        return "cpu"
    measured = None
    if torch.cuda.is_available():
        decided = _DECIDED.get((name, dtype, torch.cuda.current_device()))
        if decided is not None:
            return decided[0]
        measured = fastest(name, dtype, torch.cuda.get_device_name())
    return select(choice(), measured, available_on_cuda(name))


CAPABILITIES = ("baseline", "avx2", "avx512", "amx")
"""Instruction sets for which CPU kernels are compiled, from the least to the most; the index is their level. Kernels
without a form for AMX run as on AVX-512."""


def cpu_capabilities() -> list[str]:
    """The instruction sets that compiled CPU kernels can use on this machine; empty when `_cpu` is not loaded."""
    if "_cpu" not in LOADED:
        return []
    return list(CAPABILITIES[: torch.ops.xray_kernels.cpu_capability_available() + 1])


def check_tiles(samples: Callable[[str, torch.dtype, torch.device], Iterator[tuple[Any, ...]]], *ops: str) -> None:
    """Compare ops in bfloat16 with the reference on processors with AMX, whose kernels are proved by an emulation only.

    Where they disagree, the level below is used, and a warning says so. A few small samples, there only.
    """
    if "amx" not in cpu_capabilities():
        return
    for name in ops:
        function = getattr(getattr(torch.ops, NAMESPACE), name).default
        args = next(samples(name, torch.bfloat16, torch.device("cpu")))
        disagreement = compare(function, args, REFERENCES[name])
        if disagreement is not None:
            torch.ops.xray_kernels.cpu_capability_set(CAPABILITIES.index("avx512"))
            warnings.warn(
                f"the AMX kernel of {name} disagrees with the PyTorch reference on this processor, so AVX-512 is used"
                f" instead: {disagreement}",
                RuntimeWarning,
                stacklevel=2,
            )
            return


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
