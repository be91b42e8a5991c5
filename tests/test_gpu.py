"""Parity of every op on a CUDA device, by the same rule and the same cases as on the CPU. `make gpu` runs it."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from dataclasses import replace
from typing import Any

import pytest
import test_cuda_emulation_attention as class_row
import torch
from torch import Tensor

import xray_kernels
from xray_kernels import _library, testing
from xray_kernels.attention import attention_with_scores
from xray_kernels.attention import spec as attention
from xray_kernels.testing import Case, Inputs, OpSpec
from xray_kernels.token_reorganize import spec as token_reorganize

SPECS: list[OpSpec] = [
    spec
    for module in pkgutil.iter_modules(xray_kernels.__path__)
    if module.ispkg
    for spec in importlib.import_module(f"xray_kernels.{module.name}.spec").SPECS
]
OP_CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS for case in spec.cases]
FIRST_CASES = [pytest.param(spec, spec.cases[0], id=spec.name) for spec in SPECS]
REORGANIZE = [pytest.param(spec, id=spec.name) for spec in token_reorganize.SPECS]
WITH_SCORES = next(spec for spec in SPECS if spec.name == "attention_with_scores")
ATTENTION = [pytest.param(spec, id=spec.name) for spec in attention.SPECS]
HALVES = [torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=testing.implementations("cuda"))
def implementation(request: pytest.FixtureRequest) -> Any:
    """Every implementation that some op has on this device, forced for all ops."""
    with testing.use_implementation(request.param):
        yield request.param


def make(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    return case.make(dtype, torch.device("cuda"), torch.Generator().manual_seed(0))


def check(spec: OpSpec, inputs: Inputs, given: Inputs, what: str) -> None:
    oracle = testing.results(spec.composition, testing.convert(inputs, torch.float64))
    yardstick = testing.results(spec.composition, inputs)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what a kernel forgot to write with NaN
    try:
        actual = testing.results(spec.function, given)
    finally:
        torch.use_deterministic_algorithms(False)
    testing.assert_within_rule(actual, yardstick, oracle, what=f"{spec.name} {what} on CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("spec", "case"), OP_CASES)
def test_outputs_and_gradients_within_rule(spec: OpSpec, case: Case, dtype: torch.dtype, implementation: str) -> None:
    if dtype not in spec.dtypes:
        pytest.skip(f"{spec.name} does not take {dtype}")
    inputs = make(case, dtype)
    check(spec, inputs, inputs, f"[{implementation}] {case.name} {dtype}")


@pytest.mark.parametrize(("spec", "case"), OP_CASES)
def test_strides_do_not_matter(spec: OpSpec, case: Case, implementation: str) -> None:
    inputs = make(case)
    strided = {
        name: value.mT.contiguous().mT if isinstance(value, Tensor) and value.dim() >= 2 else value
        for name, value in inputs.items()
    }
    check(spec, inputs, strided, f"[{implementation}] {case.name} strided")


@pytest.mark.parametrize(("spec", "case"), FIRST_CASES)
def test_two_runs_are_bit_equal(spec: OpSpec, case: Case, implementation: str) -> None:
    inputs = make(case)
    first, second = testing.results(spec.function, inputs), testing.results(spec.function, inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(2, 197, 768, 138), (2, 577, 1024, 404), (1, 1569, 768, 1098), (1, 8193, 64, 5734)])
@pytest.mark.parametrize("spec", REORGANIZE)
def test_real_shapes(spec: OpSpec, shape: tuple[int, int, int, int], dtype: torch.dtype, implementation: str) -> None:
    """Batch, tokens, channels and kept tokens of images and of clips, one of 8,192 candidates."""
    batch, length, channels, keep = shape
    case = token_reorganize._case(str(shape), batch, length, channels, keep)
    inputs = make(token_reorganize._seam(case) if spec.name == "add_reorganize_norm" else case, dtype)
    check(spec, inputs, inputs, f"[{implementation}] {shape} {dtype}")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    ("tokens", "head_dim"),
    [(72, 64), (77, 64), (100, 64), (140, 64), (197, 64), (257, 80), (577, 64), (1569, 64), (100, 256)],
)
@pytest.mark.parametrize("spec", ATTENTION[:2])
def test_attention_at_real_lengths(
    spec: OpSpec, tokens: int, head_dim: int, dtype: torch.dtype, implementation: str
) -> None:
    case = attention._case(f"{tokens} x {head_dim}", 2, 12, tokens, tokens, head_dim)
    inputs = make(case, dtype)
    check(spec, inputs, inputs, f"[{implementation}] {case.name} {dtype}")


@pytest.mark.parametrize("spec", ATTENTION)
def test_attention_replays_in_a_graph(spec: OpSpec, implementation: str) -> None:
    """Forward and backward captured once, replayed on other values in the same memory."""
    inputs = make(next((case for case in spec.cases if case.name == "vit"), spec.cases[0]), torch.float16)
    leaves = [value.requires_grad_() for name, value in inputs.items() if name in ("query", "key", "value")]

    def both_directions() -> list[Tensor]:
        result = spec.function(**inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both_directions()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_directions()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(leaf.flip(-1) / 2)
    graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(captured, both_directions(), strict=True))


@pytest.mark.parametrize("spec", REORGANIZE)
def test_replays_in_a_graph(spec: OpSpec, implementation: str) -> None:
    """Captured once, replayed on other values in the same memory."""
    inputs, others = make(spec.cases[0]), make(spec.cases[0])
    others["scores"].copy_(others["scores"].flip(1))
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            spec.function(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = spec.function(**inputs)
        wanted = spec.function(**others)
        inputs["scores"].copy_(others["scores"])
        graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(captured, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in WITH_SCORES.cases])
def test_scores_beside_another_attention(case: Case, dtype: torch.dtype, implementation: str) -> None:
    """The class token's row has ops of its own beside PyTorch's attention."""
    inputs = make(case, dtype)
    spec = replace(WITH_SCORES, function=functools.partial(attention_with_scores, backend="sdpa"))
    check(spec, inputs, inputs, f"[{implementation}] {case.name} {dtype} over sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(
    "lengths", [[1], [33], [1569], *class_row.PACKED.values()], ids=lambda lengths: str(lengths)[:30]
)
def test_class_scores(lengths: list[int], packed: bool, dtype: torch.dtype, implementation: str) -> None:
    """The ops by themselves, rows and packed sequences, by the cases that prove the CUDA kernels on the CPU."""
    length = max(1, sum(lengths))
    call = class_row.made(
        1 if packed else 3, 4, length, 64, dtype=dtype, packed=[*lengths, length - sum(lengths)] if packed else None
    )
    on_gpu = call.with_tensors(lambda x: x.cuda())
    actual, again = on_gpu.run(torch.ops.xray_kernels), on_gpu.run(torch.ops.xray_kernels)
    oracle = call.in_double().run(class_row.reference)
    testing.assert_within_rule(
        {name: value.cpu() for name, value in actual.items()}, call.compose(), oracle, what=f"{lengths} {dtype}"
    )
    assert all(torch.equal(actual[name], again[name]) for name in actual)


def test_class_scores_replay_in_a_graph(implementation: str) -> None:
    """Captured once, replayed on another query in the same memory."""
    call = class_row.made(2, 3, 577, 64).with_tensors(lambda x: x.cuda())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call.run(torch.ops.xray_kernels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run(torch.ops.xray_kernels)
    call.query.neg_()
    wanted = call.run(torch.ops.xray_kernels)
    graph.replay()
    assert all(torch.equal(captured[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", sorted(_library.TRITON))
def test_triton_passes_its_first_use_check(name: str, dtype: torch.dtype) -> None:
    if not _library.has_triton():
        pytest.skip("Triton is not installed")
    assert _library.checked(name, dtype, torch.device("cuda")) == "triton"


@pytest.mark.parametrize(("spec", "case"), FIRST_CASES)
def test_what_runs_by_default(spec: OpSpec, case: Case) -> None:
    """Nothing forced: the choice, with its first-use check, and the ops compiled by torch.compile on top of it."""
    inputs = make(case)
    check(spec, inputs, inputs, "by default")
    torch.compiler.reset()
    compiled = torch.compile(lambda kwargs: spec.function(**kwargs), fullgraph=True, backend="aot_eager")
    expected, actual = (
        testing.results(spec.function, inputs),
        testing.results(lambda **kwargs: compiled(kwargs), inputs),
    )
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-4)
