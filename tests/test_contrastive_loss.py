"""Properties of the contrastive losses on one process: memory, precision, symmetries, bad input.

What holds for every op (tolerance rule, strides, opcheck, compilation) is in test_ops, what holds over several
processes in test_contrastive_loss_ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from memory import needs_account, peak_bytes, run_measured
from torch import Tensor

from xray.ops import ClipLoss, SigLipLoss, clip_loss, clip_loss_with_ranks, siglip_loss, siglip_loss_with_ranks
from xray_kernels import _library
from xray_kernels.contrastive_loss import local
from xray_kernels.contrastive_loss.spec import compose_clip, compose_clip_with_ranks, compose_siglip, sample_features
from xray_kernels.testing import implementations, use_implementation

BIAS = -2.0
CLIP_MODES = [(local, gather) for local in (False, True) for gather in (False, True)]


def features(n: int, width: int, dtype: torch.dtype = torch.float64, agreement: float = 1.0) -> tuple[Tensor, Tensor]:
    like = (dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    inputs = sample_features(n, width, like, agreement)
    return inputs["image_features"], inputs["text_features"]


def call(function: Callable[..., Tensor], image: Tensor, text: Tensor, scale: Any, **options: Any) -> Tensor:
    """Either loss; SigLIP's with a bias of -2."""
    if function is siglip_loss:
        return function(image, text, scale, BIAS, **options)
    return function(image, text, scale, **options)


BOTH = pytest.mark.parametrize("function", [clip_loss, siglip_loss], ids=["clip", "siglip"])


@pytest.mark.parametrize(
    ("function", "n", "width", "workspace", "dtype"),
    [
        (clip_loss, 16384, 4, 2**24, torch.float32),
        (clip_loss, 600, 64, 2**17, torch.float32),
        (clip_loss, 600, 64, 2**17, torch.bfloat16),
        (siglip_loss, 600, 64, 2**17, torch.float32),
        (siglip_loss, 600, 64, 2**17, torch.bfloat16),
    ],
)
def test_memory_stays_within_the_workspace(
    function: Callable[..., Tensor], n: int, width: int, workspace: int, dtype: torch.dtype
) -> None:
    """The logits of N = 16,384 would be 1 GiB; gradients and the allowed workspace are all there is."""
    image, text = (value.requires_grad_() for value in features(n, width, dtype))
    scale = torch.tensor(10.0, requires_grad=True)
    peak = peak_bytes(lambda: call(function, image, text, scale, max_workspace_bytes=workspace).backward())
    gradients = 2 * n * width * (4 + dtype.itemsize)
    statistics = 12 * n * 8
    assert peak > gradients / 2, "the measurement must see the gradients at least"
    assert peak < gradients + statistics + workspace


@BOTH
def test_result_does_not_depend_on_the_workspace(function: Callable[..., Tensor]) -> None:
    image, text = (value.requires_grad_() for value in features(150, 8))
    found = []
    for workspace in (2**14, 2**16, 2**26):
        loss = call(function, image, text, 30.0, max_workspace_bytes=workspace)
        found.append((loss, *torch.autograd.grad(loss, (image, text))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-14)


@BOTH
def test_gradcheck_over_several_tiles(function: Callable[..., Tensor]) -> None:
    image, text = (value.requires_grad_() for value in features(19, 3))
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"max_workspace_bytes": 10_000}
    if function is siglip_loss:
        assert torch.autograd.gradcheck(lambda *inputs: siglip_loss(*inputs, **options), (image, text, scale, bias))
    else:
        assert torch.autograd.gradcheck(lambda *inputs: clip_loss(*inputs, **options), (image, text, scale))


