"""What the Triton kernels compute, on CPU tensors by Triton's interpreter. `test_triton.py` runs this file.

It is a process of its own because TRITON_INTERPRET=1 must stand before Triton is imported. No bfloat16 here: the
interpreter stores it as integers and computes wrongly with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from triton_on_cpu import interpreted

from xray_kernels import _library, testing
from xray_kernels.testing import Case, Inputs, OpSpec
from xray_kernels.token_reorganize import reference, triton
from xray_kernels.token_reorganize.spec import SPECS, compose, sample_inputs

CPU = torch.device("cpu")
OPS = [op for op, module in _library.TRITON.items() if module == triton.__name__]
LARGER = ("vit", "second layer", "video", "one long row")
"""Cases that differ from others by their size only, and so need one dtype: the interpreter is slow."""
OP_CASES = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{dtype}")
    for spec in SPECS
    for case in spec.cases
    for dtype in (torch.float32, torch.float16)
    if dtype == torch.float32 or case.name not in LARGER
]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with interpreted(OPS):
        yield


def small(spec: OpSpec) -> Case:
    return next(case for case in spec.cases if case.name == "no prefix")


def check(spec: OpSpec, inputs: Inputs, given: Inputs | None = None) -> None:
    oracle = testing.results(spec.composition, testing.convert(inputs, torch.float64))
    actual = testing.results(spec.function, inputs if given is None else given)
    testing.assert_within_rule(actual, testing.results(spec.composition, inputs), oracle, what=spec.name)


@pytest.mark.parametrize(("spec", "case", "dtype"), OP_CASES)
def test_outputs_and_gradients_within_rule(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    check(spec, case.make(dtype, CPU, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_strides_do_not_matter(spec: OpSpec) -> None:
    """Channels apart, samples inside, and one row for all: stride 0."""
    inputs = spec.cases[2].make(torch.float32, CPU, torch.Generator().manual_seed(0))
    first = "tokens" if "tokens" in inputs else "residual"
    inputs[first] = inputs[first][:, :, :1].expand(-1, -1, inputs[first].shape[2])
    inputs["scores"] = inputs["scores"][:1].expand(2, -1)
    spread = {k: v.mT.contiguous().mT if k == "update" else v for k, v in inputs.items()}
    check(spec, inputs, spread)


@pytest.mark.parametrize(
    ("length", "dtype"), [(200, torch.float32), (200, torch.float16), (700, torch.float32), (1500, torch.float32)]
)
def test_order_of_equal_and_special_scores(length: int, dtype: torch.dtype) -> None:
    """Every way of ranking gives the reference's order: few levels, both zeros, both infinities, NaN of both signs."""
    generator = torch.Generator().manual_seed(length)
    scores = torch.randint(-3, 3, (2, length - 1), generator=generator) / 4
    scores[:, ::7] = -0.0
    for step, value in ((11, float("inf")), (13, float("-inf")), (17, float("nan"))):
        scores[:, 1::step] = value
    scores[:, 5::19] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    scores, tokens = scores.to(dtype), torch.randn(2, length, 1, generator=generator).to(dtype)
    keep = length - 3
    out, indices = triton.reorganize_tokens(tokens, scores, keep, 1, False)
    wanted, order = reference.reorganize_tokens(tokens, scores, keep, 1, False)
    assert torch.equal(indices, order)
    assert torch.equal(out, wanted)


def test_video_length() -> None:
    """8,192 candidates with many equal scores, forward and backward."""
    inputs = sample_inputs(1, 8193, 5, 5734, (torch.float32, CPU, torch.Generator().manual_seed(0)))
    inputs["scores"] = (inputs["scores"] * 2**16).round() / 2**16
    assert inputs["scores"].unique().numel() < 1000
    check(SPECS[0], inputs)


def test_half_precision_scores() -> None:
    inputs = sample_inputs(2, 90, 24, 30, (torch.float16, CPU, torch.Generator().manual_seed(0)))
    check(SPECS[0], {**inputs, "scores": inputs["scores"].half()})


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^27 elements apart: the last ones lie past 2^31. Only the pages that are touched take memory."""
    torch.use_deterministic_algorithms(False)  # or the whole buffer would be filled
    step = 2**27 + 16
    tokens = torch.empty(17 * step + 8, dtype=torch.float16).as_strided((1, 18, 8), (0, step, 1))
    tokens.copy_(torch.randn(1, 18, 8, generator=torch.Generator().manual_seed(0)))
    scores = torch.linspace(0.5, 1, 17)[None].contiguous()
    inputs = {"tokens": tokens, "scores": scores, "num_keep": 9}
    wanted = testing.results(compose, {**inputs, "tokens": tokens.contiguous()})
    out, indices = triton.reorganize_tokens(tokens, scores, 9, 1, True)
    assert torch.equal(indices, wanted["out1"])
    assert torch.equal(out[:, :-1], wanted["out0"][:, :-1])
    torch.testing.assert_close(out, wanted["out0"], rtol=1e-2, atol=1e-2)
    grad_tokens, grad_scores = triton.reorganize_tokens_backward(out, tokens, scores, indices, 1, True)
    expected = reference.reorganize_tokens_backward(out, tokens, scores, indices, 1, True)
    torch.testing.assert_close((grad_tokens, grad_scores), expected, rtol=1e-2, atol=1e-2)


def test_gradients_asked_for_one_output_only() -> None:
    """The gradient of the other one arrives as zeros, and expanded ones as stride 0."""
    spec = SPECS[1]
    inputs = small(spec).make(torch.float32, CPU, torch.Generator().manual_seed(0))
    for number in (0, 1):
        results = []
        for function in (spec.function, spec.composition):
            residual = inputs["residual"].clone().requires_grad_()
            function(**{**inputs, "residual": residual})[number].sum().backward()
            results.append(residual.grad)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_two_runs_are_bit_equal(spec: OpSpec) -> None:
    inputs = small(spec).make(torch.float32, CPU, torch.Generator().manual_seed(0))
    first, second = testing.results(spec.function, inputs), testing.results(spec.function, inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["reorganize_tokens", "reorganize_tokens_backward"])
def test_first_use_check_passes(name: str) -> None:
    """The samples reach every way of ranking, and the kernels agree on them."""
    assert _library.checked(name, torch.float32, CPU) == "triton"


@pytest.mark.parametrize("name", ["add_reorganize_norm", "add_reorganize_norm_backward"])
def test_first_use_check_of_the_seam_passes_its_first_sample(name: str) -> None:
    args = next(triton.samples(name, torch.float32, CPU))
    assert _library.compare(getattr(triton, name), args, _library.REFERENCES[name]) is None


@pytest.mark.parametrize("name", OPS)
def test_what_the_kernels_do_not_take_goes_to_the_reference(name: str) -> None:
    for args in triton.samples(name, torch.float64, CPU):
        for got, wanted in zip(getattr(triton, name)(*args), getattr(reference, name)(*args), strict=True):
            assert torch.equal(got, wanted)
        break
