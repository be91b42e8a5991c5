"""Contrastive losses against open_clip's, which form the N x N logits, and against the arithmetic limit.

Work is counted at the minimum that our losses need when no logits are kept, U = 2 N N D: 4U for CLIP's loss with its
gradients, 3U for SigLIP's. open_clip's ClipLoss does 6U and holds several N x N matrices, so where these no longer fit
ours stands alone. Half types may be computed in float32 where that multiplies faster; open_clip's losses are then given
float32, which is the faster way to use them.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from bench.harness import DEVICE, DIRECTIONS, Bench, Peer, fastest_matmul, ours
from bench.peers import open_clip_losses
from bench.results import MATMUL, Target
from xray_kernels.contrastive_loss.spec import CLIP, SIGLIP, sample_features
from xray_kernels.testing import Inputs, OpSpec

ON_GPU = DEVICE.type == "cuda"
WIDTH = 768 if ON_GPU else 512
COMPARED, ALONE = ((32_768,), (65_536, 262_144)) if ON_GPU else ((8_192,), (65_536,))
SMOKE, CHECKED = 24, 600
DTYPES = [torch.bfloat16] if ON_GPU else [torch.float32, torch.bfloat16]
OPEN_CLIP, INF_CL = "open_clip", "Inf-CL"
theirs = functools.cache(open_clip_losses)


def open_clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **bias: Tensor) -> Tensor:
    """Its loss on one process, in the features' dtype or in float32 where that is faster."""
    name = "SigLipLoss" if bias else "ClipLoss"
    dtype = fastest_matmul(image_features.dtype)
    return getattr(theirs(), name)()(image_features.to(dtype), text_features.to(dtype), logit_scale, **bias)


def inf_cl(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Its kernel has one direction a call."""
    from inf_cl import cal_inf_loss

    there = cal_inf_loss(image_features, text_features, scale=logit_scale)
    back = cal_inf_loss(text_features, image_features, scale=logit_scale)
    return (there.mean() + back.mean()) / 2


def peers(spec: OpSpec, alone: bool) -> tuple[Peer, ...]:
    """The first is the baseline; at sizes where ours stands alone, only what runs by default of it."""
    own = ours(spec)
    others = [Peer(INF_CL, inf_cl, needs="inf_cl")] if ON_GPU and spec is CLIP else []
    if alone:
        return (*(each for each in own if each.name != "xray reference" and (ON_GPU or each.default)), *others)
    return (Peer(OPEN_CLIP, open_clip, needs="open_clip"), *others, *own)


def targets(spec: OpSpec, dtype: torch.dtype, direction: str, alone: bool) -> list[Target]:
    """What is wanted of the loss with its gradients."""
    if direction != DIRECTIONS[1]:
        return []
    wanted = [Target(MATMUL, 0.6)]
    if ON_GPU:
        return [*wanted, Target(INF_CL, 5.0)] if spec is CLIP else wanted
    if alone:
        return wanted
    if dtype == torch.bfloat16:
        return [*wanted, Target(OPEN_CLIP, 3.0)]
    return [*wanted, Target(OPEN_CLIP, 1.5)] if spec is CLIP else wanted


def make_inputs(spec: OpSpec, n: int, dtype: torch.dtype) -> Inputs:
    inputs = sample_features(n, WIDTH if n > SMOKE else 8, (dtype, DEVICE, torch.Generator().manual_seed(0)))
    inputs["logit_scale"] = torch.full((1,), 14.3, device=DEVICE)
    if spec is SIGLIP:
        inputs["logit_bias"] = torch.full((1,), -10.0, device=DEVICE)
    return inputs


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("n", [*COMPARED, *ALONE])
@pytest.mark.parametrize("spec", [CLIP, SIGLIP], ids=lambda spec: spec.name)
def test_contrastive_loss(spec: OpSpec, n: int, dtype: torch.dtype, direction: str, bench: Bench) -> None:
    alone = n in ALONE
    few = dtype == torch.bfloat16 and direction == DIRECTIONS[1] and (spec is CLIP or (ON_GPU and n == ALONE[0]))
    if alone and not few:
        pytest.skip("at this size, where one round takes long, CLIP's loss and its gradients in bfloat16 say enough")
    size = n if bench.full else SMOKE
    # enough pairs to be right on, where the float64 oracle of all of them would not fit
    checked = make_inputs(spec, min(size, CHECKED), dtype)
    case = f"{size} pairs x {WIDTH if bench.full else 8}"
    wanted = targets(spec, dtype, direction, alone)
    bench.compare(spec, make_inputs(spec, size, dtype), peers(spec, alone), case, direction, wanted, checked=checked)
