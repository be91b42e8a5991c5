"""The CUDA kernels of token_reorganize on the CPU: their own source, compiled by g++, threads as fibers.

Where no GPU can prove them, their logic is proved: the bindings, the split of the work, selection, shared memory,
barriers and shuffles run as written (`cuda_emulation/`), by the same cases and the same rule as every implementation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import cuda_emulated
import pytest
import torch
from cuda_emulated import DTYPES, NAMESPACE, SetGpu
from guards import before_a_guard
from torch import Tensor

from xray_kernels import token_reorganize as public
from xray_kernels.testing import Case, Inputs, OpSpec, assert_within_rule, convert, randn, results
from xray_kernels.token_reorganize import reference
from xray_kernels.token_reorganize.spec import SPECS

CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS for case in spec.cases]
PLAIN, SEAM = SPECS


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulated kernels, loaded as the ops `xray_emulated::*` of the CPU."""
    names = ("reorganize_tokens", "add_reorganize_norm")
    ops = [op for name in names for op in (name, f"{name}_backward")]
    library, kernels = cuda_emulated.load("token_reorganize", ops, tmp_path_factory.mktemp("emulation"))
    for name, backward, setup in (
        ("reorganize_tokens", public._backward_reorganize, public._setup_reorganize),
        ("add_reorganize_norm", public._backward_add_reorganize_norm, public._setup_add_reorganize_norm),
    ):
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=library)
    return kernels


