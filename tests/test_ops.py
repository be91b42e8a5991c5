"""The op contract, once for every op: op x implementation x dtype x case.

Each check runs on every sample input of every op family's spec. What is particular to one op stands in its own file.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xray.ops
import xray_kernels
from xray_kernels import _library, testing
from xray_kernels.testing import Case, Inputs, OpSpec

CPU = torch.device("cpu")
FAMILIES = [module.name for module in pkgutil.iter_modules(xray_kernels.__path__) if module.ispkg]
SPECS: list[OpSpec] = [
    spec for family in FAMILIES for spec in importlib.import_module(f"xray_kernels.{family}.spec").SPECS
]
OP_CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS for case in spec.cases]
FIRST_CASES = [pytest.param(spec, spec.cases[0], id=spec.name) for spec in SPECS]
SMALL_CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS for case in spec.cases[:3]]


def make(case: Case, dtype: torch.dtype) -> Inputs:
    return case.make(dtype, CPU, torch.Generator().manual_seed(0))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every uninitialised tensor is filled with NaN, so an element that a kernel forgot to write is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Recorder(TorchDispatchMode):
    """Collects the calls of this package's own ops, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == _library.NAMESPACE:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "case"), OP_CASES)
def test_outputs_and_gradients_within_rule(spec: OpSpec, case: Case, dtype: torch.dtype, poisoned: None) -> None:
    if dtype not in spec.dtypes:
        pytest.skip(f"{spec.name} does not take {dtype}")
    inputs = make(case, dtype)
    oracle = testing.results(spec.composition, testing.convert(inputs, torch.float64))
    yardstick = testing.results(spec.composition, inputs)
    for name in testing.implementations("cpu"):
        with testing.use_implementation(name):
            actual = testing.results(spec.function, inputs)
        testing.assert_within_rule(actual, yardstick, oracle, what=f"{spec.name} [{name}] {case.name} {dtype}")


@pytest.mark.parametrize(("spec", "case"), OP_CASES)
def test_strides_do_not_matter(spec: OpSpec, case: Case) -> None:
    """The rule holds as well for transposed storage with gaps between rows."""
    inputs = make(case, torch.float32)
    oracle, yardstick = (
        testing.results(spec.composition, testing.convert(inputs, torch.float64)),
        testing.results(spec.composition, inputs),
    )
    strided = {
        name: spread(value) if isinstance(value, Tensor) and value.dim() >= 2 else value
        for name, value in inputs.items()
    }
    for name in testing.implementations("cpu"):
        with testing.use_implementation(name):
            actual = testing.results(spec.function, strided)
        testing.assert_within_rule(actual, yardstick, oracle, what=f"{spec.name} [{name}] {case.name} strided")


def spread(value: Tensor) -> Tensor:
    """The same values in a buffer whose last two dimensions are swapped and whose rows have gaps."""
    shape = list(value.transpose(-2, -1).shape)
    shape[-1] += 3
    return value.new_zeros(shape)[..., : value.shape[-2]].transpose(-2, -1).copy_(value)


@pytest.mark.parametrize(("spec", "case"), FIRST_CASES)
def test_two_runs_are_bit_equal(spec: OpSpec, case: Case) -> None:
    inputs = make(case, torch.float32)
    for name in testing.implementations("cpu"):
        with testing.use_implementation(name):
            first, second = testing.results(spec.function, inputs), testing.results(spec.function, inputs)
        assert all(torch.equal(first[key], second[key]) for key in first), name


@pytest.mark.parametrize(("spec", "case"), SMALL_CASES)
def test_opcheck(spec: OpSpec, case: Case) -> None:
    """Schema, autograd registration, fake tensors and traced gradients of every op that the function calls."""
    with Recorder() as recorder:
        testing.results(spec.function, make(case, torch.float32))
    assert recorder.calls, f"{spec.name} calls no op of this package"
    for op, args in recorder.calls:
        is_backward = op._schema.name.endswith("_backward")
        args = tuple(
            arg.detach().requires_grad_(not is_backward) if isinstance(arg, Tensor) and arg.is_floating_point() else arg
            for arg in args
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.library.opcheck(op, args)


@pytest.mark.parametrize(("spec", "case"), FIRST_CASES)
def test_compiles_into_one_graph(spec: OpSpec, case: Case) -> None:
    """`torch.compile(fullgraph=True)` gives the eager outputs and gradients."""
    inputs = make(case, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lambda kwargs: spec.function(**kwargs), fullgraph=True, backend="aot_eager")
    outputs, grads = testing.run(lambda **kwargs: compiled(kwargs), inputs)
    expected_outputs, expected_grads = testing.run(spec.function, inputs)
    for actual, expected in ((outputs, expected_outputs), (grads, expected_grads)):
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("spec", "case"), FIRST_CASES)
def test_meta_tensors_give_shapes(spec: OpSpec, case: Case) -> None:
    inputs = make(case, torch.float32)
    meta = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in inputs.items()}
    expected, actual = spec.function(**inputs), spec.function(**meta)
    pairs = zip(expected, actual, strict=True) if isinstance(expected, tuple) else [(expected, actual)]
    for real, fake in pairs:
        assert (fake.device.type, fake.shape, fake.dtype) == ("meta", real.shape, real.dtype)
        assert [s for s, n in zip(fake.stride(), real.shape, strict=True) if n > 1] == [
            s for s, n in zip(real.stride(), real.shape, strict=True) if n > 1
        ]


@pytest.mark.parametrize(("spec", "case"), FIRST_CASES)
def test_double_backward_is_refused(spec: OpSpec, case: Case) -> None:
    """A second derivative that is not there is an error, never a silent zero."""
    inputs = make(case, torch.float64)
    leaves = {
        name: value.requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    result = spec.function(**inputs)
    outputs = [out for out in (result if isinstance(result, tuple) else (result,)) if out.requires_grad]
    total = torch.stack([(out**2).sum() for out in outputs]).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), create_graph=True, allow_unused=True)
    used = [grad for grad in grads if grad is not None and grad.grad_fn is not None]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad([(grad**2).sum() for grad in used], list(leaves.values()), allow_unused=True)


def test_facade_is_the_kernel_library() -> None:
    """`xray.ops` re-exports `xray_kernels` and nothing else, and every public op has a spec; following tokens is
    indexing, not an op."""
    assert xray.ops.__all__ == sorted(xray.ops.__all__) == xray_kernels.__all__
    for name in xray.ops.__all__:
        assert getattr(xray.ops, name) is getattr(xray_kernels, name)
    functions = {name for name in xray.ops.__all__ if name.islower()}
    assert functions - {"gather_tokens", "token_map"} == {spec.name for spec in SPECS}
