"""Contrastive losses: the chunked references of this project against the compositions on the whole matrix.

There is no kernel here yet. The references hold a tile of the logits at a time, sum in float64, and compute it again in
the backward pass: what is compared is the price of that. At a batch where N x N no longer fits there is no baseline.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness import DEVICE, DIRECTIONS, Bench, ours, peer
from xray_kernels.contrastive_loss.spec import LOSSES, sample_features
from xray_kernels.testing import OpSpec

SHAPE, SMOKE = (1024, 512), (6, 8)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("spec", LOSSES, ids=lambda spec: spec.name)
def test_contrastive_loss(spec: OpSpec, direction: str, bench: Bench) -> None:
    like = (torch.float32, DEVICE, torch.Generator().manual_seed(0))
    inputs = sample_features(*(SHAPE if bench.full else SMOKE), like)
    inputs["logit_scale"] = torch.full((1,), 14.3, device=DEVICE)
    if spec.name == "siglip_loss":
        inputs["logit_bias"] = torch.full((1,), -10.0, device=DEVICE)
    plain = peer("plain composition")(spec.composition)
    bench.compare(spec, inputs, (plain, *ours(spec)), "1024 pairs x 512", direction)
