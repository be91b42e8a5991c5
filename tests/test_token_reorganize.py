"""Properties of token reorganisation that the generic contract does not state."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from xray import ops
from xray_kernels import _library, testing
from xray_kernels.token_reorganize import reference

IMPLEMENTATIONS = testing.implementations("cpu")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_result_is_prefix_kept_fused(implementation: str) -> None:
    tokens = torch.arange(12.0).view(1, 6, 2)
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.5]])
    with testing.use_implementation(implementation):
        out, indices = ops.reorganize_tokens(tokens, scores, 3)
    assert indices.tolist() == [[4, 1, 3]]
    fused = 0.1 * tokens[0, 1] + 0.2 * tokens[0, 3]
    torch.testing.assert_close(out[0], torch.stack([*tokens[0, [0, 5, 2, 4]], fused]))


def test_nothing_to_drop_returns_the_input_itself() -> None:
    tokens, scores = torch.randn(2, 5, 3), torch.rand(2, 4)
    out, indices = ops.reorganize_tokens(tokens, scores, 4)
    assert out is tokens
    assert indices.tolist() == [[0, 1, 2, 3]] * 2


def test_of_equal_scores_the_lower_index_wins(implementation: str) -> None:
    scores = torch.tensor([[0.5, -0.0, 0.0, 0.5, -0.0, 0.5, -1.0]])
    with testing.use_implementation(implementation):
        _, indices = ops.reorganize_tokens(torch.randn(1, 8, 4), scores, 5)
    assert indices.tolist() == [[0, 3, 5, 1, 2]]


def test_nan_ranks_highest_and_infinities_are_ordered(implementation: str) -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[0.0, -inf, nan, inf, 1.0, -nan]])
    with testing.use_implementation(implementation):
        _, indices = ops.reorganize_tokens(torch.randn(1, 7, 4), scores, 5, fuse=False)
    assert indices.tolist() == [[2, 5, 3, 4, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_convert_exactly_and_round_to_nearest_even(implementation: str, dtype: torch.dtype) -> None:
    """Every bit pattern of a half type passes through the fused row: times 1 exactly, times 1/3 as PyTorch rounds."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    tokens = torch.stack([torch.zeros_like(every), every])[None]
    for weight in (1.0, 1 / 3, 1e-3, 300.0):
        scores = torch.tensor([[1e4, weight]])
        with testing.use_implementation(implementation):
            out, indices = ops.reorganize_tokens(tokens, scores, 1, num_prefix_tokens=0)
        assert indices.item() == 0
        expected = (every.float() * torch.tensor(weight)).to(dtype)
        same = (out[0, 1] == expected) | (out[0, 1].isnan() & expected.isnan())
        assert same.all(), f"{every[~same][:5]} x {weight}: {out[0, 1][~same][:5]}, needs {expected[~same][:5]}"


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_every_split_of_the_work_gives_the_same_bits(batch: int, implementation: str) -> None:
    """A batch smaller than the threads splits channels; the result must not depend on how many threads there are."""
    tokens, scores = torch.randn(batch, 30, 1030), torch.rand(batch, 29)
    threads = torch.get_num_threads()
    seen: list[list[Tensor]] = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with testing.use_implementation(implementation):
                outputs, _ = testing.run(ops.reorganize_tokens, {"tokens": tokens, "scores": scores, "num_keep": 9})
            seen.append(list(outputs.values()))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_expanded_tokens_and_scores(implementation: str) -> None:
    """Stride 0 in any dimension."""
    tokens = torch.randn(1, 12, 1).expand(3, 12, 20)
    scores = torch.rand(1, 11).expand(3, 11)
    expected = reference.reorganize_tokens(tokens, scores, 4, 1, True)
    with testing.use_implementation(implementation):
        actual = ops.reorganize_tokens(tokens, scores, 4)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("of_tokens", "of_scores"), [(True, False), (False, True)])
