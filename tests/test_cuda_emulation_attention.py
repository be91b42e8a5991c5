"""The CUDA kernels of class_scores and its backward on the CPU, as in `test_cuda_emulation.py`."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import cuda_emulated
import pytest
import torch
from cuda_emulated import DTYPES, SetGpu
from guards import before_a_guard
from torch import Tensor

from xray_kernels.attention import attention_with_scores, ops, reference
from xray_kernels.attention.spec import SPECS
from xray_kernels.testing import Case, assert_within_rule, convert, randn, results

SPEC = next(spec for spec in SPECS if spec.name == "attention_with_scores")
CASES = [pytest.param(case, id=case.name) for case in SPEC.cases]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulated kernels, loaded as the ops `xray_emulated::*` of the CPU."""
    folder = tmp_path_factory.mktemp("emulation")
    return cuda_emulated.load("attention", ["class_scores", "class_scores_backward"], folder)[1]


@pytest.fixture
def gpu(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[SetGpu]:
    """Scores beside any attention come from the emulated kernels. Uninitialised tensors are filled with NaN."""
    for name in ("class_scores", "class_scores_backward"):
        monkeypatch.setattr(ops, name, getattr(torch.ops.xray_emulated, name).default)
    with cuda_emulated.emulating(emulated) as set_gpu:
        yield set_gpu


@dataclass(frozen=True)
class Call:
    """Arguments of both ops; `grad_query` and `grad_key` are added to."""

    query: Tensor
    key: Tensor
    grad_scores: Tensor
    grad_query: Tensor
    grad_key: Tensor
    scale: float
    prefix: int = 1
    key_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def with_tensors(self, change: Any) -> Call:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})

    def in_double(self) -> Call:
        return self.with_tensors(lambda x: x.double() if x.is_floating_point() else x)

    def run(self, implementation: Any = torch.ops.xray_emulated, longest: int | None = None) -> dict[str, Tensor]:
        """Both ops, the second on copies with the strides of the gradients."""
        longest = self.key.shape[2] if longest is None else longest
        scores, row = implementation.class_scores(
            self.query, self.key, self.scale, self.prefix, self.key_lengths, self.cu_seqlens, longest
        )
        grads = [between_sevens(x) for x in (self.grad_query, self.grad_key)]
        implementation.class_scores_backward(
            self.grad_scores, self.query, self.key, row, self.scale, self.prefix, self.cu_seqlens, longest, *grads
        )
        for grad in grads:
            memory = grad.new_empty(0).set_(grad.untyped_storage())
            between = torch.ones_like(memory, dtype=torch.bool)
            between.as_strided(grad.shape, grad.stride(), grad.storage_offset()).fill_(False)
            assert (memory[between] == 7).all(), "wrote between the elements of a gradient"
        return {"scores": scores, "class_row": row, "grad_query": grads[0], "grad_key": grads[1]}

    def compose(self) -> dict[str, Tensor]:
        """The same by plain differentiable PyTorch in the dtype of the inputs, one sequence after the other."""
        query, key = (x.detach().requires_grad_() for x in (self.query, self.key))
        bounds = [0, key.shape[2]] if self.cu_seqlens is None else self.cu_seqlens.tolist()
        scores, rows = [], []
        for first, last in itertools.pairwise(bounds):
            if first == last:
                continue
            logits = (query[:, :, first : first + 1] @ key[:, :, first:last].mT * self.scale)[:, :, 0]
            if self.key_lengths is not None:
                masked = torch.arange(last) >= self.key_lengths[:, None, None]
                row = logits.masked_fill(masked & ~masked.all(-1, keepdim=True), float("-inf")).softmax(-1)
                row = row * ~masked.all(-1, keepdim=True)
            else:
                row = logits.softmax(-1)
            rows.append(row)
            if self.cu_seqlens is None:
                scores.append(row[:, :, self.prefix :].mean(1))
            else:
                scores.append(row.mean(1).masked_fill(torch.arange(last - first) < self.prefix, 0))
        total, row = torch.cat(scores, 1), torch.cat(rows, 2)
        grads = torch.autograd.grad(total, (query, key), self.grad_scores.to(total.dtype))
        return {
            "scores": total.detach(),
            "class_row": row.detach(),
            "grad_query": self.grad_query + grads[0],
            "grad_key": self.grad_key + grads[1],
        }