@BOTH
def test_order_of_pairs_does_not_matter(function: Callable[..., Tensor]) -> None:
    image, text = (value.requires_grad_() for value in features(40, 8))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    loss, moved = call(function, image, text, 10.0), call(function, image[order], text[order], 10.0)
    torch.testing.assert_close(moved, loss, rtol=1e-12, atol=0)
    for one, other in zip(
        torch.autograd.grad(loss, (image, text)), torch.autograd.grad(moved, (image, text)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@BOTH
def test_images_and_texts_may_swap(function: Callable[..., Tensor]) -> None:
    image, text = features(40, 8)
    torch.testing.assert_close(call(function, image, text, 10.0), call(function, text, image, 10.0), rtol=1e-12, atol=0)


@BOTH
def test_scale_may_be_a_number_or_a_tensor(function: Callable[..., Tensor]) -> None:
    """A number, a 0-dimensional tensor and FSDP's (1,): one value, gradients in the shape that was given."""
    image, text = features(12, 8, torch.float32)
    by_number = call(function, image, text, 20)
    assert by_number.dtype == torch.float32
    assert by_number.shape == ()
    gradients = []
    for shape in ((), (1,)):
        scale = torch.full(shape, 20.0, requires_grad=True)
        loss = call(function, image, text, scale)
        assert torch.equal(loss, by_number)
        gradients.append(torch.autograd.grad(loss, scale)[0])
        assert gradients[-1].shape == shape
    assert gradients[0] == gradients[1] != 0


@BOTH
def test_compiles_for_any_batch_size_and_scale(function: Callable[..., Tensor]) -> None:
    compiled = torch.compile(partial(call, function), fullgraph=True, dynamic=True, backend="aot_eager")
    for n, scale in ((6, 3.0), (9, 4.0)):
        image, text = (value.requires_grad_() for value in features(n, 8))
        loss, expected = compiled(image, text, scale), call(function, image, text, scale)
        torch.testing.assert_close(loss, expected)
        grads = (torch.autograd.grad(value, (image, text)) for value in (loss, expected))
        torch.testing.assert_close(*grads)


def test_loss_of_one_pair_is_exactly_zero() -> None:
    image, text = (value.requires_grad_() for value in features(1, 8, torch.float32))
    loss = clip_loss(image, text, 100.0)
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (image, text)))


def test_tiny_losses_keep_their_digits() -> None:
    """At scale 100 with pairs that agree, the loss and its gradient are far below the rounding of a logit."""
    image, text = (value.requires_grad_() for value in features(8, 16, torch.float32, agreement=100.0))
    scale = torch.tensor(20.0, requires_grad=True)
    loss = clip_loss(image, text, scale)
    exact = [value.detach().double().requires_grad_() for value in (image, text, scale)]
    truth = compose_clip(*exact)
    assert 0 < truth < 1e-3
    torch.testing.assert_close(loss.double(), truth, rtol=2e-3, atol=0)
    for grad, expected in zip(
        torch.autograd.grad(loss, (image, text, scale)), torch.autograd.grad(truth, exact), strict=True
    ):
        bound = 2e-3 * float(expected.abs().max())
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=bound)


