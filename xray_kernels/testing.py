"""How an op is proved: sample inputs, the float64 oracle, the tolerance rule, and forcing one implementation.

Tests and benches both read the `spec.py` of each op family, which is written in these terms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xray_kernels import _library

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One way to call an op. `make(dtype, device, generator)` returns its keyword arguments."""

    name: str
    make: Callable[[torch.dtype, torch.device, torch.Generator], Inputs]


@dataclass(frozen=True)
class OpSpec:
    """What tests and benches need to know of a public function.

    Attributes:
        name: the function's name in `xray.ops`.
        function: the function.
        composition: the same by plain differentiable PyTorch, written apart from the op's own code; in float64 it is
            the oracle, in the op's dtype the yardstick of the tolerance rule.
        cases: sample inputs; keep them small, they run in every dtype and implementation.
        traffic: least bytes moved by forward, backward for given inputs (each operand once).
        flops: floating-point operations of forward, backward for given inputs.
    """

    name: str
    function: Callable[..., Any]
    composition: Callable[..., Any]
    cases: tuple[Case, ...]
    traffic: Callable[[Inputs], tuple[int, int]]
    flops: Callable[[Inputs], tuple[int, int]]
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.float16, torch.bfloat16))


def randn(*shape: int, like: tuple[torch.dtype, torch.device, torch.Generator]) -> Tensor:
    """Standard normal values of a sample input, drawn in float64 so that all dtypes see the same numbers."""
    dtype, device, generator = like
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the elements of the tensors, each once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def convert(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same inputs with every floating tensor in `dtype`; exact when that is wider."""
    return {
        name: value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def run(function: Callable[..., Any], inputs: Inputs, *, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Call `function` and differentiate all its floating outputs along one random direction.

    Returns the outputs ("out0", "out1", ...) and the gradients of every floating input that takes part.
    """
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    result = function(**{**inputs, **leaves})
    outputs = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for output in outputs:
        direction = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        if output.requires_grad:
            pairs.append((output, direction.to(output.device, output.dtype)))
    grads: dict[str, Tensor] = {}
    if pairs and leaves:
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            list(leaves.values()),
            [direction for _, direction in pairs],
            allow_unused=True,
        )
        grads = {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        }
    return {f"out{i}": output.detach() for i, output in enumerate(outputs)}, grads


def results(function: Callable[..., Any], inputs: Inputs, *, seed: int = 0) -> dict[str, Tensor]:
    """What `run` returns in one dictionary, the gradient of input x as "grad_x"."""
    outputs, grads = run(function, inputs, seed=seed)
    return {**outputs, **{f"grad_{name}": grad for name, grad in grads.items()}}


def assert_within_rule(
    actual: dict[str, Tensor], yardstick: dict[str, Tensor], oracle: dict[str, Tensor], *, what: str
) -> None:
    """The tolerance rule: error against float64 at most twice that of plain PyTorch in the same dtype, plus 1e-5.

    Integer tensors must be equal, and non-finite values must stand in the same places as the oracle's.
    """
    assert actual.keys() == oracle.keys(), f"{what}: results {sorted(actual)} but the oracle has {sorted(oracle)}"
    for name, truth in oracle.items():
        got = actual[name]
        assert got.shape == truth.shape, f"{what} {name}: shape {tuple(got.shape)}, needs {tuple(truth.shape)}"
        if not got.is_floating_point():
            assert torch.equal(got, truth), f"{what} {name}: integer values differ"
            continue
        finite = truth.isfinite()
        assert torch.equal(got.isfinite(), finite), f"{what} {name}: finite values in other places than the oracle"
        error = (got.double() - truth.double())[finite].abs()
        allowed = 2 * (yardstick[name].double() - truth.double())[finite].abs()
        worst, bound = (float(e.max()) if e.numel() else 0.0 for e in (error, allowed))
        assert worst <= bound + 1e-5, f"{what} {name}: error {worst:.3g} over the bound {bound + 1e-5:.3g}"


def implementations(device: str = "cpu") -> list[str]:
    """The implementations this machine can run for some op on `device`, the reference first.

    Compiled CPU kernels come once for each instruction set that the machine has: "cpu-baseline", "cpu-avx2", ...
    """
    names = ["reference"]
    if device == "cpu" and "_cpu" in _library.LOADED:
        names += [f"cpu-{level}" for level in _library.cpu_capabilities()]
    if device == "cuda" and torch.cuda.is_available():
        here = {name for op in _library.REFERENCES for name in _library.available_on_cuda(op)}
        names += [name for name in ("triton", "cuda") if name in here]
    return names


@contextlib.contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Force one of `implementations()` for all ops inside the block: of both devices, or of the one that has it.

    The reference is forced everywhere. "triton" and "cuda" stand for the reference in ops that lack them.
    """
    if name.startswith("cpu-") and name in implementations("cpu"):
        with _library.cpu_capability(name.removeprefix("cpu-")):
            _library.FORCED.append(name)
            try:
                yield
            finally:
                _library.FORCED.pop()
        return
    if name not in implementations("cpu") + implementations("cuda") or name.startswith("cpu-"):
        known = dict.fromkeys(implementations("cpu") + implementations("cuda"))
        raise ValueError(f"implementation must be one of {', '.join(known)}, got {name!r}")
    library = torch.library.Library(_library.NAMESPACE, "IMPL")
    _library.FORCED.append(name)
    try:
        for op in _library.REFERENCES:
            if name == "reference" and _library.implementation(op, "cpu") != "reference":
                _library.override(library, op, _library.cuda_function(op, name), "CPU")
            if torch.cuda.is_available():
                _library.override(library, op, _library.cuda_function(op, name), "CUDA")
        yield
    finally:
        _library.FORCED.pop()
        library._destroy()
