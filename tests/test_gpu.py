"""Parity of every op on a CUDA device, by the same rule and the same cases as on the CPU. `make gpu` runs it."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

import xray_kernels
from xray_kernels import testing
from xray_kernels.testing import Case, OpSpec

SPECS: list[OpSpec] = [
    spec
    for module in pkgutil.iter_modules(xray_kernels.__path__)
    if module.ispkg
    for spec in importlib.import_module(f"xray_kernels.{module.name}.spec").SPECS
]
OP_CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS for case in spec.cases]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "case"), OP_CASES)
def test_outputs_and_gradients_within_rule(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    if dtype not in spec.dtypes:
        pytest.skip(f"{spec.name} does not take {dtype}")
    inputs = case.make(dtype, torch.device("cuda"), torch.Generator().manual_seed(0))
    results = []
    for function, given in (
        (spec.composition, testing.convert(inputs, torch.float64)),
        (spec.composition, inputs),
        (spec.function, inputs),
    ):
        outputs, grads = testing.run(function, given)
        results.append({**outputs, **{f"grad_{name}": grad for name, grad in grads.items()}})
    oracle, yardstick, actual = results
    testing.assert_within_rule(actual, yardstick, oracle, what=f"{spec.name} {case.name} {dtype} on CUDA")
