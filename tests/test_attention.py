"""Properties of attention that the generic contract does not state."""

from __future__ import annotations

import itertools

import pytest
import torch
from memory import needs_account, run_measured
from torch.nn import functional as F

from xray import ops
from xray_kernels import _library, testing
from xray_kernels.attention.spec import SPECS


def qkv(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_sdpa(is_causal: bool) -> None:
    query, key, value = qkv(2, 3, 40, 16)
    out = ops.attention(query, key, value, is_causal=is_causal)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, is_causal=is_causal))


def test_out_merges_heads_for_free() -> None:
    out = ops.attention(*qkv(2, 3, 10, 16))
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    out, _ = ops.attention_with_scores(*qkv(2, 3, 10, 16))
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


def test_scores_are_the_class_row() -> None:
    query, key, value = qkv(2, 3, 10, 8)
    out, scores = ops.attention_with_scores(query, key, value, num_prefix_tokens=3)
    row = (query[:, :, :1] @ key.transpose(-2, -1) * 8**-0.5).softmax(-1)[:, :, 0]
    torch.testing.assert_close(scores, row[:, :, 3:].mean(1))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value))
    _, all_but_class = ops.attention_with_scores(query, key, value)
    torch.testing.assert_close(all_but_class.sum(1) + row[:, :, 0].mean(1), torch.ones(2))


def test_padding_does_not_matter() -> None:
    """What lies past a row's length changes neither the result nor receives a gradient; length 0 gives zeros."""
    query, key, value = (x.requires_grad_() for x in qkv(3, 2, 12, 8))
    lengths = torch.tensor([12, 5, 0])
    out = ops.attention(query, key, value, key_lengths=lengths)
    torch.testing.assert_close(out[1:2], F.scaled_dot_product_attention(query[1:2], key[1:2, :, :5], value[1:2, :, :5]))
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    out.sum().backward()
    for tensor in (key, value):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad[1, :, 5:], torch.zeros(2, 7, 8))
        assert torch.equal(tensor.grad[2], torch.zeros(2, 12, 8))
    assert query.grad is not None
    assert query.grad.isfinite().all()
    assert torch.equal(query.grad[2], torch.zeros(2, 12, 8))


def test_gradcheck_through_scores() -> None:
    query, key, value = (x.requires_grad_() for x in qkv(2, 2, 5, 4, dtype=torch.float64))
    for which in (slice(0, 1), slice(1, 2), slice(0, 2)):
        for name in testing.implementations("cpu"):
            with testing.use_implementation(name):
                assert torch.autograd.gradcheck(
                    lambda q, k, v, which=which: ops.attention_with_scores(q, k, v, num_prefix_tokens=2)[which],
                    (query, key, value),
                )


