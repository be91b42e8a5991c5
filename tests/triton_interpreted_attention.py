"""What the Triton kernels of attention compute, by Triton's interpreter; see `triton_interpreted.py` for the why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_on_cpu import interpreted

from xray_kernels import _library, testing
from xray_kernels.attention import ops, reference, triton
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
    with interpreted(OPS):
        yield


def check(spec: OpSpec, inputs: Inputs, given: Inputs | None = None) -> None:
    oracle = testing.results(spec.composition, testing.convert(inputs, torch.float64))
    actual = testing.results(spec.function, {**(inputs if given is None else given), **BACKEND.get(spec.name, {})})
    testing.assert_within_rule(actual, testing.results(spec.composition, inputs), oracle, what=spec.name)


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


@pytest.mark.parametrize("head_dim", [48, 112])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_causal_rows_in_either_backward(head_dim: int, dtype: torch.dtype) -> None:
    """48 channels fit the kernel that makes all gradients of half types, 112 do not; both are padded."""
    spec, _ = BY_NAME["attention: causal rectangle"]
    for queries, keys in ((70, 35), (35, 70)):
        query = normal(1, 2, queries, head_dim, dtype=dtype)
        key, value = (normal(1, 2, keys, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
        check(spec, {"query": query, "key": key, "value": value, "is_causal": True})


def test_negative_scale() -> None:
    for dtype in (torch.float32, torch.float16):
        inputs = {"query": normal(1, 2, 40, 32, dtype=dtype), "key": normal(1, 2, 40, 32, dtype=dtype, seed=1)}
        check(SPECS[1], {**inputs, "value": normal(1, 2, 40, 32, dtype=dtype, seed=2), "scale": -0.3})


def test_statistics_and_rows_without_keys() -> None:
    query, key, value = (normal(2, 2, 9, 16, seed=seed) for seed in range(3))
    arguments = (query, key, value, 0.25, 1, torch.tensor([99, -1]), None, 9)
    out, scores, statistics, class_row = ops.attention_with_scores(*arguments)
    for got, wanted in zip(
        (out, scores, statistics, class_row), reference.attention_with_scores(*arguments), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(statistics[:, 1].unique(), torch.tensor([0, float("inf")]))
    grads = ops.attention_backward(
        normal(2, 2, 9, 16, seed=3), normal(2, 8, seed=4), query, key, value, out, statistics, class_row, 0.25, False,
        *arguments[5:], 1,
    )  # fmt: skip
    assert all(torch.equal(grad[1], torch.zeros_like(grad[1])) for grad in grads)


@pytest.mark.parametrize("name", ["attention_with_scores: lengths", "attention_varlen_with_scores: unequal clips"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_two_runs_are_bit_equal(name: str, dtype: torch.dtype) -> None:
    spec, case = BY_NAME[name]
    inputs = {**case.make(dtype, CPU, torch.Generator().manual_seed(0)), **BACKEND.get(spec.name, {})}
    first, second = testing.results(spec.function, inputs), testing.results(spec.function, inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_class_scores_for_another_backend(packed: bool, dtype: torch.dtype) -> None:
    """Its gradients are added in place, whatever the strides, to the class tokens' queries and to all keys."""
    batch, tokens = (1, 90) if packed else (2, 90)
    query, key = (normal(batch, 3, tokens, 24, dtype=dtype, seed=seed).mT.contiguous().mT for seed in (0, 1))
    bounds = torch.tensor([0, 0, 50, 51, 90], dtype=torch.int32) if packed else None
    lengths = None if packed else torch.tensor([90, 31])
    arguments = (query, key, 0.3, 2, lengths, bounds, 50 if packed else 90)
    scores, class_row = ops.class_scores(*arguments)
    wide = (query.double(), key.double(), *arguments[2:])
    for got, wanted in zip((scores, class_row), reference.class_scores(*wide), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    grad_scores = normal(*scores.shape[::-1], seed=2).mT
    before = normal(batch, tokens, 3, 24, dtype=dtype, seed=3).transpose(1, 2), normal(*key.shape, dtype=dtype, seed=4)
    actual, exact = tuple(x.clone() for x in before), tuple(x.double() for x in before)
    ops.class_scores_backward(grad_scores, query, key, class_row, 0.3, 2, *arguments[5:], *actual)
    reference.class_scores_backward(grad_scores.double(), *wide[:2], class_row.double(), 0.3, 2, *arguments[5:], *exact)
    for got, wanted, old in zip(actual, exact, before, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert not torch.equal(got, old)
    rows = torch.ones(tokens, dtype=torch.bool)
    rows[torch.tensor([0, 50, 51]) if packed else torch.tensor([0])] = False
    assert torch.equal(actual[0][:, :, rows], before[0][:, :, rows])


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^27 elements apart: the last ones lie past 2^31. Only the pages that are touched take memory."""
    torch.use_deterministic_algorithms(False)  # or the whole buffer would be filled
    step = 2**27 + 16
    far = torch.empty(17 * step + 16, dtype=torch.float16).as_strided((1, 1, 18, 16), (0, 0, step, 1))
    far.copy_(normal(1, 1, 18, 16))
    near = far.contiguous()
    grad = normal(1, 1, 18, 16, dtype=torch.float16, seed=1)
    found = []
    for x in (far, near):
        out, scores, statistics, class_row = triton.attention_with_scores(x, x, x, 0.25, 1, None, None, 18)
        rest = (None, None, 18, 1)
        grads = triton.attention_backward(grad, scores, x, x, x, out, statistics, class_row, 0.25, False, *rest)
        grad_query, grad_key = torch.zeros_like(grad), torch.zeros_like(grad)
        again = triton.class_scores(x, x, 0.25, 1, None, None, 18)
        triton.class_scores_backward(scores, x, x, class_row, 0.25, 1, None, 18, grad_query, grad_key)
        found.append([out, scores, statistics, class_row, *grads, *again, grad_query, grad_key])
    assert all(torch.equal(got, wanted) for got, wanted in zip(*found, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_first_use_check_passes(name: str) -> None:
    for dtype in (torch.float32, torch.float16):
        assert _library.checked(name, dtype, CPU) == "triton"


@pytest.mark.parametrize("name", OPS)
def test_what_the_kernels_do_not_take_goes_to_the_reference(name: str) -> None:
    """float64, and heads of more than 256 channels; both with the reference's bits."""
    args = next(triton.samples(name, torch.float64, CPU))
    results = [_library.results(getattr(module, name), args) for module in (triton, reference)]
    assert all(torch.equal(got, wanted) for got, wanted in zip(*results, strict=True))
    if name == "attention":
        wide: Any = (*(normal(1, 1, 3, 300, seed=seed) for seed in range(3)), 0.1, False, None, None, 3)
        assert torch.equal(triton.attention(*wide)[0], reference.attention(*wide)[0])


def test_tiles_follow_the_length() -> None:
    """What padding makes of the work at odd lengths of ViTs; and heads as blocks of columns."""
    for dtype in (torch.float32, torch.bfloat16):
        for length in (50, 72, 77, 100, 140, 197, 257, 577, 1025, 1569):
            for kernel in ("forward", "query", "key"):
                tile = triton.configuration(kernel, length, length, 64, dtype)
                padded = [-(-length // block) * block for block in (tile.block_m, tile.block_n)]
                assert padded[0] * padded[1] < (2.4 if length < 197 else 1.7) * length**2, (kernel, length, tile)
    assert [triton.blocks(d) for d in (8, 16, 64, 72, 80, 96, 112, 128, 256)] == [
        (16, 0), (16, 0), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0), (256, 0),
    ]  # fmt: skip