def between_sevens(value: Tensor) -> Tensor:
    """A copy with the same strides and alignment, and 7 in the memory around and between its elements."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True) if n > 1)
    offset = value.data_ptr() % 16 // value.element_size()
    memory = value.new_full((span + offset + 16,), 7.0)
    return memory.as_strided(
        value.shape, value.stride(), 8 + (offset - memory.data_ptr() // value.element_size()) % 8
    ).copy_(value)


def made(
    batch: int, heads: int, length: int, channels: int, *, dtype: torch.dtype = torch.float32, prefix: int = 1,
    peak: float = 1.0, lengths: list[int] | None = None, packed: list[int] | None = None,
) -> Call:  # fmt: skip
    gen = (dtype, torch.device("cpu"), torch.Generator().manual_seed(length * channels))
    shape = (batch, heads, length, channels)
    grad_scores = randn(batch, length if packed else length - prefix, like=gen).float() * (10 * peak)
    query, key, grad_query, grad_key = (randn(*shape, like=gen) for _ in range(4))
    return Call(
        query * peak, key, grad_scores, grad_query, grad_key, channels**-0.5, prefix,
        None if lengths is None else torch.tensor(lengths),
        None if packed is None else torch.tensor([0, *packed]).cumsum(0).int(),
    )  # fmt: skip


def check(call: Call, what: str, given: Call | None = None, longest: int | None = None) -> dict[str, Tensor]:
    """Forward and backward within the rule; gradients that no score reaches keep their bits."""
    actual = (given or call).run(longest=longest)
    oracle, yardstick = call.in_double().run(reference), call.compose()
    assert_within_rule(actual, yardstick, oracle, what=what)
    classes = [0] if call.cu_seqlens is None else call.cu_seqlens[:-1].tolist()
    others = [i for i in range(call.query.shape[2]) if i not in classes]
    assert torch.equal(actual["grad_query"][:, :, others], call.grad_query[:, :, others])
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 33, 197, 256, 257, 577, 1569])
def test_lengths(length: int, dtype: torch.dtype, gpu: SetGpu) -> None:
    check(made(2, 3, length, 64, dtype=dtype), f"N = {length} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 8, 16, 37, 64, 72, 80, 96, 127, 128, 250, 256])
def test_head_dims(channels: int, dtype: torch.dtype, gpu: SetGpu) -> None:
    """Teams of one lane to 32, whole and with lanes to spare; vectors and single elements."""
    check(made(2, 2, 75, channels, dtype=dtype), f"D = {channels} {dtype}")


@pytest.mark.parametrize("prefix", [1, 2, 3, 4, 5])
def test_prefix_tokens(prefix: int, gpu: SetGpu) -> None:
    for length in (6, 140, 300):
        check(made(2, 2, length, 32, prefix=prefix), f"P = {prefix}, N = {length}")


@pytest.mark.parametrize("heads", [1, 4, 5, 12, 16, 17, 33])
def test_heads(heads: int, gpu: SetGpu) -> None:
    check(made(2, heads, 45, 16), f"H = {heads}")
    if heads == 12:
        # each head's own probabilities, in its own place: a head attends to one key alone
        query = torch.zeros(1, heads, 30, 16)
        key, query[:, :, 0, 0] = torch.zeros(1, heads, 30, 16), 100.0
        key[0, range(heads), range(2, heads + 2), 0] = 10.0
        scores, row = torch.ops.xray_emulated.class_scores(query, key, 1.0, 1, None, None, 30)
        assert torch.equal(row[0, :, 2 : heads + 2], torch.eye(heads))
        torch.testing.assert_close(scores[0], torch.ones(29).div(heads) * row[0].sum(0)[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_key_lengths(integer: torch.dtype, dtype: torch.dtype, gpu: SetGpu) -> None:
    lengths = [300, 0, 1, 17, 32, 33, 1000, 256, -3]
    call = made(len(lengths), 2, 300, 40, dtype=dtype, lengths=lengths, prefix=2)
    call = replace(call, key_lengths=torch.tensor(lengths, dtype=integer))
    given = replace(call, key_lengths=torch.tensor([[n, 7] for n in lengths], dtype=integer)[:, 0])
    actual = check(call, f"lengths {dtype}", given)
    for row, length in enumerate(lengths):
        assert not actual["class_row"][row, :, max(0, length) :].any()
        masked = slice(max(0, length), None)
        assert torch.equal(actual["grad_key"][row, :, masked], call.grad_key[row, :, masked])


def test_what_is_in_masked_keys_does_not_matter(gpu: SetGpu) -> None:
    call = made(3, 2, 70, 64, lengths=[40, 0, 65])
    expected = call.run()
    key = call.key.clone()
    for row, length in enumerate([40, 0, 65]):
        key[row, :, length:] = float("nan")
    actual = replace(call, key=key).run()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


PACKED = {
    "clips": [197, 33, 257, 1, 577],
    "empty ones": [0, 7, 0, 0, 40, 0],
    "nothing": [0, 0, 0],
    "one": [300],
    "pieces end with sequences": [32, 256, 128, 0, 256, 32],
    "forty": [(7 * i) % 50 for i in range(40)],
    "more than a warp looks at twice": [1] * 1100,
}


@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
def test_packed(lengths: list[int], gpu: SetGpu) -> None:
    many = len(lengths) > 1000
    for dtype in (torch.float32,) if many else (torch.float32, torch.bfloat16):
        heads, channels = (1, 8) if many else (3, 40)
        call = made(1, heads, sum(lengths), channels, dtype=dtype, prefix=2, packed=lengths)
        if sum(lengths) == 0:
            assert call.run()["scores"].shape == (1, 0)
            continue
        actual = check(call, f"packed {lengths} {dtype}")
        wide = call.with_tensors(lambda x: x.long() if x.dtype == torch.int32 else x)
        for longest in (0,) if many else (0, 5, max(lengths)):  # sizes nothing here
            other = wide.run(longest=longest)
            assert all(torch.equal(other[name], actual[name]) for name in actual)


def test_packed_bounds_outside_of_the_tokens_touch_nothing_else(gpu: SetGpu) -> None:
    call = made(1, 2, 60, 16, packed=[20, 40]).with_tensors(before_a_guard)
    for bounds in ([-5, 1000, 3], [50, 10, 60], [2**31 - 1, -(2**31), 70], [60, 60, 60]):
        replace(call, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).run()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype: torch.dtype, gpu: SetGpu) -> None:
    for scale in (1.0, 12.5):
        call = replace(made(2, 3, 197, 64, dtype=dtype, peak=4.0), scale=scale)
        logits = scale * (call.query[:, :, :1].double() @ call.key.double().mT)
        assert logits.abs().max() > 80 * scale
        check(call, f"scale {scale} {dtype}")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", ["key", "a tile of keys", "all keys", "query"])
def test_not_finite(where: str, value: float, gpu: SetGpu) -> None:
    """Not finite where the reference is not, and nowhere else; no neighbouring row or head hears of it."""
    call = made(2, 3, 100, 64)
    query, key = call.query.clone(), call.key.clone()
    query[:, :, 0, 5] = query[:, :, 0, 5].abs()  # so that a key's -inf is a logit of -inf
    if where == "query":
        query[1, 2, 0, 5] = value
    else:
        key[1, 2, {"key": slice(40, 41), "a tile of keys": slice(32, 64), "all keys": slice(None)}[where], 5] = value
    changed = replace(call, query=query, key=key)
    actual, expected = changed.run(), changed.in_double().run(reference)
    for name in ("scores", "class_row"):
        assert torch.equal(actual[name].isfinite(), expected[name].isfinite())
    clean = replace(call, query=query if where != "query" else changed.query.nan_to_num(0, 0, 0)).run()
    assert torch.equal(actual["class_row"][:, :2], clean["class_row"][:, :2])
    assert torch.equal(actual["class_row"][0], clean["class_row"][0])
    assert torch.equal(actual["grad_key"][0], clean["grad_key"][0])


@pytest.mark.parametrize("packed", [None, [140, 0, 70, 300]], ids=["rows", "packed"])
def test_order_of_threads_and_number_of_processors_do_not_matter(packed: list[int] | None, gpu: SetGpu) -> None:
    call = made(1 if packed else 2, 5, 510, 72, packed=packed)
    seen = []
    for processors, schedule in ((4, 0), (1, 1), (132, 2), (7, 3)):
        gpu(processors, schedule)
        seen.append(call.run())
    for other in seen[1:]:
        assert all(torch.equal(other[name], seen[0][name]) for name in other)


def strided(kind: str, value: Tensor) -> Tensor:
    if value.dim() != 4:
        return torch.stack((value, value), -1)[..., 0] if kind == "gaps" and value.dim() else value
    batch, heads, length, channels = value.shape
    if kind == "gaps":
        return value.new_zeros(batch, heads, length, channels + 8)[..., :channels].copy_(value)
    if kind == "odd offset":
        return value.new_zeros(value.numel() + 1)[1:].view(value.shape).copy_(value)
    if kind == "odd rows":
        return value.new_zeros(batch, heads, length, channels + 1)[..., :channels].copy_(value)
    if kind == "one projection":
        return value.new_zeros(batch, length, 3, heads, channels)[:, :, 1].transpose(1, 2).copy_(value)
    if kind == "tokens last":
        return value.mT.contiguous().mT
    return value.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


STRIDES = ["gaps", "odd offset", "odd rows", "one projection", "tokens last", "all turned"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["all", "query", "key", "grad_query", "grad_key", "grad_scores"])
@pytest.mark.parametrize("kind", STRIDES)
def test_strides_and_alignment(kind: str, which: str, dtype: torch.dtype, gpu: SetGpu) -> None:
    call = made(2, 3, 45, 32, dtype=dtype)
    if which == "all":
        given = call.with_tensors(functools.partial(strided, kind))
    else:
        given = call.with_tensors(lambda x: strided(kind, x) if x is getattr(call, which) else x)
    check(call, f"{which} {kind}", given)


@pytest.mark.parametrize("kind", STRIDES)
def test_strides_of_more_than_one_slice(kind: str, gpu: SetGpu) -> None:
    call = made(1, 2, 300, 16)
    check(call, kind, call.with_tensors(functools.partial(strided, kind)))


def test_gradient_of_a_sum_is_a_broadcast_number(gpu: SetGpu) -> None:
    call = made(3, 2, 40, 16)
    call = replace(call, grad_scores=torch.tensor(3.0).expand(3, 39))
    check(call, "expanded")


@pytest.mark.parametrize("channels", [8, 16, 37, 72, 256])
def test_reads_nothing_past_its_inputs(channels: int, gpu: SetGpu) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for more in ({"lengths": [45, 33]}, {"packed": [5, 31, 9]}):
            call = made(1 if "packed" in more else 2, 3, 45, channels, dtype=dtype, **more)  # type: ignore[arg-type]
            given = call.with_tensors(before_a_guard)
            check(call, "guarded", given)
            # in place, on the guarded memory itself
            row = before_a_guard(call.in_double().run(reference)["class_row"].float())
            expected = call.run()
            torch.ops.xray_emulated.class_scores_backward(
                given.grad_scores, given.query, given.key, row, call.scale, call.prefix, given.cu_seqlens, 45,
                given.grad_query, given.grad_key,
            )  # fmt: skip
            for name in ("grad_query", "grad_key"):
                torch.testing.assert_close(getattr(given, name), expected[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [100, 300])
def test_gradients_are_rounded_once(length: int, dtype: torch.dtype, gpu: SetGpu) -> None:
    """What is added is not itself rounded to half precision: nearly all sums are the exact ones, rounded."""
    call = made(2, 2, length, 64, dtype=dtype, peak=3.0)
    actual, exact = call.run(), call.in_double().run(reference)
    for name in ("grad_query", "grad_key"):
        same = actual[name] == exact[name].to(dtype)
        assert same.float().mean() > 0.999, name
    twice = call.grad_key + (exact["grad_key"] - call.grad_key.double()).to(dtype)
    assert (twice == exact["grad_key"].to(dtype)).float().mean() < 0.99  # the test can tell


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_scores_beside_another_attention(case: Case, dtype: torch.dtype, gpu: SetGpu) -> None:
    """The public function over PyTorch's attention, whose gradients the kernel adds to."""
    inputs = case.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))

    actual = results(functools.partial(attention_with_scores, backend="sdpa"), inputs)
    oracle = results(SPEC.composition, convert(inputs, torch.float64))
    assert_within_rule(actual, results(SPEC.composition, inputs), oracle, what=f"{case.name} {dtype} emulated")


