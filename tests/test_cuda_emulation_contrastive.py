"""The CUDA kernels of the contrastive losses on the CPU, as in `test_cuda_emulation.py`; products by PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import cuda_emulated
import pytest
import torch
from cuda_emulated import DTYPES, NAMESPACE, SetGpu
from guards import before_a_guard
from memory import peak_bytes
from torch import Tensor

from xray_kernels.contrastive_loss import local, reference
from xray_kernels.contrastive_loss.spec import SPECS
from xray_kernels.testing import Case, OpSpec, assert_within_rule, convert, randn, results

OPS = ("contrastive_pairs", "contrastive_statistics", "contrastive_statistics_backward", "sigmoid_contrastive")
CASES = [pytest.param(spec, case, id=f"{spec.name}-{case.name}") for spec in SPECS for case in spec.cases]
ONE_PANEL, MANY_PANELS = 2**24, 2**16
GRADIENTS = ("grad_image", "grad_text")
INFINITY, NAN = float("inf"), float("nan")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulated kernels, loaded as the ops `xray_emulated::*` of the CPU."""
    library, kernels = cuda_emulated.load("contrastive_loss", list(OPS), tmp_path_factory.mktemp("emulation"))
    for name, backward, setup in (
        ("contrastive_pairs", local._backward_pairs, local._setup_pairs),
        ("contrastive_statistics", local._backward_statistics, local._setup_statistics),
        ("sigmoid_contrastive", local._backward_sigmoid, local._setup_sigmoid),
    ):
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=library)
    return kernels


