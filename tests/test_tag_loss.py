"""Properties of the tag loss: memory, what tags and samples weigh, bad input.

What holds for every op (tolerance rule, strides, opcheck, compilation) is in test_ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory import peak_bytes
from torch import Tensor
from torch.nn import functional as F

from xray.ops import tag_loss
from xray_kernels.tag_loss.spec import sample_inputs

LEAVES = ("features", "weight", "bias", "tag_weights")


def inputs(counts: list[int], num_tags: int = 30, width: int = 8, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    like = (dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    return sample_inputs(counts, num_tags, width, like)


def differentiate(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and the gradient of every floating argument."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in LEAVES if name in arguments}
    loss = tag_loss(**{**arguments, **leaves})
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}


def naming(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-14, msg=naming(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_stays_within_the_workspace(dtype: torch.dtype) -> None:
    """256 x 60,000 logits would be 61 MB; gradients and the allowed workspace are all there is."""
    arguments = inputs([2] * 256, num_tags=60_000, width=4, dtype=dtype)
    arguments["bias"] = torch.zeros(60_000, dtype=dtype)
    gradients = sum(arguments[name].numel() * dtype.itemsize for name in ("features", "weight", "bias"))
    rows_and_entries = 256 * (4 * 4 * 2 + 100)
    workspace = 2**20
    peak = peak_bytes(lambda: differentiate({**arguments, "max_workspace_bytes": workspace}))
    assert gradients < peak < gradients + rows_and_entries + workspace


def test_result_does_not_depend_on_the_workspace() -> None:
    arguments = inputs([3, 0, 1, 4], num_tags=500)
    arguments["bias"] = torch.linspace(-1, 1, 500, dtype=torch.float64)
    whole = differentiate(arguments)
    for workspace in (2**13, 2**14, 2**15):
        assert_equal(differentiate({**arguments, "max_workspace_bytes": workspace}), whole)


def test_gradcheck_over_several_chunks() -> None:
    arguments = inputs([2, 0, 3], num_tags=37, width=3)
    leaves = [arguments["features"], arguments["weight"]]
    leaves.append(torch.linspace(-1, 1, 37, dtype=torch.float64))
    leaves.append(torch.tensor([0.5, 2.0, 0.1, 0.0, 1.0], dtype=torch.float64))

    def loss(features: Tensor, weight: Tensor, bias: Tensor, tag_weights: Tensor) -> Tensor:
        tags, offsets = arguments["tags"], arguments["offsets"]
        return tag_loss(features, weight, tags, offsets, bias=bias, tag_weights=tag_weights, max_workspace_bytes=2048)

    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves])


def test_one_tag_per_sample_is_cross_entropy() -> None:
    arguments = inputs([1] * 9)
    bias = torch.linspace(-2, 2, 30, dtype=torch.float64)
    expected = F.cross_entropy(F.linear(arguments["features"], arguments["weight"], bias), arguments["tags"])
    torch.testing.assert_close(tag_loss(**arguments, bias=bias), expected)


def test_several_tags_are_cross_entropy_with_a_soft_target() -> None:
    """1 / k on each of k tags; a tag that stands twice counts twice."""
    arguments = {**inputs([3, 2]), "tags": torch.tensor([4, 7, 4, 0, 29])}
    target = torch.zeros(2, 30, dtype=torch.float64)
    target[0, 4], target[0, 7], target[1, 0], target[1, 29] = 2 / 3, 1 / 3, 1 / 2, 1 / 2
    expected = F.cross_entropy(F.linear(arguments["features"], arguments["weight"]), target)
    torch.testing.assert_close(tag_loss(**arguments), expected)


def test_default_weights_are_one_over_k() -> None:
    arguments = inputs([3, 0, 1, 4])
    weights = torch.tensor([1 / 3] * 3 + [1.0] + [1 / 4] * 4, dtype=torch.float64)
    with_weights = differentiate({**arguments, "tag_weights": weights})
    del with_weights["tag_weights"]
    assert_equal(with_weights, differentiate(arguments))


def test_repeated_entries_add_up() -> None:
    """One entry of weight 3 is three entries of weights 0.5, 1 and 1.5 for the same tag."""
    arguments = inputs([1, 2])
    one = {**arguments, "tags": torch.tensor([5, 8, 9]), "tag_weights": torch.tensor([3.0, 1.0, 1.0])}
    three = {
        **arguments,
        "tags": torch.tensor([5, 5, 5, 8, 9]),
        "offsets": torch.tensor([0, 3, 5]),
        "tag_weights": torch.tensor([0.5, 1.0, 1.5, 1.0, 1.0]),
    }
    found, expected = differentiate(three), differentiate(one)
    assert (found.pop("tag_weights")[:3] == expected.pop("tag_weights")[0]).all()
    assert_equal(found, expected)


def test_order_does_not_matter() -> None:
    """Neither that of the samples nor that of a sample's tags."""
    arguments = {**inputs([2, 0, 3]), "tags": torch.tensor([1, 2, 3, 4, 5])}
    moved = {
        **arguments,
        "features": arguments["features"].flip(0),
        "tags": torch.tensor([5, 3, 4, 2, 1]),
        "offsets": torch.tensor([0, 3, 3, 5]),
    }
    found = differentiate(moved)
    found["features"] = found["features"].flip(0)
    assert_equal(found, differentiate(arguments))


def test_samples_without_tags_weigh_nothing() -> None:
    arguments = inputs([2, 0, 3, 0, 0])
    tagged = [0, 2]
    alone = {
        **arguments,
        "features": arguments["features"][tagged],
        "offsets": torch.tensor([0, 2, 5]),
    }
    found, expected = differentiate(arguments), differentiate(alone)
    assert (found["features"][[1, 3, 4]] == 0).all()
    found["features"] = found["features"][tagged]
    assert_equal(found, expected)