def test_one_gradient_alone(implementation: str, of_tokens: bool, of_scores: bool) -> None:
    tokens = torch.randn(2, 9, 6, requires_grad=of_tokens)
    scores = torch.rand(2, 8, requires_grad=of_scores)
    direction = torch.randn(2, 5, 6)
    with testing.use_implementation(implementation):
        out, indices = ops.reorganize_tokens(tokens, scores, 3)
        (out * direction).sum().backward()
    weight = torch.ones(2, 8).scatter(1, indices, 0.0).bool()
    if of_tokens:
        assert tokens.grad is not None
        expected = scores[..., None] * direction[:, -1:]
        torch.testing.assert_close(tokens.grad[:, 1:][weight], expected[weight])
    else:
        assert scores.grad is not None
        expected = (tokens[:, 1:] * direction[:, -1:]).sum(-1)
        torch.testing.assert_close(scores.grad, expected * weight)


def test_gradcheck(implementation: str) -> None:
    tokens = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    with testing.use_implementation(implementation):
        assert torch.autograd.gradcheck(lambda t, s: ops.reorganize_tokens(t, s, 3)[0], (tokens, scores))


def test_seam_equals_its_separate_parts() -> None:
    residual, update, scores = torch.randn(2, 20, 16), torch.randn(2, 20, 16), torch.rand(2, 19)
    weight, bias = torch.randn(16), torch.randn(16)
    for keep, fuse in itertools.product((7, 19), (True, False)):
        stream, normed, indices = ops.add_reorganize_norm(residual, update, scores, keep, weight, bias, fuse=fuse)
        tokens, kept = ops.reorganize_tokens(residual + update, scores, keep, fuse=fuse)
        torch.testing.assert_close(stream, tokens)
        torch.testing.assert_close(normed, torch.nn.functional.layer_norm(tokens, (16,), weight, bias, 1e-6))
        assert torch.equal(indices, kept)


BAD_CALLS = [
    ({"num_keep": 0}, ValueError, "num_keep must be at least 1 and at most 7"),
    ({"num_keep": -3}, ValueError, "num_keep must be at least 1"),
    ({"num_keep": 8}, ValueError, r"num_keep must be at least 1 and at most 7 \(tokens has 7 non-prefix"),
    ({"num_keep": 2.0}, TypeError, "num_keep must be an int, got float"),
    ({"num_keep": True}, TypeError, "num_keep must be an int, got bool"),
    ({"num_prefix_tokens": 8}, ValueError, "num_prefix_tokens must be at least 0 and at most 7"),
    ({"num_prefix_tokens": 2}, ValueError, r"scores must have shape \(2, 6\)"),
    ({"tokens": torch.zeros(8, 4)}, ValueError, r"tokens must have shape \(B, N, C\), got \(8, 4\)"),
    ({"tokens": [1, 2]}, TypeError, r"tokens must be a tensor of shape \(B, N, C\), got list"),
    ({"tokens": torch.zeros(2, 8, 4, dtype=torch.int32)}, TypeError, "tokens must be float32"),
    ({"tokens": torch.zeros(2, 1, 4)}, ValueError, "num_prefix_tokens must be at least 0 and at most 0"),
    ({"scores": torch.zeros(2, 6)}, ValueError, r"scores must have shape \(2, 7\)"),
    (
        {"scores": torch.zeros(2, 7, dtype=torch.float16)},
        TypeError,
        "scores must be float32 or the dtype of tokens",
    ),
    ({"scores": torch.zeros(2, 7, device="meta")}, RuntimeError, "scores is on meta but tokens is on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    call = {"tokens": torch.zeros(2, 8, 4), "scores": torch.zeros(2, 7), "num_keep": 3, **change}
    with pytest.raises(error, match=message):
        ops.reorganize_tokens(**call)  # type: ignore[arg-type]


def test_plan_splits_only_small_batches() -> None:
    host = pytest.importorskip("xray_kernels._host", exc_type=ImportError)
    assert host.plan_channel_pieces(64, 768, 4, 2) == 1
    assert host.plan_channel_pieces(1, 768, 4, 2) == 4
    assert host.plan_channel_pieces(1, 8, 4, 16) == 1
    assert host.plan_channel_pieces(0, 768, 4, 2) == 1


def test_compiled_library_is_in_use_here() -> None:
    """On a machine where the build ran, the op must not silently fall back."""
    if _library.compiled_file("_cpu") is None:
        pytest.skip("_cpu is not built")
    assert "_cpu" in _library.LOADED
    assert _library.implementation("reorganize_tokens", "cpu") == "cpu"
    assert _library.implementation("reorganize_tokens_backward", "cpu") == "cpu"