@pytest.fixture
def gpu(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[SetGpu]:
    """The public functions run on the emulated kernels. Uninitialised tensors are filled with NaN."""
    for name in OPS:
        monkeypatch.setattr(local, name, getattr(torch.ops.xray_emulated, name).default)
    with cuda_emulated.emulating(emulated) as set_gpu:
        yield set_gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_every_case_within_rule(spec: OpSpec, case: Case, dtype: torch.dtype, gpu: SetGpu) -> None:
    inputs = case.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    actual = results(spec.function, inputs)
    oracle, yardstick = results(spec.composition, convert(inputs, torch.float64)), results(spec.composition, inputs)
    assert_within_rule(actual, yardstick, oracle, what=f"{spec.name} {case.name} {dtype} emulated")


@dataclass(frozen=True)
class Call:
    """Arguments of all ops."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    image_labels: Tensor
    text_labels: Tensor
    image_pairs: Tensor
    text_pairs: Tensor
    grad_row: Tensor
    grad_column: Tensor
    grad_positive: Tensor
    kept_rows: int = 0
    workspace: int = ONE_PANEL
    image_grad: bool = True
    text_grad: bool = True

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Call:
        changed: dict[str, Any] = {name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **changed)

    def in_double(self) -> Call:
        return self.with_tensors(lambda x: x.double() if x.is_floating_point() else x)

    def statistics(self, ops: Any = torch.ops.xray_emulated) -> dict[str, Tensor]:
        found = ops.contrastive_statistics(
            self.image, self.text, self.scale, self.image_labels, self.text_labels, self.image_pairs, self.text_pairs,
            self.kept_rows, self.workspace,
        )  # fmt: skip
        names = ("row_lse", "column_lse", "positive", "image_ranks", "text_ranks", "kept")
        return dict(zip(names, found, strict=True))

    def backward(
        self, row_lse: Tensor, column_lse: Tensor, kept: Tensor, ops: Any = torch.ops.xray_emulated
    ) -> dict[str, Tensor]:
        before = kept.clone()
        found = ops.contrastive_statistics_backward(
            self.image, self.text, self.scale, self.image_labels, self.text_labels, row_lse, column_lse, kept,
            self.grad_row, self.grad_column, self.grad_positive, self.workspace, self.image_grad, self.text_grad,
        )  # fmt: skip
        assert torch.equal(kept.nan_to_num(), before.nan_to_num()), "kept logits are not the backward's to change"
        return dict(zip(("grad_image", "grad_text", "grad_scale"), found, strict=True))

    def clip(self, ops: Any = torch.ops.xray_emulated) -> dict[str, Tensor]:
        found = self.statistics(ops)
        return {**found, **self.backward(found["row_lse"], found["column_lse"], found["kept"], ops)}

    def siglip(self, ops: Any = torch.ops.xray_emulated) -> dict[str, Tensor]:
        found = ops.sigmoid_contrastive(
            self.image, self.text, self.scale, self.bias, self.image_labels, self.text_labels, self.image_pairs,
            self.text_pairs, self.workspace, self.image_grad, self.text_grad,
        )  # fmt: skip
        names = ("loss", "grad_image", "grad_text", "grad_scale", "grad_bias", "image_ranks", "text_ranks")
        return dict(zip(names, found, strict=True))

    def run(self, ops: Any = torch.ops.xray_emulated) -> dict[str, Tensor]:
        return {f"{loss} {k}": v for loss in ("clip", "siglip") for k, v in getattr(self, loss)(ops).items()}


def made(
    n: int, columns: int, width: int, *, dtype: torch.dtype = torch.float32, scale: float = 14.0,
    captions: int | None = None, **more: Any,
) -> Call:  # fmt: skip
    """Unit vectors; without `captions`, image i belongs to text 2 i."""
    gen = (torch.float64, torch.device("cpu"), torch.Generator().manual_seed(n + 7 * columns + 31 * width))
    image, text = (torch.nn.functional.normalize(randn(rows, width, like=gen), dim=1) for rows in (n, columns))
    if captions is None:
        image_labels, text_labels = torch.arange(n) * 2, torch.arange(columns)
    else:
        image_labels, text_labels = (torch.randint(captions, (rows,), generator=gen[2]) for rows in (n, columns))
    drawn: list[Any] = [randn(rows, like=gen).float() * scale / 3 for rows in (n, columns)]
    drawn += [randn(rows, like=gen) / 8 for rows in (n, columns, n)]
    return Call(
        image.to(dtype), text.to(dtype), torch.tensor(scale), torch.tensor(-5.0), image_labels.int(),
        text_labels.int(), *drawn, **more,
    )  # fmt: skip


def check(call: Call, what: str, given: Call | None = None) -> dict[str, Tensor]:
    """Within the rule, its yardstick being the reference in the same dtype. Sums over all logits, whose error is a
    matter of luck, to the rounding of what is summed; and gradients for which dS is rounded to half precision, where
    the reference does not, to that rounding as a whole."""
    actual, oracle, yardstick = (given or call).run(), call.in_double().run(reference), call.run(reference)
    is_half = call.image.dtype != torch.float32 and call.image.shape[0] * call.text.shape[0] > 64 * 64
    rounding = torch.finfo(call.image.dtype).eps if is_half else 1e-6
    bounds = {
        "siglip loss": 1e-6 * oracle["siglip loss"],
        "siglip grad_bias": torch.tensor(1e-6 * len(call.image) * len(call.text)),
    }
    for loss in ("clip", "siglip"):
        of_pairs = len(call.image) ** 0.5 / call.scale.clamp(min=1e-6)
        bounds[f"{loss} grad_scale"] = rounding * oracle[f"{loss} grad_image"].norm() * of_pairs
        if is_half:
            bounds |= {f"{loss} {name}": rounding * oracle[f"{loss} {name}"].norm() for name in GRADIENTS}
    for name, bound in bounds.items():
        got, truth = actual[name].double(), oracle.pop(name)
        assert got.shape == truth.shape
        error = (got - truth).norm()
        assert error <= bound + 1e-5, f"{what} {name}: off by {error:.3g}, more than {bound:.3g}"
    assert_within_rule({name: actual[name] for name in oracle}, yardstick, oracle, what=what)
    return actual


SHAPES = [(1, 1, 1), (1, 300, 5), (300, 1, 5), (8, 8, 8), (128, 128, 16), (129, 257, 24), (63, 131, 37), (200, 90, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, gpu: SetGpu) -> None:
    check(made(*shape, dtype=dtype), f"{shape} {dtype}")
    if min(shape) > 1:
        check(made(*shape, dtype=dtype, captions=6, scale=60.0, kept_rows=shape[0] // 3), f"{shape} {dtype} captions")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept_rows", [0, 1, 130, 256, 301])
def test_several_panels(kept_rows: int, dtype: torch.dtype, gpu: SetGpu) -> None:
    """Cut sides, and kept rows that end inside of a panel. Statistics do not depend on the cuts but for rounding."""
    call = made(301, 300, 12, dtype=dtype, captions=150, kept_rows=kept_rows)
    whole = check(call, "one panel")
    for workspace in (2**20, 2**18, 2**14 + 2**12):
        cut = check(replace(call, workspace=workspace), f"{workspace} bytes")
        for name in ("clip row_lse", "clip column_lse", "clip positive", "clip kept"):
            torch.testing.assert_close(cut[name], whole[name], rtol=1e-6, atol=1e-5)


def test_gradients_that_are_not_asked_for(gpu: SetGpu) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = made(90, 140, 16, dtype=dtype, workspace=MANY_PANELS)
        both = call.run()
        for image_grad, text_grad in ((True, False), (False, True), (False, False)):
            one = replace(call, image_grad=image_grad, text_grad=text_grad).run()
            for loss in ("clip", "siglip"):
                for name, wanted in (("image", image_grad), ("text", text_grad), ("scale", image_grad)):
                    expected = both[f"{loss} grad_{name}"]
                    if not wanted:
                        expected = torch.zeros_like(expected) if name == "scale" else expected.new_empty(0)
                    torch.testing.assert_close(one[f"{loss} grad_{name}"], expected, rtol=1e-5, atol=1e-6)
            assert bool(one["siglip grad_bias"]) == image_grad
            torch.testing.assert_close(one["siglip loss"], both["siglip loss"], rtol=1e-9, atol=0)


def test_ranks_are_optional_on_either_side(gpu: SetGpu) -> None:
    call = made(140, 90, 16, captions=20)
    whole, none = call.run(), torch.empty(0)
    for images, texts in ((True, False), (False, True), (False, False)):
        part = replace(
            call, image_pairs=call.image_pairs if images else none, text_pairs=call.text_pairs if texts else none
        ).run()
        for loss in ("clip", "siglip"):
            for name, wanted in (("image_ranks", images), ("text_ranks", texts)):
                expected = whole[f"{loss} {name}"]
                assert torch.equal(part[f"{loss} {name}"], expected if wanted else expected[:0])
        assert torch.equal(part["clip row_lse"], whole["clip row_lse"])


@pytest.mark.parametrize("workspace", [ONE_PANEL, 40_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_ties_count_against_the_pair(dtype: torch.dtype, workspace: int, gpu: SetGpu) -> None:
    """Products of small integers are exact: every rank is what counting finds, and many logits equal the pair's."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randint(-2, 3, (rows, 9), generator=generator).to(dtype) for rows in (150, 150))
    labels = torch.randint(80, (150,), generator=generator, dtype=torch.int32)
    pairs = torch.ops.xray_emulated.contrastive_pairs(image, text, torch.tensor(0.5))
    logits = image.double() @ text.double().T * 0.5
    assert torch.equal(pairs.double(), logits.diagonal())
    others = labels[:, None] != labels
    assert ((logits == pairs[:, None]) & others).sum() > 500
    call = replace(
        made(150, 150, 9), image=image, text=text, scale=torch.tensor(0.5), image_labels=labels, text_labels=labels,
        image_pairs=pairs, text_pairs=pairs, workspace=workspace,
    )  # fmt: skip
    found = call.run()
    for loss in ("clip", "siglip"):
        assert torch.equal(found[f"{loss} image_ranks"], ((logits >= pairs[:, None]) & others).sum(1).int())
        assert torch.equal(found[f"{loss} text_ranks"], ((logits >= pairs) & others).sum(0).int())
    assert found["clip image_ranks"].dtype == torch.int32


@pytest.mark.parametrize("shape", [(1, 1), (7, 37), (64, 64), (33, 1030)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs(dtype: torch.dtype, shape: tuple[int, int], gpu: SetGpu) -> None:
    call = made(shape[0], shape[0], shape[1], dtype=dtype, scale=100.0)
    expected = reference.contrastive_pairs(call.image.double(), call.text.double(), call.scale.double())
    for change in (lambda x: x, lambda x: x.T.contiguous().T, before_a_guard):
        actual = torch.ops.xray_emulated.contrastive_pairs(change(call.image), change(call.text), call.scale)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype: torch.dtype, gpu: SetGpu) -> None:
    """Scale 100: rows whose largest logits are far apart within one tile, and exponentials that underflow."""
    call = made(140, 150, 8, dtype=dtype, scale=100.0, captions=40)
    image = call.image * torch.linspace(0.01, 8, 140)[:, None].to(dtype)
    check(replace(call, image=image, kept_rows=50), f"large {dtype}")


@pytest.mark.parametrize("value", [INFINITY, -INFINITY, NAN], ids=str)
@pytest.mark.parametrize("where", ["image", "all images", "text", "scale", "bias"])
def test_not_finite(where: str, value: float, gpu: SetGpu) -> None:
    """Not finite where the reference is not, and nowhere else; ranks as the reference's."""
    call = made(140, 150, 8)
    changed = call.with_tensors(torch.clone)
    changed.image[:, 5], changed.text[:, 5] = changed.image[:, 5].abs() + 0.1, changed.text[:, 5].abs() + 0.1
    if where in ("scale", "bias"):
        getattr(changed, where).fill_(value)
    else:
        part: Any = slice(None) if where == "all images" else 77
        getattr(changed, where.split()[-1].removesuffix("s"))[part, 5] = value
    for loss in ("clip", "siglip"):
        actual, expected = getattr(changed, loss)(), getattr(changed.in_double(), loss)(reference)
        for name, truth in expected.items():
            if truth.is_floating_point():
                assert torch.equal(actual[name].isfinite(), truth.isfinite()), f"{loss} {name}"
                assert name not in ("loss", "kept") or torch.equal(actual[name].isnan(), truth.isnan())
            else:
                assert torch.equal(actual[name], truth), f"{loss} {name}"


def test_logits_of_minus_infinity_beside_others_weigh_nothing(gpu: SetGpu) -> None:
    """Whole tiles of -inf, in rows and in columns, that other tiles have numbers for."""
    call = made(260, 140, 8)
    image, text = call.image.abs(), call.text.abs()
    image[:, 7], text[:, 7] = 0.0, 0.0
    image[130:, 7], text[:128, 7] = 1.0, -INFINITY
    found = replace(call, image=image, text=text, workspace=ONE_PANEL).statistics()
    logits = image.double() @ text.double().T * 14
    logits[:130, :128] = NAN  # 0 * inf
    assert torch.equal(found["row_lse"].isnan(), logits.logsumexp(1).isnan())
    torch.testing.assert_close(found["row_lse"][130:], logits.logsumexp(1)[130:], rtol=1e-6, atol=0)
    columns = logits[130:].logsumexp(0)
    part = replace(call, image=image[130:], text=text, image_labels=call.image_labels[130:]).with_tensors(torch.clone)
    part = replace(part, image_pairs=call.image_pairs[130:])
    for workspace in (ONE_PANEL, 20_000):
        found = replace(part, workspace=workspace).statistics()
        torch.testing.assert_close(found["column_lse"], columns, rtol=1e-6, atol=0)
        assert (found["column_lse"][:128] == -INFINITY).all()
        torch.testing.assert_close(found["row_lse"], logits.logsumexp(1)[130:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_threads_and_number_of_processors_do_not_matter(dtype: torch.dtype, gpu: SetGpu) -> None:
    call = made(150, 290, 8, dtype=dtype, captions=60, kept_rows=40, workspace=2**19)
    call.grad_row[100] = 2.0**20  # float16 overflows where the largest gradient is not the one that all wait for
    seen = []
    for processors, schedule in ((4, 0), (1, 1), (132, 2), (7, 3)):
        gpu(processors, schedule)
        seen.append(call.run())
    for other in seen[1:]:
        assert all(torch.equal(other[name], seen[0][name]) for name in other)


def strided(kind: str, value: Tensor) -> Tensor:
    if kind == "guarded":
        return before_a_guard(value)
    if value.dim() == 1:
        return torch.stack((value, value), -1)[..., 0] if kind == "gaps" else value
    if value.dim() == 0:
        return value
    if kind == "gaps":
        return value.new_full((value.shape[0], value.shape[1] + 8), NAN)[:, : value.shape[1]].copy_(value)
    if kind == "odd offset":
        return value.new_zeros(value.numel() + 1)[1:].view(value.shape).copy_(value)
    if kind == "turned":
        return value.T.contiguous().T
    return value.repeat_interleave(2, 0)[::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gaps", "odd offset", "turned", "every other", "guarded"])
def test_strides_and_alignment(kind: str, dtype: torch.dtype, gpu: SetGpu) -> None:
    """Also of kept logits and of log-sum-exps, and nothing is read past the end of any input."""
    for columns in (136, 133):
        call = made(130, columns, 16, dtype=dtype, captions=30, kept_rows=66, workspace=2**17)
        given = call.with_tensors(lambda x: strided(kind, x))
        check(call, kind, given)
        found = call.statistics()
        inputs = [found[name] for name in ("row_lse", "column_lse", "kept")]
        expected, actual = call.backward(*inputs), given.backward(*(strided(kind, x) for x in inputs))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-4, 1e6])
def test_float16_gradients_of_any_size(size: float, gpu: SetGpu) -> None:
    """float16 holds neither dS of a large batch, 5e-10, nor what is above 65,504; the gradient of the scale, float32,
    shows that no dS was lost: all of one sign, none cancels."""
    call = made(150, 140, 16, dtype=torch.float16)
    call = call.with_tensors(lambda x: x.abs() if x.is_floating_point() else x)
    for names in (["grad_row", "grad_column", "grad_positive"], ["grad_column"], ["grad_positive"], []):
        grads: dict[str, Any] = {
            name: getattr(call, name) * (size if name in names else 0.0)
            for name in ("grad_row", "grad_column", "grad_positive")
        }
        sized = replace(call, **grads)
        actual, expected = sized.clip()["grad_scale"], sized.in_double().clip(reference)["grad_scale"]
        torch.testing.assert_close(actual.double(), expected, rtol=2**-10, atol=0)


def test_small_float16_gradients_beside_a_large_one(gpu: SetGpu) -> None:
    """Rows whose gradient is 1e-5 of the largest keep their digits."""
    call = made(150, 140, 16, dtype=torch.float16)
    grad_row = torch.full((150,), 0.1, dtype=torch.float64)
    grad_row[3] = 1e4
    call = replace(call, grad_row=grad_row, grad_column=call.grad_column * 0, grad_positive=call.grad_positive * 0)
    actual, expected = call.clip()["grad_image"].double(), call.in_double().clip(reference)["grad_image"]
    assert ((actual - expected).norm(dim=1) <= 2**-9 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_gradients_of_pairs_that_do_not_match(dtype: torch.dtype, gpu: SetGpu) -> None:
    """SigLIP's dS of 1e-7 and less, each of them a few steps of a float16 from 0."""
    call = made(150, 140, 16, dtype=dtype, scale=3.0)
    call = replace(call, bias=torch.tensor(-16.0), image_labels=call.image_labels + 1000)
    actual, expected = call.siglip(), call.in_double().siglip(reference)
    for name in GRADIENTS:
        error = (actual[name].double() - expected[name]).norm()
        assert error <= torch.finfo(dtype).eps * expected[name].norm(), name


@pytest.mark.parametrize("shape", [(0, 5, 8), (5, 0, 8), (0, 0, 8), (5, 70, 0), (80, 70, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_sides(dtype: torch.dtype, shape: tuple[int, int, int], gpu: SetGpu) -> None:
    call = made(*shape, dtype=dtype)
    actual, expected = call.run(), call.run(reference)
    for name, truth in expected.items():
        torch.testing.assert_close(actual[name], truth, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_stays_within_the_workspace(dtype: torch.dtype, gpu: SetGpu) -> None:
    torch.use_deterministic_algorithms(False)
    n, width = 600, 16
    for workspace in (2**17, 2**18, 2**20):
        call = made(n, n, width, dtype=dtype, workspace=workspace)
        # the stand-in for the library's products widens half precision, which the library does not
        widened = 0 if dtype == torch.float32 else workspace + 8 * n * width
        gradients, statistics = 2 * n * width * (4 + dtype.itemsize), 16 * n * 8
        for run in (call.siglip, call.clip):
            assert workspace / 2 < peak_bytes(run) < workspace + gradients + statistics + widened


def test_errors_name_what_is_wrong(gpu: SetGpu) -> None:
    call = made(6, 6, 4)
    for change, message in (
        ({"image": call.image.double(), "text": call.text.double()}, "image must be float32.*XRAY_KERNELS=reference"),
        ({"text": call.text.half()}, "text must have the dtype and width of image"),
        ({"text": call.text[:, :3]}, "text must have the dtype and width of image"),
        ({"scale": torch.ones(2)}, "logit_scale must have one element, got 2"),
        ({"image_labels": call.image_labels.long()}, "image_labels must be int32 for the CUDA kernel"),
        ({"text_labels": call.text_labels[:5]}, "text_labels must have 6 elements, got 5"),
        ({"image_pairs": call.image_pairs[:5]}, "image_pairs must have 6 elements or none, got 5"),
        ({"kept_rows": 7}, "kept_rows must be from 0 to 6, got 7"),
    ):
        with pytest.raises(RuntimeError, match=message):
            replace(call, **change).statistics()
    with pytest.raises(RuntimeError, match="logit_bias must have one element, got 3"):
        replace(call, bias=torch.ones(3)).siglip()
    found = call.statistics()
    with pytest.raises(RuntimeError, match="kept must be what contrastive_statistics returned"):
        call.backward(found["row_lse"], found["column_lse"], torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match="must be one a row or column"):
        call.backward(found["row_lse"][:5], found["column_lse"], found["kept"])
    with pytest.raises(RuntimeError, match="text must have the shape and dtype of image"):
        torch.ops.xray_emulated.contrastive_pairs(call.image, call.text[:5], call.scale)
