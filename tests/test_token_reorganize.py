"""Properties of token reorganisation that the generic contract does not state."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from xray import ops
from xray_kernels import _library, testing
from xray_kernels.token_reorganize import reference
from xray_kernels.token_reorganize.spec import compose_seam

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


def test_nan_of_any_payload_stays_nan(implementation: str) -> None:
    """Rounding the all-ones NaN to bfloat16 by adding to its bits would make it -0."""
    bits = torch.tensor([[0x3F800000, 0x7FFFFFFF], [0x3F800000, -1], [0x3F800000, 0x7F800001]], dtype=torch.int32)
    scores = torch.cat([torch.full((3, 1), torch.nan), bits.view(torch.float32)], 1)
    tokens = torch.ones(3, 3, 16, dtype=torch.bfloat16)
    with testing.use_implementation(implementation):
        out, indices = ops.reorganize_tokens(tokens, scores, 1, num_prefix_tokens=0)
    assert indices.tolist() == [[0]] * 3
    assert out[:, 1].isnan().all()


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


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_every_split_of_the_seam_agrees(batch: int, implementation: str) -> None:
    """Forward to the bit; backward up to the order in which the gradients of weight and bias are summed."""
    inputs: dict[str, Any] = {
        "residual": torch.randn(batch, 70, 200),
        "update": torch.randn(batch, 70, 200),
        "scores": torch.rand(batch, 69),
        "num_keep": 40,
        "weight": torch.randn(200),
        "bias": torch.randn(200),
    }
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            with testing.use_implementation(implementation):
                seen.append(testing.run(ops.add_reorganize_norm, inputs))
    finally:
        torch.set_num_threads(threads)
    (outputs, grads), (split_outputs, split_grads) = seen
    assert all(torch.equal(outputs[name], split_outputs[name]) for name in outputs)
    for name, grad in grads.items():
        torch.testing.assert_close(split_grads[name], grad, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("batch", [1, 3])
def test_seam_equals_its_separate_parts(implementation: str, batch: int) -> None:
    residual, update, scores = torch.randn(batch, 50, 144), torch.randn(batch, 50, 144), torch.rand(batch, 49)
    weight, bias = torch.randn(144), torch.randn(144)
    for keep, fuse in itertools.product((7, 49), (True, False)):
        with testing.use_implementation(implementation):
            stream, normed, indices = ops.add_reorganize_norm(residual, update, scores, keep, weight, bias, fuse=fuse)
        tokens, kept = reference.reorganize_tokens(residual + update, scores, keep, 1, fuse)
        if keep == 49:
            tokens, kept = residual + update, torch.arange(49).repeat(batch, 1)
        torch.testing.assert_close(stream, tokens)
        torch.testing.assert_close(normed, torch.nn.functional.layer_norm(tokens, (144,), weight, bias, 1e-6))
        assert torch.equal(indices, kept)


def test_seam_gradcheck(implementation: str) -> None:
    like: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    inputs = [torch.randn(2, 7, 5, **like), torch.randn(2, 7, 5, **like), torch.rand(2, 6, **like)]
    inputs += [torch.randn(5, **like), torch.randn(5, **like)]

    def seam(residual: Tensor, update: Tensor, scores: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return ops.add_reorganize_norm(residual, update, scores, 3, weight, bias)[:2]

    with testing.use_implementation(implementation):
        assert torch.autograd.gradcheck(seam, inputs)


def test_seam_with_one_of_its_gradients(implementation: str) -> None:
    """Only the stream, or only its norm, is used afterwards."""
    inputs: dict[str, Any] = {
        "residual": torch.randn(2, 12, 8),
        "update": torch.randn(2, 12, 8),
        "scores": torch.rand(2, 11),
        "weight": torch.randn(8),
        "bias": torch.randn(8),
    }
    for output in (0, 1):

        def ours(output: int = output, **given: Any) -> Tensor:
            return ops.add_reorganize_norm(num_keep=5, **given)[output]

        def plain(output: int = output, **given: Any) -> Tensor:
            return compose_seam(num_keep=5, **given)[output]

        with testing.use_implementation(implementation):
            _, grads = testing.run(ours, inputs)
        _, expected = testing.run(plain, inputs)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_too_large_for_the_caches(implementation: str, dtype: torch.dtype) -> None:
    """From 8 MiB on, results are written past the caches and in large pages."""
    channels = 1024 if dtype == torch.float32 else 2048
    inputs: dict[str, Any] = {
        "tokens": torch.randn(3, 2000, channels).to(dtype),
        "scores": torch.rand(3, 1999) / 500,
        "num_keep": 1500,
    }
    seam = {"residual": inputs["tokens"], "update": -inputs["tokens"].flip(2), "scores": inputs["scores"]}
    seam |= {"num_keep": 1500, "weight": torch.randn(channels).to(dtype), "bias": torch.randn(channels).to(dtype)}
    for function, given in ((ops.reorganize_tokens, inputs), (ops.add_reorganize_norm, seam)):
        with testing.use_implementation("reference"):
            expected = testing.run(function, given)
        with testing.use_implementation(implementation):
            actual = testing.run(function, given)
        reduced = 2e-2 if dtype == torch.bfloat16 else 1e-3
        for ours, theirs in zip(actual, expected, strict=True):
            for name, tensor in ours.items():
                bound = reduced * max(1.0, float(theirs[name].abs().max()))
                assert float((tensor.double() - theirs[name].double()).abs().max()) <= bound, name


def test_double_backward_is_refused(implementation: str) -> None:
    tokens = torch.randn(1, 6, 4, requires_grad=True)
    with testing.use_implementation(implementation):
        out, _ = ops.reorganize_tokens(tokens, torch.rand(1, 5), 2)
        (grad,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            grad.sum().backward()


def adversarial_scores() -> dict[str, Tensor]:
    """Rows that defeat the quick path of selection: all in one digit, all equal, alternating far and near."""
    close = 1 + torch.arange(1500).flip(0) * 2.0**-23
    spread = torch.cat([torch.linspace(1, 1.0001, 1499), torch.tensor([1e30])])
    mixed = torch.randn(1500) * torch.logspace(-30, 30, 1500)
    return {"close": close, "equal": torch.full((1500,), 0.25), "spread": spread, "mixed": mixed}


@pytest.mark.parametrize("name", adversarial_scores())
def test_selection_of_awkward_scores(implementation: str, name: str) -> None:
    scores = adversarial_scores()[name]
    scores = torch.stack([scores, scores[torch.randperm(1500, generator=torch.Generator().manual_seed(0))]])
    with testing.use_implementation(implementation):
        _, indices = ops.reorganize_tokens(torch.randn(2, 1501, 2), scores, 1100)
    assert torch.equal(indices, scores.sort(dim=1, descending=True, stable=True).indices[:, :1100])


# What follows the tokens


def test_values_follow_the_tokens_layer_by_layer() -> None:
    places = torch.arange(6)[None, :, None] * torch.tensor([1.0, 10.0])
    first, second = torch.tensor([[4, 0, 2], [5, 1, 3]]), torch.tensor([[3, 1], [0, 2]])
    after = ops.gather_tokens(places, first, fused=-7)
    assert after[:, :, 0].tolist() == [[4, 0, 2, -7], [5, 1, 3, -7]]
    assert ops.gather_tokens(after, second)[:, :, 1].tolist() == [[-7, 0], [50, 30]]
    mask = torch.tensor([[True, False, True, False, True, False]])
    assert ops.gather_tokens(mask, first, fused=True).tolist() == [[True, True, True, True], [False] * 3 + [True]]
    values = torch.randn(2, 6, 3, requires_grad=True)
    ops.gather_tokens(values, first).sum().backward()
    assert values.grad is not None
    assert values.grad[:, :, 0].tolist() == [[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 1]]


def test_token_map_there_and_back() -> None:
    layers = [torch.tensor([[4, 0, 2]]), torch.tensor([[3, 1]]), torch.tensor([[0, 2]])]
    assert [ops.token_map(layers[: i + 1], 6).patches.tolist() for i in range(3)] == [
        [[4, 0, 2, -1]],
        [[-1, 0, -1]],
        [[-1, -1, -1]],
    ]
    assert [ops.token_map(layers[: i + 1], 6).tokens.tolist() for i in range(3)] == [
        [[1, 3, 2, 3, 0, 3]],
        # 1, 3 and 5 are in the fused token, which was kept first; 4 and 2 went into the new one
        [[1, 0, 2, 0, 2, 0]],
        # patch 0 is dropped into the third fused token; both older fused tokens were kept
        [[2, 0, 1, 0, 1, 0]],
    ]
    unfused = ops.token_map([torch.tensor([[4, 0, 2]]), torch.tensor([[2, 1]])], 6, fuse=False)
    assert unfused.patches.tolist() == [[2, 0]]
    assert unfused.tokens.tolist() == [[1, -1, 0, -1, -1, -1]]


def test_token_map_is_what_reorganisation_does() -> None:
    """A patch is found in the token that it went to: one-hot tokens, all scores 1, so that fused rows add up."""
    patches = 20
    tokens = torch.cat([torch.zeros(3, 1, patches), torch.eye(patches).expand(3, -1, -1)], 1)
    layers = []
    for keep in (11, 6, 4):
        scores = torch.ones(3, tokens.shape[1] - 1)
        scores = scores + torch.rand(scores.shape) * 1e-3
        tokens, indices = ops.reorganize_tokens(tokens, scores, keep)
        layers.append(indices)
    where = ops.token_map(layers, patches)
    holds = tokens[:, 1:].gather(1, where.tokens[..., None].expand(-1, -1, patches))  # (B, patch, patch)
    assert (holds.diagonal(dim1=1, dim2=2) > 0.99).all()
    total = tokens[:, 1:].sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda i: ops.gather_tokens(cast(Any, [1]), i),
            TypeError,
            r"values must be a tensor of shape \(B, M, \.\.\.\), got list",
        ),
        (lambda i: ops.gather_tokens(torch.zeros(3, 5), i), ValueError, r"values must have shape .* B = 2, .*\(3, 5\)"),
        (lambda i: ops.gather_tokens(torch.zeros(2, 5), i.int()), TypeError, "indices must be int64, got torch.int32"),
        (lambda i: ops.gather_tokens(torch.zeros(2, 5), i[0]), ValueError, r"indices must have shape \(B, K\)"),
        (lambda i: ops.gather_tokens(torch.zeros(2, 5, device="meta"), i), RuntimeError, "values is on meta"),
        (lambda i: ops.token_map([], 4), ValueError, "indices must be a list"),
        (lambda i: ops.token_map(i, 4), ValueError, "indices must be a list"),
        (lambda i: ops.token_map([i, i.float()], 4), TypeError, r"indices\[1\] must be int64"),
        (lambda i: ops.token_map([i], 0), ValueError, "num_patches must be at least 1"),
    ],
)
def test_bad_followers_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 2, dtype=torch.int64))


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


SEAM = {
    "residual": torch.zeros(2, 8, 4),
    "update": torch.zeros(2, 8, 4),
    "scores": torch.zeros(2, 7),
    "num_keep": 3,
    "weight": torch.zeros(4),
    "bias": torch.zeros(4),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_keep": 8}, ValueError, r"num_keep must be at least 1 and at most 7 \(residual has 7"),
        ({"update": torch.zeros(2, 7, 4)}, ValueError, r"update must have shape \(2, 8, 4\)"),
        ({"update": torch.zeros(2, 8, 4).half()}, TypeError, "update is torch.float16 but residual is torch.float32"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must have shape \(4,\)"),
        ({"bias": torch.zeros(4).bfloat16()}, TypeError, "bias is torch.bfloat16 but residual is torch.float32"),
        ({"bias": torch.zeros(4, device="meta")}, RuntimeError, "bias is on meta but residual is on cpu"),
    ],
)
def test_bad_seam_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.add_reorganize_norm(**{**SEAM, **change})  # type: ignore[arg-type]


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
    for op in ("reorganize_tokens", "add_reorganize_norm"):
        assert _library.implementation(op, "cpu") == "cpu"
        assert _library.implementation(f"{op}_backward", "cpu") == "cpu"