@BOTH
def test_autocast_does_not_round_the_logits(function: Callable[..., Tensor]) -> None:
    image, text = (value.requires_grad_() for value in features(12, 16, torch.float32))
    plain = call(function, image, text, 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(function, image, text, 100.0)
        under = torch.autograd.grad(cast, image)[0]
    assert torch.equal(cast, plain)
    assert torch.equal(under, torch.autograd.grad(plain, image)[0])


@pytest.mark.parametrize(
    ("function", "trained"),
    [(function, i) for function, count in ((clip_loss, 3), (siglip_loss, 4)) for i in range(count)],
)
def test_only_what_is_trained_gets_a_gradient(function: Callable[..., Tensor], trained: int) -> None:
    """A frozen tower, or a scale or bias alone, gives the gradient that it has when all are trained."""
    values = [*features(12, 8), *torch.tensor([5.0, -2.0], dtype=torch.float64)]
    values = values[: 4 if function is siglip_loss else 3]
    everything = [value.clone().requires_grad_() for value in values]
    expected = torch.autograd.grad(function(*everything), everything)[trained]
    values[trained] = values[trained].clone().requires_grad_()
    function(*values).backward()
    torch.testing.assert_close(values[trained].grad, expected, rtol=1e-12, atol=0)


@BOTH
def test_nan_features_give_a_nan_loss(function: Callable[..., Tensor]) -> None:
    image, text = features(6, 4)
    image[2, 1] = float("nan")
    assert call(function, image, text, 5.0).isnan()


IMAGE, TEXT = torch.zeros(4, 8), torch.zeros(4, 8)
BAD_INPUTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "empty batch": ((IMAGE[:0], TEXT[:0], 1.0), {}, ValueError, "image_features must have at least one row"),
    "no columns": ((IMAGE[:, :0], TEXT[:, :0], 1.0), {}, ValueError, "image_features must have at least one"),
    "not a tensor": (([1.0], TEXT, 1.0), {}, TypeError, "image_features must be a tensor"),
    "wrong rank": ((IMAGE[0], TEXT, 1.0), {}, ValueError, r"image_features must have shape \(n, D\)"),
    "more texts": ((IMAGE, torch.zeros(5, 8), 1.0), {}, ValueError, r"text_features .*\(4, 8\)"),
    "other width": ((IMAGE, torch.zeros(4, 9), 1.0), {}, ValueError, r"text_features .*\(4, 8\)"),
    "integers": ((IMAGE.long(), TEXT.long(), 1.0), {}, TypeError, "image_features must be float32"),
    "mixed dtypes": ((IMAGE, TEXT.half(), 1.0), {}, TypeError, "text_features is torch.float16"),
    "other device": ((IMAGE, TEXT.to("meta"), 1.0), {}, RuntimeError, "text_features is on meta"),
    "scale on other device": ((IMAGE, TEXT, torch.ones((), device="meta")), {}, RuntimeError, "logit_scale is"),
    "two scales": ((IMAGE, TEXT, torch.ones(2)), {}, ValueError, r"logit_scale .* got \(2,\)"),
    "integer scale": ((IMAGE, TEXT, torch.tensor(3)), {}, TypeError, "logit_scale must be float32"),
    "text as scale": ((IMAGE, TEXT, "10"), {}, TypeError, "logit_scale must be a number"),
    "bool as scale": ((IMAGE, TEXT, True), {}, TypeError, "logit_scale must be a number"),
    "infinite scale": ((IMAGE, TEXT, float("inf")), {}, ValueError, "logit_scale must be finite"),
    "scale of zero": ((IMAGE, TEXT, 0.0), {}, ValueError, "logit_scale must be above 0, .* got 0.0"),
    "negative scale": ((IMAGE, TEXT, -3), {}, ValueError, "logit_scale must be above 0, .* got -3"),
    "labels of another length": ((IMAGE, TEXT, 1.0), {"labels": torch.zeros(5, dtype=torch.int64)}, ValueError,
                                 r"labels must have shape \(4,\) .* got \(5,\)"),
    "labels for both sides": ((IMAGE, TEXT, 1.0), {"labels": torch.zeros(4, 4, dtype=torch.int64)}, ValueError,
                              r"labels must have shape \(n,\), got \(4, 4\)"),
    "floating labels": ((IMAGE, TEXT, 1.0), {"labels": torch.zeros(4)}, TypeError, "labels must be integers"),
    "labels as a list": ((IMAGE, TEXT, 1.0), {"labels": [1, 2, 3, 4]}, TypeError, "labels must be a tensor"),
    "labels on other device": ((IMAGE, TEXT, 1.0), {"labels": torch.zeros(4, dtype=torch.int64, device="meta")},
                               RuntimeError, "labels is on meta"),
    "exchange": ((IMAGE, TEXT, 1.0), {"exchange": "gather"}, ValueError, "exchange must be one of all_gather"),
    "workspace": ((IMAGE, TEXT, 1.0), {"max_workspace_bytes": 9}, ValueError, "max_workspace_bytes must"),
    "group": ((IMAGE, TEXT, 1.0), {"group": object()}, RuntimeError, "group was given but torch.distributed"),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_sentence(function: Callable[..., Tensor], name: str) -> None:
    arguments, options, kind, message = BAD_INPUTS[name]
    with pytest.raises(kind, match=message) as caught:
        call(function, *arguments, **options)
    assert "\n" not in str(caught.value)


def test_smallest_workspace_of_the_message_works() -> None:
    image, text = features(40, 8, torch.float32)
    with pytest.raises(ValueError, match="max_workspace_bytes") as caught:
        clip_loss(image, text, 1.0, max_workspace_bytes=1)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    torch.testing.assert_close(clip_loss(image, text, 1.0, max_workspace_bytes=least), clip_loss(image, text, 1.0))


def test_bias_is_checked_like_the_scale() -> None:
    with pytest.raises(ValueError, match=r"logit_bias must have shape \(\) or \(1,\), got \(3,\)"):
        siglip_loss(IMAGE, TEXT, 1.0, torch.zeros(3))


EVERY = pytest.mark.parametrize("implementation", implementations("cpu"))


def whole_numbers(n: int, width: int) -> tuple[Tensor, Tensor]:
    """Features whose logits are exact in every implementation, with many ties."""
    generator = torch.Generator().manual_seed(2)
    image, text = (torch.randint(-2, 3, (n, width), generator=generator).float() for _ in range(2))
    return image, text


@EVERY
@pytest.mark.parametrize("n", [5, 117, 300])
def test_ties_count_against_a_pair(implementation: str, n: int) -> None:
    image, text = whole_numbers(n, 3)
    labels = torch.arange(n) // 2
    for given in (None, labels):
        expected = compose_clip_with_ranks(image, text, 2.0, given)[1:]
        assert (expected[0] > 0).any()
        with use_implementation(implementation):
            by_clip = clip_loss_with_ranks(image, text, 2.0, labels=given)[1:]
            by_siglip = siglip_loss_with_ranks(image, text, 2.0, BIAS, labels=given)[1:]
        for found in (by_clip, by_siglip):
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_features_find_nothing(implementation: str, dtype: torch.dtype) -> None:
    """All rows alike, as after a collapse: the loss is that of guessing, and no pair is found."""
    n = 130
    row = torch.full((1, 64), 0.125, dtype=dtype)  # of length 1, and exact
    image, text = row.repeat(n, 1).requires_grad_(), row.repeat(n, 1).requires_grad_()
    with use_implementation(implementation):
        loss, image_ranks, text_ranks = clip_loss_with_ranks(image, text, 100.0)
        grads = torch.autograd.grad(loss, (image, text))
    torch.testing.assert_close(loss, torch.tensor(n).log(), rtol=1e-5, atol=0)
    assert (image_ranks == n - 1).all()
    assert (text_ranks == n - 1).all()
    for grad in grads:
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-4)


