"""Token reorganisation against the composition of the official EViT code, eager and compiled.

The shapes are ViT-B/16 at 224 px, a clip of 8 frames, and ViT-L/14 at 336 px, each at its first reorganisation.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness import DEVICE, DIRECTIONS, Bench, ours, peer
from xray_kernels.testing import Inputs, randn
from xray_kernels.token_reorganize.spec import SPECS

SPEC = SPECS[0]
SHAPES = {
    "64 x 197 x 768, keep 138": (64, 197, 768, 138),
    "8 x 1569 x 768, keep 1098": (8, 1569, 768, 1098),
    "64 x 577 x 1024, keep 404": (64, 577, 1024, 404),
}
SMOKE = (2, 17, 32, 9)


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


official = peer("official eager")(evit)
_compiled = torch.compile(evit, dynamic=False)


@peer("torch.compile", needs="g++", slow=True)
def compiled(**inputs: Any) -> tuple[Tensor, Tensor]:
    return _compiled(**inputs)


def make_inputs(batch: int, length: int, channels: int, num_keep: int, dtype: torch.dtype) -> Inputs:
    """Random tokens; scores that sum to 1 and are all different, as `topk` leaves the order of equal ones open."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(length - 1, generator=generator) + 1.0 for _ in range(batch)])
    return {
        "tokens": randn(batch, length, channels, like=(dtype, DEVICE, generator)),
        "scores": (ranks / ranks[0].sum()).to(DEVICE),
        "num_keep": num_keep,
        "num_prefix_tokens": 1,
    }


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reorganize_tokens(shape: str, dtype: torch.dtype, direction: str, bench: Bench) -> None:
    inputs = make_inputs(*(SHAPES[shape] if bench.full else SMOKE), dtype)
    bench.compare(SPEC, inputs, (official, compiled, *ours(SPEC)), shape, direction)
