"""Sample inputs, the plain composition, and the cost of token reorganisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from xray_kernels.testing import Case, Inputs, OpSpec, nbytes, randn
from xray_kernels.token_reorganize import add_reorganize_norm, reorganize_tokens


def compose(
    tokens: Tensor, scores: Tensor, num_keep: int, *, num_prefix_tokens: int = 1, fuse: bool = True
) -> tuple[Tensor, Tensor]:
    """Reorganisation as the official EViT code strings it together, with the tie rule made explicit."""
    prefix, rest = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
    if num_keep == rest.shape[1]:
        return tokens, torch.arange(num_keep, device=tokens.device).repeat(tokens.shape[0], 1)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    kept, dropped = order[:, :num_keep], order[:, num_keep:]
    parts = [prefix, torch.gather(rest, 1, kept[..., None].expand(-1, -1, rest.shape[2]))]
    if fuse:
        lost = torch.gather(rest, 1, dropped[..., None].expand(-1, -1, rest.shape[2]))
        weight = torch.gather(scores, 1, dropped).to(tokens.dtype)
        parts.append((lost * weight[..., None]).sum(1, keepdim=True))
    return torch.cat(parts, 1), kept


def compose_seam(
    residual: Tensor,
    update: Tensor,
    scores: Tensor,
    num_keep: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    num_prefix_tokens: int = 1,
    fuse: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same between a residual addition and a LayerNorm."""
    stream, kept = compose(residual + update, scores, num_keep, num_prefix_tokens=num_prefix_tokens, fuse=fuse)
    return stream, F.layer_norm(stream, stream.shape[-1:], weight, bias, eps), kept


def sample_inputs(
    batch: int,
    length: int,
    channels: int,
    num_keep: int,
    like: tuple[torch.dtype, torch.device, torch.Generator],
    num_prefix_tokens: int = 1,
) -> Inputs:
    """Random tokens with the scores of a softmax row, the distribution that EViT sees."""
    scores = randn(batch, length - num_prefix_tokens, like=(torch.float64, *like[1:])).softmax(1)
    return {
        "tokens": randn(batch, length, channels, like=like),
        "scores": scores.to(torch.promote_types(like[0], torch.float32)),
        "num_keep": num_keep,
        "num_prefix_tokens": num_prefix_tokens,
    }


def _case(name: str, batch: int, length: int, channels: int, keep: int, *, prefix: int = 1, **more: object) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
        like = (dtype, device, generator)
        return {**sample_inputs(batch, length, channels, keep, like, prefix), **more}

    return Case(name, make)


def _ties(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    like = (dtype, device, generator)
    inputs = sample_inputs(3, 41, 24, 17, like)
    levels = torch.randint(-1, 3, (3, 40), generator=generator) / 4
    levels[0, ::7] = -0.0
    return {**inputs, "scores": levels.to(device, inputs["scores"].dtype)}


def _not_finite(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    inputs = sample_inputs(2, 33, 16, 9, (dtype, device, generator))
    inputs["scores"][0, [3, 20]] = float("nan")
    inputs["scores"][0, 5] = float("inf")
    inputs["scores"][1, 7:] = float("nan")
    return {**inputs, "fuse": False}


def _seam(case: Case) -> Case:
    """The case with a residual and an update, and scores that give the fused row unit spread: LayerNorm divides by
    that spread, so a tiny one would multiply the gradients, and with them every rounding error, by hundreds."""

    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
        inputs = case.make(dtype, device, generator)
        tokens = inputs.pop("tokens")
        like = (dtype, device, generator)
        channels = tokens.shape[2]
        return {
            "residual": tokens,
            "update": randn(*tokens.shape, like=like),
            "weight": 1 + randn(channels, like=like) / 4,
            "bias": randn(channels, like=like) / 4,
            **inputs,
            "scores": (inputs["scores"] + 0.5) / math.sqrt(tokens.shape[1] - inputs["num_keep"]),
        }

    return Case(case.name, make)


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Least bytes of forward (tokens and scores in, result and indices out) and backward (the reverse)."""
    tokens, scores = inputs["tokens"], inputs["scores"]
    batch, length, channels = tokens.shape
    row = channels * tokens.element_size()
    kept = inputs["num_prefix_tokens"] + inputs["num_keep"]
    fused = int(inputs.get("fuse", True))
    indices = batch * inputs["num_keep"] * 8
    forward = batch * row * ((length if fused else kept) + kept + fused) + nbytes(scores) + indices
    dropped_read = (length - kept) * fused
    backward = batch * row * (kept + fused + dropped_read + length) + 2 * nbytes(scores) + indices
    return forward, backward


def _seam_traffic(inputs: Inputs) -> tuple[int, int]:
    forward, backward = traffic({**inputs, "tokens": inputs["residual"]})
    one = nbytes(inputs["residual"])
    kept_share = (inputs["num_prefix_tokens"] + inputs["num_keep"] + 1) / max(inputs["residual"].shape[1], 1)
    out = math.ceil(one * kept_share)
    return forward + one + out, backward + one + 2 * out


def _flops(inputs: Inputs) -> tuple[int, int]:
    batch, length, channels = (inputs["tokens"] if "tokens" in inputs else inputs["residual"]).shape
    dropped = length - inputs["num_prefix_tokens"] - inputs["num_keep"]
    return 2 * batch * dropped * channels, 3 * batch * dropped * channels


_CASES = (
    _case("vit", 3, 197, 96, 138),
    _case("second layer", 2, 140, 64, 98),
    _case("channels not a multiple of a vector", 2, 50, 37, 20),
    _case("one channel", 2, 9, 1, 4),
    _case("two tokens", 5, 2, 8, 1),
    _case("keep one", 2, 30, 48, 1),
    _case("keep all but one", 2, 30, 48, 28),
    _case("nothing to drop", 2, 30, 48, 29),
    _case("registers", 2, 60, 32, 20, prefix=5),
    _case("no prefix", 2, 20, 32, 7, prefix=0),
    _case("without fusion", 2, 60, 32, 20, fuse=False),
    _case("video", 1, 1569, 16, 1098),
    _case("one long row", 1, 300, 200, 100),
    _case("empty batch", 0, 20, 8, 5),
    Case("ties", _ties),
)

SPECS = (
    OpSpec(
        name="reorganize_tokens",
        function=reorganize_tokens,
        composition=compose,
        cases=(*_CASES, Case("NaN and infinite scores", _not_finite)),
        traffic=traffic,
        flops=_flops,
    ),
    OpSpec(
        name="add_reorganize_norm",
        function=add_reorganize_norm,
        composition=compose_seam,
        cases=tuple(_seam(case) for case in _CASES if case.name not in ("one channel",)),
        traffic=_seam_traffic,
        flops=_flops,
    ),
)