@EVERY
@BOTH
def test_half_precision_does_not_overflow(function: Callable[..., Tensor], implementation: str) -> None:
    """Logits of 100 times features that are not normalised are far beyond float16; so are the sums of gradients."""
    image, text = (30 * value for value in features(70, 96, torch.float32))
    image[1], text[3] = 2 * image[0], 2 * text[0]
    oracle = [value.half().double().requires_grad_() for value in (image, text)]
    expected = compose_siglip(*oracle, 100.0, BIAS) if function is siglip_loss else compose_clip(*oracle, 100.0)
    assert (100 * oracle[0] @ oracle[1].T).amax() > 65504
    with use_implementation(implementation):
        values = [value.half().requires_grad_() for value in (image, text)]
        loss = call(function, values[0], values[1], 100.0)
        grads = torch.autograd.grad(loss, values)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for grad, truth in zip(grads, torch.autograd.grad(expected, oracle), strict=True):
        assert grad.isfinite().all()
        torch.testing.assert_close(grad.double(), truth, rtol=2e-3, atol=2e-3 * float(truth.abs().max()))


SHAPES = [(1, 1, 4), (3, 50, 7), (50, 3, 7), (129, 257, 33), (500, 700, 40), (700, 500, 9)]


def other_shape(n: int, num_texts: int, width: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Operands of the local ops where images and texts differ in number, as on a rank; and labels that meet."""
    generator = torch.Generator().manual_seed(n)
    image = torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)
    text = torch.randn(num_texts, width, generator=generator, dtype=torch.float64).to(dtype)
    labels = [torch.randint(40, (count,), generator=generator, dtype=torch.int32) for count in (n, num_texts)]
    return [image, text, torch.tensor(1.7)], labels


def differs(name: str, args: tuple[Any, ...]) -> str | None:
    """How an op's results differ from the reference's in float64."""
    return _library.compare(getattr(local, name), args, _library.REFERENCES[name])


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("workspace", [2**16, 2**24])
def test_local_ops_where_texts_are_more_or_fewer(
    shape: tuple[int, int, int], workspace: int, implementation: str
) -> None:
    n, num_texts, width = shape
    operands, labels = other_shape(n, num_texts, width, torch.float32)
    generator = torch.Generator().manual_seed(1)
    pairs = [torch.randn(count, generator=generator) for count in (n, num_texts)]
    kept_rows = n if n < 480 else 480
    weights = [torch.rand(count, generator=generator, dtype=torch.float64) for count in (n, num_texts, n)]
    weights[2] = -weights[2]
    with use_implementation(implementation):
        args = (*operands, *labels, *pairs, kept_rows, workspace)
        assert differs("contrastive_statistics", args) is None
        row_lse, column_lse, *_, kept = local.contrastive_statistics(*args)
        for given in (kept, kept[:0]):
            for flags in ((True, True), (True, False), (False, True)):
                args = (*operands, *labels, row_lse, column_lse, given, *weights, workspace, *flags)
                assert differs("contrastive_statistics_backward", args) is None, flags
        for flags in ((True, True), (True, False), (False, True), (False, False)):
            args = (*operands, torch.tensor(-1.5), *labels, *pairs, workspace, *flags)
            assert differs("sigmoid_contrastive", args) is None, flags


@EVERY
@BOTH
def test_the_same_bits_whatever_the_threads(function: Callable[..., Tensor], implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("PyTorch's products cut their sums by the number of threads")
    image, text = (value.requires_grad_() for value in features(1000, 20, torch.float32))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            with use_implementation(implementation):
                loss = call(function, image, text, 20.0, max_workspace_bytes=2**20)
                found.append((loss, *torch.autograd.grad(loss, (image, text))))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(*both) for both in zip(other, found[0], strict=True))


PEAK_MEMORY = """
from xray import ops
from xray_kernels.contrastive_loss.spec import sample_features
name, dtype, n, width = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def step(n):
    values = sample_features(n, width, (dtype, torch.device("cpu"), torch.Generator().manual_seed(0)))
    image, text = (value.requires_grad_() for value in values.values())
    bias = [-10.0] if name == "siglip_loss" else []
    peak, _ = peak_of(lambda: getattr(ops, name)(image, text, 14.3, *bias).backward())
    return peak - (image.nbytes + text.nbytes)

step(1000)  # threads and libraries are there
print(step(n))
"""


@needs_account
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@BOTH
def test_peak_memory(function: Callable[..., Tensor], dtype: str) -> None:
    """At 10,000 pairs one float32 matrix of logits is 381 MiB; inputs and gradients apart, all takes 256 MiB."""
    if _library.implementation("contrastive_statistics", "cpu") == "reference":
        pytest.skip("the reference is bounded by what PyTorch's allocator counts, in another test")
    (grown,) = map(int, run_measured(PEAK_MEMORY, function.__name__, dtype, "10000", "64"))
    assert 2**20 < grown < 256 * 2**20


def test_clip_module_on_one_process() -> None:
    image, text = features(9, 8)
    bias = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    expected = compose_clip(image, text, 7.0)
    for own, gather in CLIP_MODES:
        module = ClipLoss(local_loss=own, gather_with_grad=gather)
        loss = module(image, text, 7.0, logit_bias=bias, output_dict=True)["contrastive_loss"]
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(module(image, text, logit_scale=7.0), expected)
        assert torch.autograd.grad(loss, bias)[0] == 0
    assert not list(ClipLoss().parameters())


def test_siglip_module_on_one_process() -> None:
    image, text = features(9, 8)
    expected = compose_siglip(image, text, 7.0, -3.0)
    torch.testing.assert_close(SigLipLoss()(image, text, 7.0, -3.0), expected)
    found = SigLipLoss(dist_impl="gather")(image, text, 7.0, logit_bias=None, output_dict=True)
    torch.testing.assert_close(found["contrastive_loss"], compose_siglip(image, text, 7.0, 0.0))


def test_modules_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="use_horovod must be False"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl must be one of bidir, shift, reduce, gather or None"):
        SigLipLoss(dist_impl="tree")
    for module, arguments in ((ClipLoss(world_size=2), (1.0,)), (SigLipLoss(world_size=2), (1.0, 0.0))):
        with pytest.raises(RuntimeError, match="world_size is 2 but"):
            module(IMAGE, TEXT, *arguments)
