"""Attention: the reference of this project against the textbook composition and PyTorch's own fused attention.

There is no attention kernel here yet, so what is timed as ours is a reference: it says what the op means and
materialises the probabilities.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import DEVICE, DIRECTIONS, Bench, ours, peer
from xray_kernels.attention.spec import SPECS, compose, compose_with_scores
from xray_kernels.testing import OpSpec, randn

SHAPE, SMOKE = (8, 12, 197, 64), (1, 2, 9, 16)


@peer("torch SDPA")
def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


PEERS = {
    "attention": (peer("plain composition")(compose), sdpa),
    "attention_with_scores": (peer("plain composition")(compose_with_scores),),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_attention(spec: OpSpec, direction: str, bench: Bench) -> None:
    like = (torch.float32, DEVICE, torch.Generator().manual_seed(0))
    inputs = {name: randn(*(SHAPE if bench.full else SMOKE), like=like) for name in ("query", "key", "value")}
    bench.compare(spec, inputs, (*PEERS[spec.name], *ours(spec)), "8 x 12 x 197 x 64", direction)