def test_gradcheck_of_the_rest() -> None:
    """Causal, with lengths, packed: the kernels in float64."""
    query, key, value = (x.requires_grad_() for x in qkv(2, 2, 5, 4, dtype=torch.float64))
    packed = tuple(torch.randn(9, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lengths, bounds = torch.tensor([5, 3]), torch.tensor([0, 4, 4, 9])
    for name in testing.implementations("cpu"):
        with testing.use_implementation(name):
            for arguments in ({"is_causal": True}, {"key_lengths": lengths}, {"scale": -0.7, "is_causal": True}):
                assert torch.autograd.gradcheck(
                    lambda q, k, v, arguments=arguments: ops.attention(q, k, v, **arguments), (query, key, value)
                )
            assert torch.autograd.gradcheck(
                lambda query, key, value: ops.attention_varlen_with_scores(query, key, value, bounds), packed
            )


@pytest.mark.parametrize("name", testing.implementations("cpu"))
def test_every_length_up_to_300(name: str) -> None:
    """Output, scores and gradients at each N: tails of tiles, panels and blocks of every size."""
    spec = SPECS[1]
    assert spec.name == "attention_with_scores"
    lengths = range(2, 301) if name != "reference" else (2, 3, 197)
    with testing.use_implementation(name):
        for length in lengths:
            inputs = dict(zip(("query", "key", "value"), qkv(1, 1, length, 64), strict=True))
            outputs, grads = testing.run(spec.function, inputs)
            wanted, wanted_grads = testing.run(spec.composition, testing.convert(inputs, torch.float64))
            plain, plain_grads = testing.run(spec.composition, inputs)
            what = f"[{name}] N = {length}"
            testing.assert_within_rule(
                {**outputs, **grads}, {**plain, **plain_grads}, {**wanted, **wanted_grads}, what=what
            )


@pytest.mark.parametrize("name", testing.implementations("cpu"))
@pytest.mark.parametrize(("length", "head_dim"), [(577, 64), (1025, 80), (1569, 64), (261, 96), (100, 256), (140, 5)])
def test_real_lengths(length: int, head_dim: int, name: str) -> None:
    """Several blocks of keys, forward and backward; head dims that fill no vector."""
    spec = SPECS[1]
    inputs = dict(zip(("query", "key", "value"), qkv(1, 2, length, head_dim), strict=True))
    oracle, yardstick = (
        {**outputs, **grads}
        for outputs, grads in (
            testing.run(spec.composition, testing.convert(inputs, torch.float64)),
            testing.run(spec.composition, inputs),
        )
    )
    with testing.use_implementation(name):
        outputs, grads = testing.run(spec.function, inputs)
    testing.assert_within_rule({**outputs, **grads}, yardstick, oracle, what=f"[{name}] {length} x {head_dim}")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_number_of_threads_does_not_matter(threads: int, is_causal: bool) -> None:
    """Few heads are cut into slices of queries: the same result, and the same bits in two runs."""
    query, key, value = (x.requires_grad_() for x in qkv(1, 1, 500, 32))
    bounds = torch.tensor([0, 1, 90, 90, 500])
    weight = torch.randn(1, 1, 500, 32)

    def outcome() -> list[torch.Tensor]:
        out = ops.attention(query, key, value, is_causal=is_causal)
        grads = torch.autograd.grad(out, (query, key, value), weight)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        packed, scores = ops.attention_varlen_with_scores(q, k, v, bounds)
        grads += torch.autograd.grad(
            (packed, scores), (query, key, value), (weight[0].transpose(0, 1), scores.detach())
        )
        return [out.detach(), *grads, packed.detach(), scores.detach()]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = outcome()
        torch.set_num_threads(threads)
        first, second = outcome(), outcome()
    finally:
        torch.set_num_threads(before)
    for got, again, want in zip(first, second, wanted, strict=True):
        assert torch.equal(got, again)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_packed_sequences_are_separate() -> None:
    """Each sequence's result is that of the sequence alone, bit for bit, and scores stand beside their tokens."""
    lengths = [7, 0, 1, 30, 12]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    query, key, value = qkv(sum(lengths), 2, 16)
    out, scores = ops.attention_varlen_with_scores(query, key, value, bounds)
    assert torch.equal(out, ops.attention_varlen(query, key, value, bounds))
    for first, last in itertools.pairwise(bounds):
        if last - first < 2:
            assert torch.equal(scores[first:last], torch.zeros(int(last - first)))
            continue
        alone = [x[first:last].transpose(0, 1)[None] for x in (query, key, value)]
        own_out, own_scores = ops.attention_with_scores(*alone)
        assert torch.equal(out[first:last], own_out[0].transpose(0, 1))
        assert torch.equal(scores[first + 1 : last], own_scores[0])
        assert scores[first] == 0


def test_views_of_one_projection_need_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v as a model cuts them out: same bits as from dense tensors. A last stride other than 1 is copied."""
    qkv_rows = torch.randn(2, 9, 3, 4, 16)
    views = qkv_rows.permute(2, 0, 3, 1, 4).unbind(0)
    dense = [x.contiguous() for x in views]
    assert not views[0].is_contiguous()
    spread = [x.mT.contiguous().mT for x in dense]
    assert spread[0].stride(-1) != 1
    wanted = ops.attention_with_scores(*dense)
    for given in (views, spread):
        for got, want in zip(ops.attention_with_scores(*given), wanted, strict=True):
            assert torch.equal(got, want)


def test_infinities_and_nan_stay_in_their_rows() -> None:
    """A query of infinities or NaN spoils its own row; one such key spoils the rows of its head. Never another head."""
    for bad in (float("inf"), float("nan")):
        query, key, value = qkv(1, 2, 20, 16)
        clean = ops.attention(query, key, value)
        query[0, 0, 3] = bad
        out = ops.attention(query, key, value)
        assert out[0, 0, 3].isnan().all()
        others = [i for i in range(20) if i != 3]
        assert torch.equal(out[0, 0, others], clean[0, 0, others])
        assert torch.equal(out[0, 1], clean[0, 1])
        key[0, 0, 5] = bad
        out = ops.attention(query, key, value)
        wanted = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
        assert torch.equal(out[0, 0].isnan(), wanted[0, 0].isnan())
        assert torch.equal(out[0, 1], clean[0, 1])


def test_a_zero_or_negative_scale() -> None:
    query, key, value = qkv(2, 2, 30, 16)
    for scale in (0.0, -0.5):
        for is_causal in (False, True):
            inputs = (query, key, value)
            wanted = SPECS[0].composition(*inputs, scale=scale, is_causal=is_causal)  # SDPA's is NaN at 0
            torch.testing.assert_close(ops.attention(*inputs, scale=scale, is_causal=is_causal), wanted)


def test_lengths_beyond_the_keys_mean_all() -> None:
    query, key, value = qkv(2, 2, 8, 16)
    lengths = torch.tensor([100, 8], dtype=torch.int32)
    assert torch.equal(ops.attention(query, key, value, key_lengths=lengths), ops.attention(query, key, value))
    negative = ops.attention(query, key, value, key_lengths=torch.tensor([-3, 8]))
    assert torch.equal(negative[0], torch.zeros(2, 8, 16))


GOOD = torch.zeros(2, 3, 8, 16)
BAD_CALLS = [
    ({"query": GOOD[0]}, ValueError, r"query must have shape \(B, H, N, D\)"),
    ({"key": None}, TypeError, "key must be a tensor"),
    ({"key": GOOD[:, :2]}, ValueError, r"key must have shape \(2, 3, 8, 16\)"),
    ({"value": GOOD[..., :8]}, ValueError, "value must have shape"),
    ({"value": GOOD[:, :, :5]}, ValueError, "value must have shape"),
    ({"key": GOOD.half()}, TypeError, "key is torch.float16 but query is torch.float32"),
    ({"key": GOOD.to("meta")}, RuntimeError, "key is on meta but query is on cpu"),
    ({"query": GOOD.long()}, TypeError, "query must be float32"),
    ({"query": GOOD[:, :, :0]}, ValueError, "at least one token"),
    ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
    ({"key_lengths": torch.zeros(2)}, TypeError, "key_lengths must be int32 or int64"),
    ({"key_lengths": torch.zeros(3, dtype=torch.int64)}, ValueError, r"key_lengths must have shape \(2,\)"),
    ({"dropout_p": 0.1}, TypeError, "attention does not take dropout_p: it has no dropout"),
    ({"attn_mask": GOOD}, TypeError, "attention does not take attn_mask: key_lengths and is_causal"),
    ({"enable_gqa": True}, TypeError, "attention does not take enable_gqa: key and value need as many heads"),
    ({"casual": True}, TypeError, "attention has no argument 'casual'"),
    ({"backend": "fast"}, ValueError, "backend must be auto, xray, sdpa, flash_attn, xformers, got 'fast'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    call = {"query": GOOD, "key": GOOD, "value": GOOD, **change}
    with pytest.raises(error, match=message):
        ops.attention(**call)  # type: ignore[arg-type]


def test_bad_prefix_is_named() -> None:
    for prefix in (0, 8):
        with pytest.raises(ValueError, match="num_prefix_tokens must be at least 1 and at most 7"):
            ops.attention_with_scores(GOOD, GOOD, GOOD, num_prefix_tokens=prefix)
    with pytest.raises(ValueError, match="need a token beside the class token to score, got N = 1"):
        ops.attention_with_scores(GOOD[:, :, :1], GOOD[:, :, :1], GOOD[:, :, :1])
    with pytest.raises(ValueError, match="same number of tokens"):
        ops.attention_with_scores(GOOD[:, :, :4], GOOD, GOOD)


PACKED = torch.zeros(8, 3, 16)
BAD_PACKED_CALLS = [
    ({"query": GOOD}, ValueError, r"query must have shape \(T, H, D\)"),
    ({"key": PACKED[:4]}, ValueError, r"key must have shape \(8, 3, 16\)"),
    ({"cu_seqlens": [0, 8]}, TypeError, "cu_seqlens must be a tensor"),
    ({"cu_seqlens": torch.tensor([0.0, 8.0])}, TypeError, "cu_seqlens must be int32 or int64"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"end with 8, the number of tokens, got \[0, 5\]"),
    ({"cu_seqlens": torch.tensor([1, 8])}, ValueError, "must start with 0"),
    ({"cu_seqlens": torch.tensor([0, 6, 4, 8])}, ValueError, "never fall"),
    ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, ValueError, r"cu_seqlens must have shape \(B \+ 1,\)"),
    ({"max_seqlen": 4}, ValueError, "max_seqlen must be at least 5, the longest sequence, got 4"),
    ({"max_seqlen": 5.0}, TypeError, "max_seqlen must be an int"),
    ({"scale": float("inf")}, ValueError, "scale must be a finite number"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_PACKED_CALLS)
def test_bad_packed_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    call = {"query": PACKED, "key": PACKED, "value": PACKED, "cu_seqlens": torch.tensor([0, 3, 8]), **change}
    for function in (ops.attention_varlen, ops.attention_varlen_with_scores):
        with pytest.raises(error, match=message):
            function(**call)  # type: ignore[arg-type]


def test_autocast_of_the_caller_changes_nothing() -> None:
    """The ops choose their own precision: float32 in gives float32 results, bit for bit, inside autocast."""
    query, key, value = qkv(2, 2, 9, 16)
    expected = ops.attention_with_scores(query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ops.attention_with_scores(query, key, value)
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)


PEAK_MEMORY = """
from xray import ops
dtype = getattr(torch, sys.argv[1])

def step(direction, *shape):
    query, key, value = (torch.randn(*shape, dtype=dtype).requires_grad_() for _ in range(3))
    grad = torch.randn(*shape, dtype=dtype)
    grad_scores = torch.ones(shape[0], shape[2] - 1)

    def run():
        with torch.set_grad_enabled(direction == "both"):
            out = ops.attention_with_scores(query, key, value)
        if direction == "both":
            out += torch.autograd.grad(out, (query, key, value), (grad, grad_scores))
        return out

    peak, out = peak_of(run)
    operands = (query, key, value, *out, *([grad] if direction == "both" else []))
    return peak / sum(x.numel() * x.element_size() for x in operands)

step("both", 1, 2, 300, 64)  # threads and libraries are there
for direction in ("forward", "both"):  # what the process takes for other reasons meanwhile is not the call's
    print(min(step(direction, 2, 12, 1569, 64) for repeat in range(3)))
"""


@needs_account
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(dtype: str) -> None:
    """At 2 x 12 x 1569 x 64 the N x N matrix would be 3 to 12 times the operands. What a call takes beside them, with
    its results, is at most those results and 5% of all operands; in inference, where operands are fewer, 10%: each
    thread holds one head's keys and values as floats."""
    if "cpu" not in _library.implementation("attention", "cpu"):
        pytest.skip("the reference materialises the matrix")
    forward, both = map(float, run_measured(PEAK_MEMORY, dtype))
    assert 1 / 4 * 0.9 < forward < 1 / 4 + 0.1
    assert 4 / 8 * 0.9 < both < 4 / 8 + 0.05
