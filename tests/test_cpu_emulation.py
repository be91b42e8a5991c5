"""The kernels of attention and of token_reorganize for AVX-512 and AMX, emulated (see `cpu_emulated.py`).

By the same cases and the same rule as every implementation. On a machine that has AVX-512 all tests run on it as well.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import cpu_emulated
import pytest
import torch
from cpu_emulated import AMX, AVX512, DTYPES, LEVELS, SetLevel
from guards import before_a_guard
from torch import Tensor

from xray_kernels import _library, attention_varlen, attention_varlen_with_scores, attention_with_scores
from xray_kernels import attention as plain_attention
from xray_kernels.attention.spec import SPECS as ATTENTION
from xray_kernels.testing import Case, Inputs, OpSpec, assert_within_rule, convert, randn, results
from xray_kernels.token_reorganize.spec import SPECS as REORGANIZE

SOURCES = ("attention/cpu", "attention/cpu_class_row", "token_reorganize/cpu", "token_reorganize/cpu_norm")
WITH_SCORES = next(spec for spec in ATTENTION if spec.name == "attention_with_scores")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cpu_emulated.load("attention", SOURCES, tmp_path_factory.mktemp("cpu_emulation"))


@pytest.fixture(params=cpu_emulated.KINDS)
def emulate(request: pytest.FixtureRequest) -> Iterator[SetLevel]:
    with cpu_emulated.running(request.param, lambda: request.getfixturevalue("library")) as set_level:
        yield set_level


def check(spec: OpSpec, inputs: Inputs, what: str, given: Inputs | None = None) -> dict[str, Tensor]:
    actual = results(spec.function, given or inputs)
    oracle, yardstick = results(spec.composition, convert(inputs, torch.float64)), results(spec.composition, inputs)
    assert_within_rule(actual, yardstick, oracle, what=what)
    if spec.name.endswith("with_scores") and actual["out1"].numel():  # float32, whatever the inputs are
        assert float((actual["out1"] - oracle["out1"]).abs().max()) < 1e-5, what
    return actual


def made(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype = torch.bfloat16, **more: Any
) -> Inputs:
    like = (dtype, torch.device("cpu"), torch.Generator().manual_seed(length * 1000 + head_dim))
    return {name: randn(batch, heads, length, head_dim, like=like) for name in ("query", "key", "value")} | more


CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in ATTENTION for case in spec.cases]
ON_512 = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in REORGANIZE for case in spec.cases]


@pytest.mark.parametrize(("level", "dtype"), LEVELS, ids=str)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_every_case_of_attention(spec: OpSpec, case: Case, level: int, dtype: torch.dtype, emulate: SetLevel) -> None:
    emulate(level)
    inputs = case.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    check(spec, inputs, f"{spec.name} {case.name} {dtype} level {level}")


def test_tiles_serve_bfloat16_on_amx_only(library: ctypes.CDLL) -> None:
    with cpu_emulated.emulated(library) as set_level:
        for level, dtype in LEVELS:
            set_level(level)
            before = library.emulated_products()
            results(WITH_SCORES.function, made(1, 1, 20, 16, dtype))
            assert (library.emulated_products() > before) == (level == AMX)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), ON_512)
def test_every_case_of_token_reorganize(spec: OpSpec, case: Case, dtype: torch.dtype, emulate: SetLevel) -> None:
    for level in (AVX512, AMX):
        emulate(level)
        inputs = case.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
        check(spec, inputs, f"{spec.name} {case.name} {dtype} level {level}")


@pytest.mark.parametrize("level", [AVX512, AMX])
def test_scores_beside_another_attention(level: int, emulate: SetLevel) -> None:
    """The class row's own kernels, forward and backward."""
    emulate(level)
    spec = dataclasses.replace(WITH_SCORES, function=partial(attention_with_scores, backend="sdpa"))
    for length, head_dim in ((2, 16), (50, 40), (197, 64)):
        for dtype in DTYPES:
            check(spec, made(2, 2, length, head_dim, dtype), f"N = {length} {dtype}")


LENGTHS = [*range(2, 71), 72, 100, 140, 197, 257, 577]


@pytest.mark.parametrize(
    ("level", "dtype"), [(AMX, torch.bfloat16), (AVX512, torch.bfloat16), (AVX512, torch.float32)], ids=str
)
def test_every_length(level: int, dtype: torch.dtype, emulate: SetLevel) -> None:
    """Output, scores and gradients with tails of tiles, panels and blocks of every size."""
    emulate(level)
    for length in LENGTHS:
        check(WITH_SCORES, made(2, 3, length, 64, dtype), f"N = {length} {dtype} level {level}")
    check(ATTENTION[0], made(2, 3, 1, 64, dtype), f"N = 1 {dtype} level {level}")


@pytest.mark.parametrize("length", [33, 100, 197])
@pytest.mark.parametrize("head_dim", [5, 16, 40, 72, 80, 128, 256])
@pytest.mark.parametrize("level", [AVX512, AMX])
def test_head_dims(level: int, head_dim: int, length: int, emulate: SetLevel) -> None:
    emulate(level)
    check(WITH_SCORES, made(1, 2, length, head_dim), f"D = {head_dim} N = {length} level {level}")


