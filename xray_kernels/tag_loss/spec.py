"""Sample inputs, the plain composition, and the cost of the tag loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xray_kernels.tag_loss import tag_loss
from xray_kernels.testing import Case, Inputs, OpSpec, nbytes, randn


def compose(
    features: Tensor,
    weight: Tensor,
    tags: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    tag_weights: Tensor | None = None,
    **options: object,
) -> Tensor:
    """Linear layer, log-softmax over the whole vocabulary, and a loop over the samples' tags."""
    log_p = F.linear(features, weight, bias).log_softmax(1)
    losses = []
    for row, start, stop in zip(log_p, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        if stop > start:
            found = row[tags[start:stop]]
            losses.append(-(found.mean() if tag_weights is None else (found * tag_weights[start:stop]).sum()))
    if losses:
        return torch.stack(losses).mean()
    return log_p.sum() * 0 + (0 if tag_weights is None else tag_weights.sum() * 0)


def sample_inputs(
    counts: list[int], num_tags: int, width: int, like: tuple[torch.dtype, torch.device, torch.Generator]
) -> Inputs:
    """Features and weights as at the start of training; counts[i] tags for sample i, drawn with repetition."""
    device, generator = like[1:]
    return {
        "features": randn(len(counts), width, like=like),
        "weight": (randn(num_tags, width, like=(torch.float64, *like[1:])) / width**0.5).to(like[0]),
        "tags": torch.randint(num_tags, (sum(counts),), generator=generator).to(device),
        "offsets": torch.tensor([0, *counts]).cumsum(0).to(device),
    }


def _case(
    name: str,
    counts: list[int],
    num_tags: int,
    width: int,
    *,
    bias: bool = False,
    weights: bool = False,
    peak: float = 1.0,
    **more: object,
) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
        like = (dtype, device, generator)
        inputs = sample_inputs(counts, num_tags, width, like)
        inputs["features"] = inputs["features"] * peak
        if bias:
            inputs["bias"] = randn(num_tags, like=like)
        if weights:
            wide = torch.promote_types(dtype, torch.float32)
            inputs["tag_weights"] = randn(sum(counts), like=(wide, device, generator)).abs()
        return {**inputs, **more}

    return Case(name, make)


def _traffic(inputs: Inputs) -> tuple[int, int]:
    once = nbytes(inputs["features"], inputs["weight"], inputs["tags"], inputs["offsets"])
    return once, once + nbytes(inputs["features"], inputs["weight"])


def _flops(inputs: Inputs) -> tuple[int, int]:
    product = 2 * inputs["features"].numel() * inputs["weight"].shape[0]
    return product, 3 * product


_MIXED = [3, 1, 0, 5, 2, 0, 1]

SPECS = (
    OpSpec(
        name="tag_loss",
        function=tag_loss,
        composition=compose,
        cases=(
            _case("mixed", _MIXED, 301, 32, bias=True, weights=True),
            _case("plain", _MIXED, 301, 32),
            _case("many chunks", _MIXED, 1003, 24, bias=True, max_workspace_bytes=2**13),
            _case("weights", _MIXED, 50, 16, weights=True),
            _case("more entries than tags", [40, 7], 5, 8, bias=True),
            _case("one sample", [2], 100, 16, bias=True),
            _case("one tag", [1, 2, 0], 1, 4, bias=True),
            _case("one feature", [1, 2], 37, 1),
            _case("large logits", _MIXED, 100, 64, peak=30.0),
            _case("no tags", [0, 0, 0], 20, 8, bias=True),
            _case("no tags with weights", [0, 0], 20, 8, weights=True),
            _case("empty batch", [], 20, 8, bias=True),
        ),
        traffic=_traffic,
        flops=_flops,
    ),
)
