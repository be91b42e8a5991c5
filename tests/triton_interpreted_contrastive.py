"""What the Triton kernels of the contrastive losses compute, by Triton's interpreter; see `triton_interpreted.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_on_cpu import interpreted

from xray_kernels import _library, testing
from xray_kernels.contrastive_loss import clip_loss, reference, siglip_loss, triton
from xray_kernels.contrastive_loss.spec import CLIP, SIGLIP, SPECS, sample_features
from xray_kernels.contrastive_loss.tiling import wide_dtype
from xray_kernels.testing import Case, Inputs, OpSpec

CPU = torch.device("cpu")
OPS = [op for op, module in _library.TRITON.items() if module == triton.__name__]
DTYPES = [torch.float32, torch.float16]
LARGER = ("several tasks", "several tasks, most logits not kept")
"""Cases of many tiles, which need one dtype: the interpreter is slow."""
OP_CASES = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{dtype}")
    for spec in SPECS
    for case in spec.cases
    for dtype in DTYPES
    if dtype == torch.float16 or case.name not in LARGER
]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with interpreted(OPS):
        yield


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def check(spec: OpSpec, inputs: Inputs, given: Inputs | None = None) -> None:
    oracle = testing.results(spec.composition, testing.convert(inputs, torch.float64))
    actual = testing.results(spec.function, inputs if given is None else given)
    testing.assert_within_rule(actual, testing.results(spec.composition, inputs), oracle, what=spec.name)


@pytest.mark.parametrize(("spec", "case", "dtype"), OP_CASES)
def test_outputs_and_gradients_within_rule(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    check(spec, case.make(dtype, CPU, generator()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_strides_do_not_matter(spec: OpSpec, dtype: torch.dtype) -> None:
    """Columns apart, and one text for all: stride 0."""
    inputs = spec.cases[0].make(dtype, CPU, generator())
    if "ranks" not in spec.name:  # where all texts are one, ranks depend on rounding
        inputs["text_features"] = inputs["text_features"][:1].expand_as(inputs["text_features"])
    check(spec, inputs, {**inputs, "image_features": inputs["image_features"].mT.contiguous().mT})


def arguments(
    n: int, num_texts: int, width: int, dtype: torch.dtype, *, captions: int = 50, scale: float = 10.0
) -> tuple[Any, ...]:
    """image, text, scale, and labels of both, of which a text may have none that an image has."""
    random = generator()
    image = sample_features(n, width, (dtype, CPU, random))["image_features"]
    text = sample_features(num_texts, width, (dtype, CPU, random))["image_features"]
    labels = (torch.randint(captions, (rows,), generator=random, dtype=torch.int32) for rows in (n, num_texts))
    return image, text, torch.tensor(scale, dtype=wide_dtype(dtype)), *labels


def untyped(*args: Any) -> Any:
    """Arguments some of which are lists, whose lengths a type checker does not know."""
    return args


def compare(name: str, *args: Any, tolerance: float | None = None) -> tuple[Tensor, ...]:
    """Results of an op, which must agree with the reference's in float64, closely in float32."""
    dtype = args[0].dtype
    wide: Any = [arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
    results = getattr(triton, name)(*args)
    for got, wanted in zip(results, getattr(reference, name)(*wide), strict=True):
        if got.is_floating_point():
            bound = tolerance or (2e-6 if dtype == torch.float32 else 1e-3)
            largest = float(wanted.abs().max()) if wanted.numel() else 0.0
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=bound * largest)
        else:
            assert torch.equal(got, wanted)
    return results


SHAPES = pytest.mark.parametrize(
    ("n", "num_texts", "width", "workspace_bytes", "kept_rows"),
    [(70, 300, 20, 2**24, 0), (300, 70, 20, 2**24, 300), (1, 200, 3, 2**20, 1), (290, 270, 65, 2**16, 256)],
)
"""More images than texts and the reverse, one panel and several, logits kept of all rows, of none and of some."""
ASKED = pytest.mark.parametrize("asked", [(True, True), (True, False), (False, True), (False, False)])
"""Gradients of image and text."""


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_their_gradients(
    n: int, num_texts: int, width: int, workspace_bytes: int, kept_rows: int, dtype: torch.dtype
) -> None:
    args = arguments(n, num_texts, width, dtype)
    nothing = torch.empty(0, dtype=torch.float32)
    *_, logits = compare("contrastive_statistics", *args, nothing, nothing, kept_rows, workspace_bytes, tolerance=2e-6)
    compare(
        "contrastive_statistics_backward", *args, *statistics(args), logits, *upstream(args), workspace_bytes, True,
        True, tolerance=1e-5 if dtype == torch.float32 else 4e-3,
    )  # fmt: skip


def test_statistics_by_wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's."""
    monkeypatch.setattr(triton, "architecture", lambda image: 90)
    args, nothing = arguments(150, 400, 20, torch.float16), torch.empty(0, dtype=torch.float32)
    compare("contrastive_statistics", *args, nothing, nothing, 0, 2**20, tolerance=2e-6)


