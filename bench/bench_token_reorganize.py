"""Token reorganisation, alone and between residual add and LayerNorm, against the official EViT code's composition.

The shapes are ViT-B/16 at 224 px (A), a clip of 8 frames (B) and ViT-L/14 at 336 px (C), each at its first
reorganisation; on a GPU also A with a batch that moves 1 GiB, and with a batch of one, which is bound by launches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import DEVICE, DIRECTIONS, Bench, ours, peer
from bench.results import COPY, Target
from xray_kernels.testing import Inputs, randn
from xray_kernels.token_reorganize import reorganize_tokens
from xray_kernels.token_reorganize.spec import SPECS

REORGANIZE, SEAM = SPECS
ON_GPU = DEVICE.type == "cuda"
SHAPES = {
    "A": (64, 197, 768, 138),
    "B": (8, 1569, 768, 1098),
    "C": (64, 577, 1024, 404),
    **({"1 GiB of A": (0, 197, 768, 138), "one of A": (1, 197, 768, 138)} if ON_GPU else {}),
}
SEAM_SHAPES = ["A", *(["1 GiB of A", "one of A"] if ON_GPU else [])]
SMOKE = (2, 17, 32, 9)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def evit(tokens: Tensor, scores: Tensor, num_keep: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """top-k, gather, the indices it left out, gather, weighted sum, concatenation: the steps of the official code."""
    prefix, rest = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
    channels = rest.shape[2]
    kept = scores.topk(num_keep, dim=1, sorted=True).indices
    every = torch.arange(rest.shape[1], device=tokens.device).expand_as(scores)
    dropped = every.scatter(1, kept, -1).sort(dim=1).values[:, num_keep:]
    kept_tokens = rest.gather(1, kept[..., None].expand(-1, -1, channels))
    dropped_tokens = rest.gather(1, dropped[..., None].expand(-1, -1, channels))
    weights = scores.gather(1, dropped)[..., None].to(tokens.dtype)
    fused = (dropped_tokens * weights).sum(1, keepdim=True)
    return torch.cat([prefix, kept_tokens, fused], 1), kept


def evit_seam(
    residual: Tensor,
    update: Tensor,
    scores: Tensor,
    num_keep: int,
    weight: Tensor,
    bias: Tensor,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same after a residual addition and before a LayerNorm."""
    stream, kept = evit(residual + update, scores, num_keep, num_prefix_tokens)
    return stream, F.layer_norm(stream, stream.shape[-1:], weight, bias, 1e-6), kept


@peer("xray separate ops")
def separate(
    residual: Tensor,
    update: Tensor,
    scores: Tensor,
    num_keep: int,
    weight: Tensor,
    bias: Tensor,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    stream, kept = reorganize_tokens(residual + update, scores, num_keep, num_prefix_tokens=num_prefix_tokens)
    return stream, F.layer_norm(stream, stream.shape[-1:], weight, bias, 1e-6), kept


_compiled, _compiled_seam = torch.compile(evit, dynamic=False), torch.compile(evit_seam, dynamic=False)


@peer("torch.compile", needs="g++", slow=True)
def compiled(**inputs: Any) -> tuple[Tensor, Tensor]:
    return _compiled(**inputs)


@peer("torch.compile", needs="g++", slow=True)
def compiled_seam(**inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _compiled_seam(**inputs)


def make_inputs(shape: str, full: bool, dtype: torch.dtype) -> tuple[Inputs, str]:
    """Random tokens and scores that sum to 1 and are all different, as `topk` leaves the order of equal ones open; and
    the case in words."""
    batch, length, channels, num_keep = SHAPES[shape] if full else SMOKE
    batch = batch or 2**30 // (channels * dtype.itemsize * (length + num_keep + 2))
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(length - 1, generator=generator) + 1.0 for _ in range(batch)])
    inputs = {
        "tokens": randn(batch, length, channels, like=(dtype, DEVICE, generator)),
        "scores": (ranks / ranks[0].sum()).to(DEVICE),
        "num_keep": num_keep,
        "num_prefix_tokens": 1,
    }
    return inputs, f"{batch} x {length} x {channels}, keep {num_keep}"


def targets(shape: str, dtype: torch.dtype, direction: str) -> list[Target]:
    """What is wanted of `reorganize_tokens`, beside any other peer on the same machine."""
    if not ON_GPU:
        wanted = [Target(COPY, 0.8), Target("torch.compile", 1.0)]
        eager = 9.0 if dtype == torch.bfloat16 else 4.0
        return [*wanted, Target("official eager", eager)] if shape == "A" else wanted
    if shape == "one of A":
        return [Target("official eager", 3.0)]
    wanted = [Target(COPY, 0.85)] if shape == "1 GiB of A" else []
    if direction == DIRECTIONS[1]:
        wanted += [Target("official eager", 5.0), Target("torch.compile", 2.0)]
    return wanted


@pytest.mark.parametrize("direction", DIRECTIONS)
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_reorganize_tokens(shape: str, dtype: torch.dtype, direction: str, bench: Bench) -> None:
    inputs, case = make_inputs(shape, bench.full, dtype)
    peers = (peer("official eager")(evit), compiled, *ours(REORGANIZE))
    bench.compare(REORGANIZE, inputs, peers, case, direction, targets(shape, dtype, direction))


@pytest.mark.parametrize("direction", DIRECTIONS)
@DTYPES
@pytest.mark.parametrize("shape", SEAM_SHAPES)
def test_add_reorganize_norm(shape: str, dtype: torch.dtype, direction: str, bench: Bench) -> None:
    inputs, case = make_inputs(shape, bench.full, dtype)
    tokens = inputs.pop("tokens")
    like = (dtype, DEVICE, torch.Generator().manual_seed(1))
    channels = tokens.shape[2]
    inputs = {
        "residual": tokens,
        **inputs,
        "update": randn(*tokens.shape, like=like),
        "scores": inputs["scores"] + 0.1,  # a fused row of unit size, as LayerNorm divides by that
        "weight": 1 + randn(channels, like=like) / 4,
        "bias": randn(channels, like=like) / 4,
    }
    peers = (peer("official eager")(evit_seam), compiled_seam, separate, *ours(SEAM))
    wanted = [Target("xray separate ops", 1.6), Target("official eager", 5.0)]
    bench.compare(SEAM, inputs, peers, case, direction, wanted)
