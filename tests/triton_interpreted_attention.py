"""What the Triton kernels of attention compute, by Triton's interpreter; see `triton_interpreted.py` for the why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from xray_kernels import _library, testing
from xray_kernels.attention import triton
from xray_kernels.attention.spec import SPECS
from xray_kernels.testing import Case, Inputs, OpSpec

CPU = torch.device("cpu")
OPS = [op for op, module in _library.TRITON.items() if module == triton.__name__]
LARGER = ("vit", "after one reorganisation")
"""Cases of several tiles in half types, which small ones reach in float32: the interpreter is slow."""
OP_CASES = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{dtype}")
    for spec in SPECS
    for case in spec.cases
    for dtype in (torch.float32, torch.float16)
    if dtype == torch.float16 or case.name not in LARGER
]
BY_NAME = {f"{spec.name}: {case.name}": (spec, case) for spec in SPECS for case in spec.cases}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """The Triton functions stand at the CPU key, and every uninitialised element is NaN."""
    library = torch.library.Library(_library.NAMESPACE, "IMPL")
    for op in OPS:
        _library.override(library, op, _library.cuda_function(op, "triton"), "CPU")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    library._destroy()


def outcome(function: Any, inputs: Inputs) -> dict[str, Tensor]:
    outputs, grads = testing.run(function, inputs)
    return {**outputs, **{f"grad_{name}": grad for name, grad in grads.items()}}


def check(spec: OpSpec, inputs: Inputs, given: Inputs | None = None) -> None:
    oracle = outcome(spec.composition, testing.convert(inputs, torch.float64))
    actual = outcome(spec.function, {**(inputs if given is None else given), **BACKEND.get(spec.name, {})})
    testing.assert_within_rule(actual, outcome(spec.composition, inputs), oracle, what=spec.name)


BACKEND = {name: {"backend": "xray"} for name in ("attention", "attention_with_scores")}
"""Or a CPU without kernels of this family would choose PyTorch's."""


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return testing.randn(*shape, like=(dtype, CPU, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(("spec", "case", "dtype"), OP_CASES)
def test_outputs_and_gradients_within_rule(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    check(spec, case.make(dtype, CPU, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", ["attention: lengths", "attention_with_scores: lengths", "attention_varlen: causal"])
def test_strides_do_not_matter(name: str) -> None:
    """Channels apart, one projection's thirds, and one head for all: stride 0."""
    spec, case = BY_NAME[name]
    inputs = case.make(torch.float32, CPU, torch.Generator().manual_seed(0))
    heads = 1 if inputs["query"].dim() == 4 else 2
    inputs["value"] = inputs["value"].narrow(heads - 1 if heads == 2 else 1, 0, 1).expand_as(inputs["value"])
    spread = {
        **inputs,
        "query": inputs["query"].mT.contiguous().mT,
        "key": torch.stack([inputs["key"]] * 3, -2).select(-2, 1),
    }
    check(spec, inputs, spread)