def statistics(args: tuple[Any, ...]) -> Any:
    """Exact log-sum-exps of rows and columns."""
    wide: Any = [arg.double() if arg.is_floating_point() else arg for arg in args]
    return reference.contrastive_statistics(*untyped(*wide, torch.empty(0), torch.empty(0), 0, 2**24))[:2]


def upstream(args: tuple[Any, ...]) -> list[Tensor]:
    random = generator()
    sizes = (args[0].shape[0], args[1].shape[0], args[0].shape[0])
    return [torch.randn(size, generator=random, dtype=torch.float64) / size for size in sizes]


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_and_its_gradients(
    n: int, num_texts: int, width: int, workspace_bytes: int, kept_rows: int, dtype: torch.dtype
) -> None:
    args, nothing = arguments(n, num_texts, width, dtype), torch.empty(0, dtype=torch.float32)
    rest = (torch.tensor(-3.0), *args[3:], nothing, nothing, workspace_bytes, True, True)
    compare("sigmoid_contrastive", *args[:3], *rest)


@ASKED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_asked_for(asked: tuple[bool, bool], dtype: torch.dtype) -> None:
    """The others are empty, and those of scale and bias, which come with the image's, 0."""
    args, nothing = arguments(40, 50, 9, dtype), torch.empty(0, dtype=torch.float32)
    compare("sigmoid_contrastive", *args[:3], torch.tensor(-3.0), *args[3:], nothing, nothing, 2**14, *asked)
    compare(
        "contrastive_statistics_backward", *args, *statistics(args), torch.empty(0, 50), *upstream(args), 2**14,
        *asked, tolerance=1e-5 if dtype == torch.float32 else 4e-3,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_of_another_ranks_pairs(dtype: torch.dtype) -> None:
    """n images of one rank against all texts; pairs far from any logit, so that rounding decides nothing."""
    image, text, scale, *labels = arguments(70, 150, 20, dtype)
    logits = (image.double() @ text.double().T * 10).flatten().sort().values
    gaps = torch.stack([(logits[1:] - logits[:-1]), (logits[1:] + logits[:-1]) / 2])
    middles = gaps[1, gaps[0] > 2e-5].float()
    pairs: Any = [middles[torch.randint(len(middles), (rows,), generator=generator())] for rows in (70, 150)]
    nothing = pairs[0][:0]
    for image_pairs, text_pairs in (pairs, (pairs[0], nothing), (nothing, pairs[1])):
        *_, image_ranks, text_ranks, _ = compare(
            "contrastive_statistics", image, text, scale, *labels, image_pairs, text_pairs, 0, 2**15
        )
        bias = torch.tensor(-3.0)
        more = triton.sigmoid_contrastive(
            *untyped(image, text, scale, bias, *labels, image_pairs, text_pairs, 2**15, True, False)
        )
        assert torch.equal(more[5], image_ranks)
        assert torch.equal(more[6], text_ranks)
        assert image_ranks.numel() == 0 or image_ranks.unique().numel() > 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_has_the_bits_of_its_tile(dtype: torch.dtype) -> None:
    """So that ties count against a pair: of features that are all equal every pair has the worst rank."""
    image, text, scale, *_ = arguments(140, 140, 37, dtype)
    labels = torch.arange(140, dtype=torch.int32)
    pairs = triton.contrastive_pairs(image, text, scale)
    kept = triton.contrastive_statistics(*untyped(image, text, scale, labels, labels, pairs, pairs, 140, 2**24))[-1]
    assert torch.equal(kept.diagonal(), pairs)
    image = text = torch.full((140, 37), 0.25, dtype=dtype)  # the interpreter's products differ by their place
    pairs = triton.contrastive_pairs(image, text, scale)
    for ranks in triton.contrastive_statistics(*untyped(image, text, scale, labels, labels, pairs, pairs, 0, 2**16))[
        3:5
    ]:
        assert (ranks == 139).all()


@pytest.mark.parametrize("n", [256, 65536])
def test_small_gradients_do_not_underflow_in_float16(n: int) -> None:
    """1/n of probabilities of 1/n is 2^-32, far below what float16 has; so is a gradient scaled by 2^-20."""
    args = arguments(40, 300, 16, torch.float16, captions=10**6)
    nothing = torch.empty(0)
    row_lse, column_lse, *_ = reference.contrastive_statistics(*untyped(*args, nothing, nothing, 0, 2**20))
    grads = [torch.full((rows,), 2.0**-20 / n, dtype=torch.float64) for rows in (40, 300, 40)]
    args = (*args, row_lse, column_lse, torch.empty(0, 300), *grads, 2**20, True, True)
    wide: Any = [arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
    found = triton.contrastive_statistics_backward(*args)
    wanted = reference.contrastive_statistics_backward(*wide)
    torch.testing.assert_close(found[2].double(), wanted[2], rtol=1e-3, atol=0)
    # the features' own gradients have float16's smallest steps
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-3, atol=2.0**-24)


def test_improbable_positives_of_siglip_keep_their_digits() -> None:
    """Logits of -25 have losses and gradients of 1e-11, which 1 + e and float16 would both lose."""
    args = arguments(90, 90, 16, torch.float16, captions=10**6, scale=1.0)
    nothing = torch.empty(0)
    for bias in (-10.0, -14.0):
        rest = (torch.tensor(bias), *args[3:], nothing, nothing, 2**20, True, True)
        found = triton.sigmoid_contrastive(*untyped(*args[:3], *rest))
        wide: Any = [arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in rest]
        wanted = reference.sigmoid_contrastive(*(arg.double() for arg in args[:3]), *wide)
        for got, truth, bound in zip(found, wanted, (2e-6, 1e-3, 1e-3, 1e-4, 2e-6), strict=False):
            torch.testing.assert_close(got.double(), truth, rtol=0, atol=bound * float(truth.abs().max()))


@pytest.mark.parametrize("function", [clip_loss, siglip_loss])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_features_give_a_nan_loss(function: Any, dtype: torch.dtype) -> None:
    image, text, *_ = arguments(200, 200, 8, dtype)
    image[140, 3] = float("nan")
    assert function(image, text, 5.0, *([-2.0] if function is siglip_loss else [])).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_of_one_pair_is_exactly_zero(dtype: torch.dtype) -> None:
    image, text = (value[:1].requires_grad_() for value in arguments(3, 3, 19, dtype)[:2])
    loss = clip_loss(image, text, 100.0)
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (image, text)))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_two_runs_are_bit_equal(spec: OpSpec) -> None:
    inputs = spec.cases[3].make(torch.float16, CPU, generator())
    first, second = testing.results(spec.function, inputs), testing.results(spec.function, inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^27 elements apart: the last ones lie past 2^31. Only the pages that are touched take memory."""
    torch.use_deterministic_algorithms(False)  # or the whole buffer would be filled
    near, text, scale, *labels = arguments(18, 40, 16, torch.float16)
    step = 2**27 + 16
    far = torch.empty(17 * step + 16, dtype=torch.float16).as_strided((18, 16), (step, 1))
    far.copy_(near)
    nothing = torch.empty(0)
    found = []
    for image in (far, near):
        statistics = triton.contrastive_statistics(*untyped(image, text, scale, *labels, nothing, nothing, 0, 2**20))
        mirrored = triton.contrastive_statistics(
            *untyped(text, image, scale, *labels[::-1], nothing, nothing, 0, 2**20)
        )
        bias = torch.tensor(-1.0)
        sigmoid = triton.sigmoid_contrastive(
            *untyped(image, text, scale, bias, *labels, nothing, nothing, 2**20, True, True)
        )
        found.append([*statistics, *mirrored, *sigmoid, triton.contrastive_pairs(image, text[:18], scale)])
    assert all(torch.equal(got, wanted) for got, wanted in zip(*found, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_first_use_check_passes(name: str) -> None:
    for dtype in DTYPES:
        assert _library.checked(name, dtype, CPU) == "triton"


@pytest.mark.parametrize("name", OPS)
def test_what_the_kernels_do_not_take_goes_to_the_reference(name: str) -> None:
    """float64, with the reference's bits."""
    args = next(triton.samples(name, torch.float64, CPU))
    found, wanted = (_library.results(getattr(module, name), args) for module in (triton, reference))
    found, wanted = (value if isinstance(value, tuple) else (value,) for value in (found, wanted))
    assert all(torch.equal(got, truth) for got, truth in zip(found, wanted, strict=True))


def test_panels_fit_and_fill_the_workspace() -> None:
    """And are cut evenly: no last panel of a few rows."""
    for tile in (triton.READ, triton.configuration(torch.float16), triton.configuration(torch.float16, "gradient")):
        for rows, columns in ((65536, 65536), (8192, 65536), (65536, 8192), (5000, 70001), (40, 10**6)):
            for elements in (2**27, 2**24, 2**20):
                tall, broad = triton.panel_shape(rows, columns, elements, tile)
                assert tall * broad <= elements
                assert broad % 16 == 0
                assert tall == rows or tall % 16 == 0
                assert tall * broad > min(elements, rows * columns) / 2.5
        assert triton.panel_shape(3, 5, 10**6, tile) == (3, 16)
        for elements in (0, 1, 7, 100):
            tall, broad = triton.panel_shape(1000, 1000, elements, tile)
            assert 1 <= tall * broad <= max(elements, 1)


def test_both_losses_within_rule_over_several_panels() -> None:
    """A batch of more than one tile each way, in a workspace of a few panels."""
    for spec, more in ((CLIP, {}), (SIGLIP, {"logit_bias": torch.tensor(-5.0)})):
        inputs = sample_features(300, 24, (torch.float16, CPU, generator()))
        check(spec, {**inputs, "logit_scale": torch.tensor(30.0), **more, "max_workspace_bytes": 2**16})


def test_gradients_that_nobody_asked_for_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    add = triton._add_product

    def count(*args: Any) -> None:
        calls.append(args)
        add(*args)

    monkeypatch.setattr(triton, "_add_product", count)
    image, text, *_ = arguments(20, 20, 8, torch.float16)
    clip_loss(image, text.requires_grad_(), 5.0).backward()
    assert len(calls) == 1