def rectangle(queries: int, keys: int, head_dim: int, peak: float, **more: Any) -> Inputs:
    inputs = made(2, 1, max(queries, keys), head_dim, **more)
    cut = {"query": inputs["query"][:, :, :queries] * peak, **{n: inputs[n][:, :, :keys] for n in ("key", "value")}}
    return inputs | {name: value.contiguous() for name, value in cut.items()}


MASKS: dict[str, dict[str, Any]] = {
    "all keys": {},
    "causal": {"is_causal": True},
    "causal, scale below zero": {"is_causal": True, "scale": -0.3},
    "scale of zero": {"scale": 0.0, "is_causal": True},
    "lengths": {"key_lengths": torch.tensor([1, 33])},
    "an empty row": {"key_lengths": torch.tensor([0, 17]), "is_causal": True},
}


@pytest.mark.parametrize("level", [AVX512, AMX])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, level: int, emulate: SetLevel) -> None:
    """Of several panels of queries and blocks of keys; large logits, whose blocks rescale what came before."""
    emulate(level)
    for (queries, keys), head_dim in itertools.product([(33, 33), (150, 40), (20, 300), (300, 290)], (16, 64)):
        for peak in (1.0, 20.0):
            inputs = rectangle(queries, keys, head_dim, peak, **MASKS[mask])
            check(ATTENTION[0], inputs, f"{mask} {queries} x {keys} x {head_dim} level {level}")


@pytest.mark.parametrize("level", [AVX512, AMX])
def test_packed_sequences(level: int, emulate: SetLevel) -> None:
    emulate(level)
    bounds = torch.tensor([0, 0, 33, 34, 120, 120, 320, 330], dtype=torch.int32)
    for spec in ATTENTION:
        if spec.function in (attention_varlen, attention_varlen_with_scores):
            like = (torch.bfloat16, torch.device("cpu"), torch.Generator().manual_seed(3))
            inputs = {name: randn(330, 2, 40, like=like) for name in ("query", "key", "value")}
            check(spec, inputs | {"cu_seqlens": bounds}, f"{spec.name} level {level}")


@pytest.mark.parametrize("level", [AVX512, AMX])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_views_of_one_projection(head_dim: int, level: int, emulate: SetLevel) -> None:
    emulate(level)
    like = (torch.bfloat16, torch.device("cpu"), torch.Generator().manual_seed(4))
    query, key, value = randn(2, 50, 3, 2, head_dim, like=like).permute(2, 0, 3, 1, 4)
    given = {"query": query, "key": key, "value": value}
    check(WITH_SCORES, {name: x.clone() for name, x in given.items()}, f"level {level}", given)


@pytest.mark.parametrize("level", [AVX512, AMX])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 72])
def test_reads_nothing_past_its_inputs(head_dim: int, level: int, emulate: SetLevel) -> None:
    emulate(level)
    for length in (2, 17, 33, 50):
        inputs = made(1, 2, length, head_dim)
        guarded = {name: before_a_guard(value) for name, value in inputs.items()}
        check(WITH_SCORES, inputs, f"guarded D = {head_dim} N = {length} level {level}", guarded)
        outputs = plain_attention(**{name: before_a_guard(value) for name, value in inputs.items()})
        assert outputs.isfinite().all()
    # and past the lengths of its rows: what lies there is not a number, and gets no gradient
    lengths = torch.tensor([17, 0])
    inputs = made(2, 1, 40, head_dim, key_lengths=lengths)
    hidden = torch.arange(40) >= lengths[:, None, None]
    spoilt = {name: inputs[name].masked_fill(hidden[..., None], float("nan")) for name in ("key", "value")}
    wanted, actual = results(plain_attention, inputs), results(plain_attention, inputs | spoilt)
    assert all(torch.equal(actual[name], wanted[name]) for name in wanted)
    assert not actual["grad_key"][hidden].any()


@pytest.mark.parametrize("level", [AVX512, AMX])
def test_runs_and_threads_agree(level: int, emulate: SetLevel) -> None:
    """Two runs are bit-equal. More threads cut the queries into slices, whose gradients of keys are summed; where there
    are enough heads they do not, and the bits stay the same."""
    emulate(level)
    threads = torch.get_num_threads()
    try:
        for heads, exact in ((1, False), (16, True)):
            inputs, seen = made(1, heads, 197, 64), []
            for count in (1, 1, 2, 3, 4):
                torch.set_num_threads(count)
                seen.append(check(WITH_SCORES, inputs, f"{count} threads level {level}"))
            assert all(torch.equal(seen[1][name], seen[0][name]) for name in seen[0])
            same = [torch.equal(other[name], seen[0][name]) for other in seen[2:] for name in ("out0", "grad_query")]
            assert all(same)
            if exact:
                assert all(torch.equal(other[name], seen[0][name]) for other in seen[2:] for name in seen[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not cpu_emulated.processor_flags(), reason="the processor's flags are not listed here")
def test_detected_instruction_set_is_the_processors() -> None:
    available = _library.cpu_capabilities()
    if not available:
        pytest.skip("_cpu is not built")
    flags = cpu_emulated.processor_flags()
    needs = [
        {"avx2", "fma", "f16c"},
        {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        {"amx_tile", "amx_bf16", "avx512_bf16"},
    ]
    has = len(list(itertools.takewhile(lambda wanted: wanted <= flags, needs)))
    # the system may refuse tiles to a process
    assert available in ([*_library.CAPABILITIES[: has + 1]], [*_library.CAPABILITIES[: min(has, 2) + 1]])
