"""Properties of attention that the generic contract does not state."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from xray import ops


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
        assert torch.autograd.gradcheck(
            lambda q, k, v, which=which: ops.attention_with_scores(q, k, v, num_prefix_tokens=2)[which],
            (query, key, value),
        )


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
    ({"dropout_p": 0.1}, TypeError, "dropout_p"),
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
    with pytest.raises(ValueError, match="same number of tokens"):
        ops.attention_with_scores(GOOD[:, :, :4], GOOD, GOOD)


def test_autocast_of_the_caller_changes_nothing() -> None:
    """The ops choose their own precision: float32 in gives float32 results, bit for bit, inside autocast."""
    query, key, value = qkv(2, 2, 9, 16)
    expected = ops.attention_with_scores(query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ops.attention_with_scores(query, key, value)
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)
