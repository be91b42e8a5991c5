"""The kernels of the contrastive losses for AVX-512 and AMX, emulated (see `cpu_emulated.py`).

By the same cases and the same rule as every implementation; and the ops themselves by the whole matrix in float64. On a
machine that has AVX-512 all tests run on it as well.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cpu_emulated
import pytest
import torch
from cpu_emulated import AMX, AVX512, LEVELS, SetLevel
from guards import before_a_guard
from torch import Tensor

from xray_kernels import _library, clip_loss_with_ranks, siglip_loss_with_ranks
from xray_kernels.contrastive_loss import local
from xray_kernels.contrastive_loss.samples import samples
from xray_kernels.contrastive_loss.spec import SPECS
from xray_kernels.testing import Case, OpSpec, assert_within_rule, convert, randn, results

CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS for case in spec.cases]
OPS = ("contrastive_pairs", "contrastive_statistics", "contrastive_statistics_backward", "sigmoid_contrastive")
BOTH = pytest.mark.parametrize("level", [AVX512, AMX])
AMPLE = 2**28
LOSSES: tuple[Callable[..., tuple[Tensor, ...]], ...] = (
    lambda image, text, labels: clip_loss_with_ranks(image, text, 8.0, labels=labels),
    lambda image, text, labels: siglip_loss_with_ranks(image, text, 8.0, -2.0, labels=labels),
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cpu_emulated.load("contrastive", ("contrastive_loss/cpu",), tmp_path_factory.mktemp("cpu_emulation"))


@pytest.fixture(params=cpu_emulated.KINDS)
def emulate(request: pytest.FixtureRequest) -> Iterator[SetLevel]:
    with cpu_emulated.running(request.param, lambda: request.getfixturevalue("library")) as set_level:
        yield set_level


# ---- the public functions ----


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_every_case(spec: OpSpec, case: Case, emulate: SetLevel) -> None:
    for level, dtype in LEVELS:
        emulate(level)
        inputs = case.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
        oracle, yardstick = results(spec.composition, convert(inputs, torch.float64)), results(spec.composition, inputs)
        actual = results(spec.function, inputs)
        assert_within_rule(actual, yardstick, oracle, what=f"{spec.name} {case.name} {dtype} level {level}")


@BOTH
@pytest.mark.parametrize("name", OPS)
def test_samples_of_the_check_before_use(name: str, level: int, emulate: SetLevel) -> None:
    """What `check_tiles` compares at import agrees, or AMX would not be used where it works; what is wrong does not."""
    emulate(level)
    function, reference = getattr(torch.ops.xray_kernels, name).default, _library.REFERENCES[name]
    for args in samples(name, torch.bfloat16, torch.device("cpu")):
        assert _library.compare(function, args, reference) is None
        if name == "contrastive_pairs":
            assert _library.compare(lambda *args: function(*args) * 1.01, args, reference)
            continue
        for wrong in (number for number, output in enumerate(reference(*args)) if output.numel()):

            def spoilt(*args: Any, wrong: int = wrong) -> tuple[Tensor, ...]:
                found = list(function(*args))
                found[wrong] = found[wrong] * 1.05 if found[wrong].is_floating_point() else found[wrong] + 1
                return tuple(found)

            assert _library.compare(spoilt, args, reference), f"output {wrong} of {name}"


# ---- the ops, by the whole matrix ----


@dataclass(frozen=True)
class Problem:
    """n images and N texts, labels that some share, weights of gradients, and what float64 makes of them."""

    image: Tensor
    text: Tensor
    image_labels: Tensor
    text_labels: Tensor
    weights: tuple[Tensor, Tensor, Tensor]
    scale: float = 8.0
    bias: float = -1.5

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.image, self.text, torch.tensor(self.scale), self.image_labels, self.text_labels

    @property
    def matches(self) -> Tensor:
        return self.image_labels[:, None] == self.text_labels

    @property
    def logits(self) -> Tensor:
        return self.scale * self.image.double() @ self.text.double().T

    def ranks(self, logits: Tensor, image_pairs: Tensor, text_pairs: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = ((logits >= pairs) & ~self.matches for pairs in (image_pairs[:, None], text_pairs))
        return rows.sum(1, dtype=torch.int32), columns.sum(0, dtype=torch.int32)


def problem(n: int, num_texts: int, width: int, dtype: torch.dtype = torch.bfloat16, labels: int = 40) -> Problem:
    like = (torch.float64, torch.device("cpu"), torch.Generator().manual_seed(1000 * n + width))
    image, text = (randn(count, width, like=like) * width**-0.5 for count in (n, num_texts))
    image_labels, text_labels = (torch.arange(count, dtype=torch.int32) * 7 % labels for count in (n, num_texts))
    weights = (randn(n, like=like), randn(num_texts, like=like), randn(n, like=like))
    return Problem(image.to(dtype), text.to(dtype), image_labels, text_labels, weights)


def assert_close(got: Tensor, truth: Tensor, allowed: Tensor | float, what: str) -> None:
    error = (got.double() - truth).abs()
    assert (error <= allowed).all(), f"{what}: error {float(error.max()):.3g}, {float(truth.abs().max()):.3g} at most"


def assert_gradients(p: Problem, grad: Tensor, found: Sequence[Tensor], what: str) -> None:
    """By the gradient of the logits in float64; each of its numbers may have been rounded to bfloat16."""
    grad_image, grad_text, grad_scale = found
    image, text, eps = p.image.double(), p.text.double(), 2**-8 if p.image.dtype == torch.bfloat16 else 1e-5
    for got, truth, most in (
        (grad_image, grad @ text, grad.abs() @ text.abs()),
        (grad_text, grad.T @ image, grad.T.abs() @ image.abs()),
    ):
        if got.numel():
            allowed = p.scale * (eps * most + torch.finfo(got.dtype).eps * truth.abs()) + 1e-5
            assert_close(got, p.scale * truth, allowed, what)
    if grad_image.numel():
        terms = grad * p.logits / p.scale
        assert_close(grad_scale, terms.sum(), eps * 6 * terms.norm() + 1e-4, f"{what} scale")


def check_softmax(p: Problem, what: str, workspace: int = AMPLE, kept_rows: int = 0) -> None:
    logits, (n, num_texts) = p.logits, (len(p.image), len(p.text))
    pairs = (torch.randn(n), torch.randn(num_texts))
    row_lse, column_lse, positive, *ranks, kept = local.contrastive_statistics(*p.inputs, *pairs, kept_rows, workspace)
    assert_close(row_lse, logits.logsumexp(1), 2e-5, f"{what} rows")
    assert_close(column_lse, logits.logsumexp(0), 2e-5, f"{what} columns")
    assert_close(positive, (logits * p.matches).sum(1), 1e-3, f"{what} positives")
    assert_close(kept, logits[:kept_rows], 2e-5, f"{what} kept")
    for got, truth in zip(ranks, p.ranks(logits, *pairs), strict=True):
        assert torch.equal(got, truth), f"{what} ranks"
    row, column, match = p.weights
    grad = row[:, None] * (logits - logits.logsumexp(1, keepdim=True)).exp()
    grad += column * (logits - logits.logsumexp(0)).exp() + match[:, None] * p.matches
    found = local.contrastive_statistics_backward(
        *p.inputs, row_lse, column_lse, kept, *p.weights, workspace, True, True
    )
    assert_gradients(p, grad, found, what)


def check_sigmoid(
    p: Problem, what: str, workspace: int = AMPLE, image_grad: bool = True, text_grad: bool = True
) -> None:
    logits, sign = p.logits, 2.0 * p.matches - 1
    pairs = (torch.randn(len(p.image)), torch.randn(len(p.text)))
    total, grad_image, grad_text, grad_scale, grad_bias, *ranks = local.sigmoid_contrastive(
        *p.inputs[:3], torch.tensor(p.bias), *p.inputs[3:], *pairs, workspace, image_grad, text_grad
    )
    exact = -torch.nn.functional.logsigmoid(sign * (logits + p.bias)).sum()
    assert_close(total, exact, 1e-6 * exact + 1e-5, f"{what} total")
    grad = -sign * torch.sigmoid(-sign * (logits + p.bias))
    assert (grad_image.numel(), grad_text.numel()) == (image_grad * p.image.numel(), text_grad * p.text.numel())
    assert_gradients(p, grad, (grad_image, grad_text, grad_scale), what)
    if image_grad:
        assert_close(grad_bias, grad.sum(), 1e-6 * grad.abs().sum() + 1e-5, f"{what} bias")
    for got, truth in zip(ranks, p.ranks(logits, *pairs), strict=True):
        assert torch.equal(got, truth), f"{what} ranks"


@BOTH
@pytest.mark.parametrize("width", [1, 31, 33, 100, 512])
def test_widths(width: int, level: int, emulate: SetLevel) -> None:
    """Tails of steps and of tiles; at 512 logits are summed in two parts."""
    emulate(level)
    check_softmax(problem(37, 21, width), f"D = {width} level {level}")
    check_sigmoid(problem(21, 37, width), f"D = {width} level {level}")


@pytest.mark.parametrize(("level", "dtype"), LEVELS, ids=str)
def test_more_images_or_more_texts(level: int, dtype: torch.dtype, emulate: SetLevel) -> None:
    emulate(level)
    for n, num_texts in ((1, 50), (50, 1), (15, 17), (32, 33), (97, 16), (48, 110), (130, 95)):
        p = problem(n, num_texts, 20, dtype)
        check_softmax(p, f"{n} x {num_texts} {dtype} level {level}")
        check_sigmoid(p, f"{n} x {num_texts} {dtype} level {level}")


def steps(count: int, block: int) -> int:
    """Products for so many terms of a gradient: blocks are padded to 32."""
    return sum(-(-min(block, count - at) // 32) for at in range(0, count, block))


@BOTH
@pytest.mark.parametrize(
    ("n", "num_texts", "block", "workspace"),
    [
        (3850, 35, 240, AMPLE),
        (35, 3850, 240, AMPLE),
        (310, 290, 96, AMPLE),
        (130, 118, 48, 400_000),
        (130, 118, 16, 240_000),
    ],
)
def test_blocks_of_every_size(
    n: int, num_texts: int, block: int, workspace: int, level: int, emulate: SetLevel, request: pytest.FixtureRequest
) -> None:
    """The number of products tells the size."""
    emulate(level)
    p, what = problem(n, num_texts, 24), f"{n} x {num_texts} in blocks of {block} level {level}"
    tiles, other = -(-n // 16), -(-num_texts // 16)
    is_counted = level == AMX and request.node.callspec.params["emulate"] == "emulated"
    products = request.getfixturevalue("library").emulated_products if is_counted else lambda: 0
    before = products()
    check_softmax(p, what, workspace)
    gradients = 2 * tiles * steps(num_texts, block) + 2 * other * steps(n, block)
    assert not is_counted or products() - before == 2 * tiles * other + gradients
    check_sigmoid(p, what, workspace)
    assert not is_counted or products() - before == 3 * tiles * other + 2 * gradients


@BOTH
def test_several_panels(level: int, emulate: SetLevel) -> None:
    """Of which features are packed anew for each: the workspace has room for a few blocks."""
    emulate(level)
    for n, num_texts in ((150, 90), (90, 150)):
        p, what = problem(n, num_texts, 100), f"{n} x {num_texts} level {level}"
        check_softmax(p, what, 150_000)
        check_sigmoid(p, what, 150_000)
        check_softmax(p, what, 2**15)


@BOTH
@pytest.mark.parametrize("kept_rows", [1, 50, 96, 120, 130])
def test_kept_logits(kept_rows: int, level: int, emulate: SetLevel) -> None:
    """Of no whole block, of some blocks, of all; they are used where a whole block's were kept."""
    emulate(level)
    p = problem(130, 50, 40)
    check_softmax(p, f"{kept_rows} rows kept level {level}", kept_rows=kept_rows)
    kept = torch.full((kept_rows, 50), -1e4)
    lse = torch.zeros(130, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    row, column, match = (torch.ones(130), torch.ones(50), torch.zeros(130))
    found = local.contrastive_statistics_backward(
        *p.inputs, *lse, kept, row.double(), column.double(), match.double(), AMPLE, True, True
    )
    whole = 130 if kept_rows == 130 else kept_rows // 48 * 48
    grad = 2 * p.logits.exp()
    grad[:whole] = 0
    assert_gradients(p, grad, found, "kept")


@pytest.mark.parametrize(("level", "dtype"), LEVELS, ids=str)
def test_no_digit_of_a_log_sum_exp_is_lost(level: int, dtype: torch.dtype, emulate: SetLevel) -> None:
    """Of logits around 2^23, where float32 has whole numbers only."""
    emulate(level)
    p, peak = problem(70, 50, 20, dtype), 2.0**23
    kept = peak - torch.randint(5, (70, 50), generator=torch.Generator().manual_seed(1)).float()
    row_lse, column_lse = (peak + 0.4 * torch.linspace(-1, 1, count, dtype=torch.float64) for count in (70, 50))
    found = local.contrastive_statistics_backward(*p.inputs, row_lse, column_lse, kept, *p.weights, AMPLE, True, True)
    row, column, match = p.weights
    grad = row[:, None] * (kept - row_lse[:, None]).exp() + column * (kept - column_lse).exp()
    assert_gradients(p, grad + match[:, None] * p.matches, found, f"{dtype} level {level}")


@BOTH
def test_gradients_of_one_side(level: int, emulate: SetLevel) -> None:
    emulate(level)
    p, nothing = problem(50, 70, 33), torch.empty(0)
    row_lse, column_lse, *_ = local.contrastive_statistics(*p.inputs, nothing, nothing, 0, AMPLE)
    both = local.contrastive_statistics_backward(
        *p.inputs, row_lse, column_lse, torch.empty(0, 70), *p.weights, AMPLE, True, True
    )
    for sides in ((True, False), (False, True), (False, False)):
        found = local.contrastive_statistics_backward(
            *p.inputs, row_lse, column_lse, torch.empty(0, 70), *p.weights, AMPLE, *sides
        )
        for got, whole, wanted in zip(found[:2], both[:2], sides, strict=True):
            assert torch.equal(got, whole) if wanted else got.numel() == 0
        check_sigmoid(p, f"{sides} level {level}", image_grad=sides[0], text_grad=sides[1])


# ---- ranks ----


@pytest.mark.parametrize(("level", "dtype"), LEVELS, ids=str)
def test_ties_count_against_a_pair(level: int, dtype: torch.dtype, emulate: SetLevel) -> None:
    """Texts that occur again in other lanes, tiles, bands and blocks have the very logit of the pair."""
    emulate(level)
    n, width, scale = 290, 300, torch.tensor(8.3)
    for distinct in (1, 7, 33, 101):
        p = problem(distinct, distinct, width, dtype)
        index = torch.arange(n) % distinct
        image, text, own = p.image[index], p.text[index], torch.arange(n, dtype=torch.int32)
        logits = p.logits[index][:, index]
        beside = ~torch.eye(n, dtype=torch.bool)
        expected = [((logits >= logits.diagonal()[:, None]) & beside).sum(1, dtype=torch.int32)]
        expected += [((logits >= logits.diagonal()) & beside).sum(0, dtype=torch.int32)]
        pairs = local.contrastive_pairs(image, text, scale)
        assert_close(pairs, logits.diagonal() * 8.3 / 8, 1e-5, "pairs")
        *_, image_ranks, text_ranks, kept = local.contrastive_statistics(
            image, text, scale, own, own, pairs, pairs, n, AMPLE
        )
        assert torch.equal(kept.diagonal(), pairs)
        of_sigmoid = local.sigmoid_contrastive(
            image, text, scale, torch.tensor(-1.0), own, own, pairs, pairs, AMPLE, False, False
        )[5:]
        for found in ((image_ranks, text_ranks), of_sigmoid):
            assert all(torch.equal(got, truth) for got, truth in zip(found, expected, strict=True))


# ---- memory, order, instructions ----


@BOTH
@pytest.mark.parametrize("width", [7, 32, 80])
def test_reads_nothing_past_its_inputs(width: int, level: int, emulate: SetLevel) -> None:
    emulate(level)
    for n in (1, 17, 50):
        p = problem(n, n, width)
        inputs = [before_a_guard(value) for value in (p.image, p.text)]
        labels = before_a_guard(p.image_labels.long())
        for function in LOSSES:
            leaves = [value.detach().requires_grad_() for value in inputs]
            loss, *ranks = function(*leaves, labels)
            plain = [value.detach().requires_grad_() for value in (p.image, p.text)]
            again, *others = function(*plain, p.image_labels.long())
            grads = [torch.autograd.grad(value, of) for value, of in ((loss, leaves), (again, plain))]
            assert torch.equal(loss, again)
            assert all(torch.equal(a, b) for a, b in zip((*ranks, *grads[0]), (*others, *grads[1]), strict=True))


@BOTH
def test_views(level: int, emulate: SetLevel) -> None:
    """Features between others, whose rows do not follow one another."""
    emulate(level)
    wide = problem(60, 60, 3 * 40)
    image, text = wide.image[:, 40:80], wide.text[:, 80:]
    p = Problem(image, text, wide.image_labels, wide.text_labels, wide.weights)
    check_softmax(p, f"views level {level}")
    check_sigmoid(p, f"views level {level}")


def run_all(p: Problem, workspace: int) -> list[Tensor]:
    count = min(len(p.image), len(p.text))
    pairs = local.contrastive_pairs(p.image[:count], p.text[:count], torch.tensor(p.scale))
    image_pairs, text_pairs = torch.zeros(len(p.image)), torch.zeros(len(p.text))
    image_pairs[:count] = text_pairs[:count] = pairs
    statistics = local.contrastive_statistics(*p.inputs, image_pairs, text_pairs, 48, workspace)
    row_lse, column_lse, *_, kept = statistics
    inputs: tuple[Any, ...] = (*p.inputs, row_lse, column_lse, kept, *p.weights, workspace, True, True)
    gradients = local.contrastive_statistics_backward(*inputs)
    rest = (torch.tensor(p.bias), *p.inputs[3:], image_pairs, text_pairs, workspace, True, True)
    return [pairs, *statistics, *gradients, *local.sigmoid_contrastive(*p.inputs[:3], *rest)]


@pytest.mark.parametrize(("level", "dtype"), [(AVX512, torch.float32), (AMX, torch.bfloat16)], ids=str)
def test_runs_and_threads_agree(level: int, dtype: torch.dtype, emulate: SetLevel) -> None:
    emulate(level)
    threads = torch.get_num_threads()
    try:
        for n, num_texts, workspace in ((200, 130, AMPLE), (200, 130, 400_000), (300, 300, AMPLE)):
            p, seen = problem(n, num_texts, 40, dtype), []
            for count in (1, 1, 2, 3, 4):
                torch.set_num_threads(count)
                seen.append(run_all(p, workspace))
            for other in seen[1:]:
                assert all(torch.equal(a, b) for a, b in zip(other, seen[0], strict=True))
    finally:
        torch.set_num_threads(threads)


def test_tiles_serve_bfloat16_on_amx_only(library: ctypes.CDLL) -> None:
    with cpu_emulated.emulated(library) as set_level:
        for level, dtype in [*LEVELS, (AMX, torch.float32), (AMX, torch.float16)]:
            set_level(level)
            for name in OPS:
                before = library.emulated_products()
                getattr(torch.ops.xray_kernels, name)(*next(samples(name, dtype, torch.device("cpu"))))
                assert (library.emulated_products() > before) == (level == AMX and dtype == torch.bfloat16), name