def test_errors_name_what_is_wrong(gpu: SetGpu) -> None:
    forward, backward = torch.ops.xray_emulated.class_scores, torch.ops.xray_emulated.class_scores_backward
    x, wide = torch.zeros(2, 1, 4, 8), torch.zeros(1, 1, 4, 257)
    with pytest.raises(RuntimeError, match=r"query must be float32.*XRAY_KERNELS=reference takes float64"):
        forward(x.double(), x.double(), 1.0, 1, None, None, 4)
    with pytest.raises(RuntimeError, match=r"head dimension of 257; the CUDA kernel takes at most 256 \(XRAY_KERNELS="):
        forward(wide, wide, 1.0, 1, None, None, 4)
    with pytest.raises(RuntimeError, match="num_prefix_tokens must be at most 4"):
        forward(x, x, 1.0, 5, None, None, 4)
    with pytest.raises(RuntimeError, match="packed sequences have no key_lengths"):
        forward(x[:1], x[:1], 1.0, 1, torch.tensor([4]), torch.tensor([0, 4]), 4)
    with pytest.raises(RuntimeError, match="key_lengths must be int32 or int64"):
        forward(x, x, 1.0, 1, torch.zeros(2), None, 4)
    with pytest.raises(RuntimeError, match="grad_key must have the shape and dtype"):
        backward(torch.zeros(2, 3), x, x, torch.zeros(2, 1, 4), 1.0, 1, None, 4, x.clone(), x.half())
    with pytest.raises(RuntimeError, match="must have the shapes that class_scores returns"):
        backward(torch.zeros(2, 4), x, x, torch.zeros(2, 1, 4), 1.0, 1, None, 4, x.clone(), x.clone())


def test_plan_has_a_place_for_every_key() -> None:
    host = pytest.importorskip("xray_kernels._host", exc_type=ImportError)
    sizes = {"tiles": 32, "chunks": 128, "slices": 256}
    for length in (1, 32, 33, 197, 256, 257, 1569):
        plan = host.plan_class_row(length)
        assert all(plan[name] * size >= length > (plan[name] - 1) * size for name, size in sizes.items())
    # one image of 12 heads has a warp for most processors, and its backward no second launch
    assert 12 * host.plan_class_row(197)["tiles"] == 84
    assert host.plan_class_row(197)["slices"] == 1
    for lengths in PACKED.values():
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        plan = host.plan_class_row(starts[-1], len(lengths), packed=True)
        for name, size in sizes.items():
            ends = [
                start // size + i + -(-n // size) for i, (start, n) in enumerate(zip(starts, lengths, strict=False))
            ]
            firsts = [start // size + i for i, start in enumerate(starts)]
            assert all(end <= first for end, first in zip(ends, firsts[1:], strict=True))
            assert ends[-1] <= plan[name]