@pytest.fixture
def gpu(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[SetGpu]:
    """The public functions run on the emulated kernels; call it with a number of processors and an order of threads.

    Uninitialised tensors are filled with NaN.
    """
    for name in ("reorganize", "reorganize_backward", "add_reorganize_norm", "add_reorganize_norm_backward"):
        op = name if name.startswith("add") else name.replace("reorganize", "reorganize_tokens")
        monkeypatch.setattr(public, f"_{name}", getattr(torch.ops.xray_emulated, op).default)
    with cuda_emulated.emulating(emulated) as set_gpu:
        yield set_gpu


def check(spec: OpSpec, inputs: Inputs, what: str, given: Inputs | None = None) -> dict[str, Tensor]:
    actual = results(spec.function, given or inputs)
    oracle, yardstick = results(spec.composition, convert(inputs, torch.float64)), results(spec.composition, inputs)
    assert_within_rule(actual, yardstick, oracle, what=what)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_every_case_within_rule(spec: OpSpec, case: Case, dtype: torch.dtype, gpu: SetGpu) -> None:
    inputs = case.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    check(spec, inputs, f"{spec.name} {case.name} {dtype} emulated")


def made(
    spec: OpSpec, batch: int, length: int, channels: int, keep: int, dtype: torch.dtype = torch.float32, **more: Any
) -> Inputs:
    like = (dtype, torch.device("cpu"), torch.Generator().manual_seed(1))
    prefix = more.get("num_prefix_tokens", 1)
    scores = randn(batch, length - prefix, like=like).float().softmax(1) * 4
    inputs = {"scores": scores, "num_keep": keep, **more}
    if spec is PLAIN:
        return {"tokens": randn(batch, length, channels, like=like), **inputs}
    tensors = {name: randn(batch, length, channels, like=like) for name in ("residual", "update")}
    return {**tensors, "weight": 1 + randn(channels, like=like) / 4, "bias": randn(channels, like=like) / 4, **inputs}


# each takes another way through the kernels than the cases above
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "one row a block": (132, {"batch": 1, "length": 30, "channels": 64, "keep": 11}),
    "whole batch row a block": (1, {"batch": 5, "length": 30, "channels": 64, "keep": 11}),
    "a row longer than a warp holds": (4, {"batch": 2, "length": 9, "channels": 2200, "keep": 3}),
    "more vectors than threads": (4, {"batch": 2, "length": 7, "channels": 2081, "keep": 2}),
    "sliced fused row": (132, {"batch": 1, "length": 140, "channels": 1024, "keep": 20}),
    "wide rows": (2, {"batch": 3, "length": 70, "channels": 768, "keep": 40}),
    "three prefix tokens": (8, {"batch": 2, "length": 33, "channels": 40, "keep": 8, "num_prefix_tokens": 3}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_other_ways_through_the_kernels(spec: OpSpec, shape: str, dtype: torch.dtype, gpu: SetGpu) -> None:
    processors, arguments = SHAPES[shape]
    gpu(processors, 0)
    check(spec, made(spec, **arguments, dtype=dtype), shape)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_order_of_threads_does_not_matter(spec: OpSpec, gpu: SetGpu) -> None:
    """No thread reads shared memory before it is written, and no sum depends on who is first: the bits are the same."""
    inputs = made(spec, 2, 200, 72, 130)
    inputs["scores"][0, 50:120] = inputs["scores"][0, 40]
    seen = []
    for schedule in (0, 1, 2, 3):
        gpu(4, schedule)
        seen.append(results(spec.function, inputs))
    for other in seen[1:]:
        assert all(torch.equal(other[name], seen[0][name]) for name in seen[0])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("kind", ["gaps", "odd offset", "expanded", "transposed"])
def test_strides_and_alignment(spec: OpSpec, kind: str, gpu: SetGpu) -> None:
    def view(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if kind == "gaps":
            return value.new_zeros(*value.shape[:-1], value.shape[-1] + 4)[..., : value.shape[-1]].copy_(value)
        if kind == "odd offset":
            return value.new_zeros(value.numel() + 1)[1:].view(value.shape).copy_(value)
        if kind == "expanded":
            return value[:1].expand(value.shape)
        return value.transpose(-2, -1).contiguous().transpose(-2, -1)

    inputs = made(spec, 3, 21, 32, 9)
    given = {name: view(value) for name, value in inputs.items()}
    same = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
    check(spec, same, kind, given)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("channels", [8, 37, 96, 1100])
def test_reads_nothing_past_its_inputs(spec: OpSpec, channels: int, gpu: SetGpu) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = made(spec, 2, 21, channels, 9, dtype)
        check(spec, inputs, "guarded", {name: before_a_guard(value) for name, value in inputs.items()})


def hostile_scores(kind: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(2, count, generator=generator)
    if kind == "equal":
        return torch.full_like(values, 0.25)
    if kind == "two levels":
        return (values > 0).float()
    if kind == "zeros of both signs":
        return torch.where(values > 0.5, values, torch.where(values > 0, 0.0, -0.0))
    if kind == "NaN of both signs":
        bits = torch.where(values > 1, 0x7FC00001, -0x00000001).to(torch.int32).view(torch.float32)
        return torch.where(values.abs() > 1, bits, values)
    if kind == "infinite":
        return torch.where(values.abs() > 1.5, values.sign() * float("inf"), values)
    if kind == "outlier":
        return values.softmax(1).index_fill(1, torch.tensor([count // 2]), 1e30)
    return values * torch.logspace(-40, 30, count).nan_to_num()


@pytest.mark.parametrize("score_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 33, 257, 1568, 8192])
@pytest.mark.parametrize(
    "kind",
    ["equal", "two levels", "zeros of both signs", "NaN of both signs", "infinite", "outlier", "all magnitudes"],
)
def test_selection_of_hostile_scores(kind: str, count: int, score_dtype: torch.dtype, gpu: SetGpu) -> None:
    """Exactly the reference's indices and kept rows, and the fused row within the rounding of a float32 sum."""
    scores = hostile_scores(kind, count).to(score_dtype)
    # channel c is bit c of the candidate's index: one wrongly dropped or kept candidate shows in the sums
    tokens = ((torch.arange(count)[:, None] >> torch.arange(14)) & 1).to(score_dtype).expand(2, count, 14)
    rounding = torch.finfo(score_dtype).eps if score_dtype != torch.float32 else 1e-6
    for keep in sorted({1, (count + 1) // 2, max(1, count - 1), count}):
        out, indices = torch.ops.xray_emulated.reorganize_tokens(tokens, scores, keep, 0, True)
        expected, order = reference.reorganize_tokens(tokens.double(), scores.double(), keep, 0, True)
        assert torch.equal(indices, order)
        assert torch.equal(out[:, :keep].double(), expected[:, :keep])
        magnitude = (scores.double().abs().nan_to_num(posinf=0.0)[..., None] * tokens).sum(1).clamp(min=1e-30)
        error = (out[:, keep].double() - expected[:, keep]).abs()
        same = (error <= rounding * magnitude) | (out[:, keep].double() == expected[:, keep])
        assert (same | (out[:, keep].isnan() & expected[:, keep].isnan())).all()


def test_errors_name_what_is_wrong(gpu: SetGpu) -> None:
    op = torch.ops.xray_emulated.reorganize_tokens
    with pytest.raises(RuntimeError, match="8193 candidates; the CUDA kernel takes at most 8192"):
        op(torch.zeros(1, 8194, 1), torch.zeros(1, 8193), 5, 1, True)
    with pytest.raises(RuntimeError, match="num_keep must be from 1 to 3, got 4"):
        op(torch.zeros(1, 4, 1), torch.zeros(1, 3), 4, 1, True)
    with pytest.raises(RuntimeError, match="XRAY_KERNELS=reference takes float64"):
        op(torch.zeros(1, 4, 1, dtype=torch.float64), torch.zeros(1, 3), 2, 1, True)
    with pytest.raises(RuntimeError, match="scores must be float32 or the dtype of the tokens"):
        op(torch.zeros(1, 4, 1), torch.zeros(1, 3, dtype=torch.float16), 2, 1, True)


def test_plan_gives_every_processor_work() -> None:
    host = pytest.importorskip("xray_kernels._host", exc_type=ImportError)
    for batch, length, channels, keep in ((64, 197, 768, 138), (8, 1569, 768, 1098), (64, 577, 1024, 404)):
        for size in (2, 4):
            plan = host.plan_reorganize(batch, length, keep, channels, size, norm=False, processors=132)
            assert plan["rows"] * plan["copy_blocks"] >= length > plan["rows"] * (plan["copy_blocks"] - 1)
            assert plan["fuse_vectors"] * plan["fuse_blocks"] >= channels * size / 16
            assert batch * plan["copy_blocks"] >= 4 * 132
            assert batch * plan["fuse_blocks"] >= 132 / 2
            assert 2 * plan["select_bytes"] <= 48 << 10
    # one image still reaches nearly every processor
    plan = host.plan_reorganize(1, 197, 138, 768, 2, norm=False, processors=132)
    assert (plan["rows"], plan["copy_blocks"], plan["fuse_blocks"]) == (2, 99, 24)
    # many candidates: fewer blocks of more rows, since each orders all scores
    plan = host.plan_reorganize(1, 8193, 5735, 768, 2, norm=False, processors=132)
    assert 132 <= plan["copy_blocks"] <= 2 * 132


def test_plan_slices_the_normalised_fused_row_only_where_it_would_be_last() -> None:
    host = pytest.importorskip("xray_kernels._host", exc_type=ImportError)
    for batch, length, keep, blocks in ((64, 197, 138, 1), (1, 197, 138, 1), (64, 577, 404, 1), (1, 1569, 1098, 24)):
        assert host.plan_reorganize(batch, length, keep, 768, 2, norm=True, processors=132)["fuse_blocks"] == blocks


def test_plan_of_the_backward_covers_all_rows() -> None:
    host = pytest.importorskip("xray_kernels._host", exc_type=ImportError)
    for norm, size, threads in ((False, 4, 128), (True, 2, 96), (True, 4, 192)):
        plan = host.plan_reorganize_backward(64, 197, 138, 768, size, norm=norm, processors=132)
        assert plan["threads"] == threads
        assert plan["rows"] * plan["blocks"] >= 197 > plan["rows"] * (plan["blocks"] - 1)
        assert 64 * plan["blocks"] * threads >= 132 * 512
    assert host.plan_reorganize_backward(1, 197, 138, 768, 2, norm=False, processors=132)["blocks"] == 197