@pytest.mark.parametrize("counts", [[0, 0, 0], []], ids=["untagged", "empty"])
def test_no_tagged_sample_is_a_loss_of_zero(counts: list[int]) -> None:
    arguments = inputs(counts, dtype=torch.float32)
    arguments |= {"bias": torch.ones(30), "tag_weights": torch.ones(0)}
    found = differentiate(arguments)
    assert found["loss"] == 0
    assert all(
        (grad == 0).all() and grad.shape == arguments[name].shape for name, grad in found.items() if name in LEAVES
    )


@pytest.mark.parametrize("trained", LEAVES)
def test_only_what_is_trained_gets_a_gradient(trained: str) -> None:
    arguments = inputs([2, 0, 3])
    arguments["bias"] = torch.linspace(-2, 2, 30, dtype=torch.float64)
    arguments["tag_weights"] = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    expected = differentiate(arguments)[trained]
    arguments[trained] = arguments[trained].clone().requires_grad_()
    tag_loss(**arguments).backward()
    torch.testing.assert_close(arguments[trained].grad, expected, rtol=1e-12, atol=0)


def test_autocast_does_not_round_the_logits() -> None:
    arguments = inputs([2, 0, 3], dtype=torch.float32)
    plain = differentiate(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        cast = differentiate(arguments)
    assert all(torch.equal(cast[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    "changes",
    [{"tags": torch.tensor([3, -1])}, {"tags": torch.tensor([3, 30])}, {"offsets": torch.tensor([0, 1, 1])}],
    ids=["negative", "too large", "entry without a sample"],
)
def test_bad_values_when_they_are_not_read(changes: dict[str, Tensor]) -> None:
    """Compiled code does not read tags and offsets: the loss is NaN, and nothing outside the logits is read."""
    arguments = {**inputs([1, 1]), **changes}
    loss = torch.compile(lambda kwargs: tag_loss(**kwargs), fullgraph=True, backend="eager")(arguments)
    assert loss.isnan()


FEATURES, WEIGHT = torch.zeros(2, 8), torch.zeros(30, 8)
TAGS, OFFSETS = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])
BAD_INPUTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "tag too large": ({"tags": torch.tensor([1, 30, 3])}, IndexError, r"tags must be in 0\.\.29.* got 30$"),
    "negative tag": ({"tags": torch.tensor([1, -1, 3])}, IndexError, r"tags must be in 0\.\.29.* got -1$"),
    "int32 tags": ({"tags": TAGS.int()}, TypeError, "tags must be int64, got torch.int32"),
    "table of tags": ({"tags": TAGS[None]}, ValueError, r"tags must have shape \(nnz,\)"),
    "list of tags": ({"tags": [1, 2, 3]}, TypeError, "tags must be a tensor"),
    "short offsets": ({"offsets": OFFSETS[:2]}, ValueError, r"offsets must have shape \(3,\)"),
    "float offsets": ({"offsets": OFFSETS.float()}, TypeError, "offsets must be int64"),
    "falling offsets": ({"offsets": torch.tensor([0, 4, 3])}, ValueError, "offsets must rise .* got 0, 4, 3"),
    "late offsets": ({"offsets": torch.tensor([1, 2, 3])}, ValueError, "offsets must rise from 0"),
    "missing entries": ({"offsets": torch.tensor([0, 1, 2])}, ValueError, "to the 3 entries of tags"),
    "no features": ({"features": FEATURES[:, :0], "weight": WEIGHT[:, :0]}, ValueError, "weight must have"),
    "no vocabulary": ({"weight": WEIGHT[:0]}, ValueError, "weight must have at least one tag"),
    "features of one sample": ({"features": FEATURES[0]}, ValueError, r"features must have shape \(B, F\)"),
    "integer features": ({"features": FEATURES.long()}, TypeError, "features must be float32"),
    "other width": ({"weight": torch.zeros(30, 9)}, ValueError, r"weight must have shape \(30, 8\)"),
    "mixed dtypes": ({"weight": WEIGHT.half()}, TypeError, "weight is torch.float16 but features"),
    "other device": ({"weight": WEIGHT.to("meta")}, RuntimeError, "weight is on meta"),
    "short bias": ({"bias": torch.zeros(29)}, ValueError, r"bias must have shape \(30,\)"),
    "half bias": ({"bias": torch.zeros(30).half()}, TypeError, "bias is torch.float16"),
    "short weights": ({"tag_weights": torch.ones(2)}, ValueError, r"tag_weights must have shape \(3,\)"),
    "integer weights": ({"tag_weights": torch.ones(3).long()}, TypeError, "tag_weights must be float32"),
    "workspace": ({"max_workspace_bytes": 100}, ValueError, "max_workspace_bytes must be at least 1408"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_sentence(name: str) -> None:
    changes, kind, message = BAD_INPUTS[name]
    arguments = {"features": FEATURES, "weight": WEIGHT, "tags": TAGS, "offsets": OFFSETS, **changes}
    with pytest.raises(kind, match=message) as caught:
        tag_loss(**arguments)
    assert "\n" not in str(caught.value)


def test_long_offsets_are_not_printed_whole() -> None:
    arguments = {**inputs([1] * 50), "offsets": torch.full((51,), 7)}
    with pytest.raises(ValueError, match=r"got 7, 7, 7, 7, 7, 7, 7, 7, \.\.\. \(51 values\)"):
        tag_loss(**arguments)


def test_smallest_workspace_is_enough() -> None:
    arguments = (FEATURES, WEIGHT, TAGS, OFFSETS)
    torch.testing.assert_close(tag_loss(*arguments, max_workspace_bytes=1408), tag_loss(*arguments))
