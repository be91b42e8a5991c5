"""The whole encoder, ViT-S/16 at 224 px: EViT at a keep rate of 0.7 against the dense model, inference.

EViT's paper reports 50% more images per second for DeiT-S at this keep rate. The ratio of the operations is the ideal;
what a peer reaches of it says how well token reorganisation turns operations into time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bench.harness import DEVICE, DIRECTIONS, Bench, Peer, fastest_matmul, peer
from bench.results import Target
from xray import models
from xray_kernels import testing
from xray_kernels.testing import Inputs, OpSpec, nbytes

KEEP_RATE = 0.7
PAPER = 1.5
BATCH = 64 if DEVICE.type == "cuda" else 8


@functools.cache
def encoder(full: bool, dtype: torch.dtype) -> models.VisionTransformer:
    """Random weights, with queries and keys large enough for attention to prefer some tokens, as trained ones do."""
    torch.manual_seed(0)
    model = models.VisionTransformer(models.SIZES["s16" if full else "tiny"]).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 2  # type: ignore[operator, union-attr]
    return model.to(DEVICE, dtype)


def encode(pixels: Tensor, full: bool, keep_rate: float) -> Tensor:
    return encoder(full, pixels.dtype)(pixels, keep_rate)


@contextlib.contextmanager
def reference() -> Iterator[None]:
    with testing.use_implementation("reference"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_encoder(dtype: torch.dtype, bench: Bench) -> None:
    if dtype != fastest_matmul(dtype):
        pytest.skip("this machine multiplies bfloat16 matrices more slowly than float32 ones")
    full = bench.full
    config = models.SIZES["s16" if full else "tiny"]
    dense_cost, cost = (models.encoder_cost(config, keep_rate=rate) for rate in (1.0, KEEP_RATE))
    size = config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(BATCH, 3, size, size, generator=generator).to(DEVICE, dtype)

    dense = functools.partial(encode, full=full, keep_rate=1.0)
    evit = functools.partial(encode, full=full, keep_rate=KEEP_RATE)

    def plain(pixels: Tensor) -> Tensor:
        with reference():
            return evit(pixels)

    def costs(inputs: Inputs) -> tuple[int, int]:
        weights = nbytes(*encoder(full, dtype).parameters())
        return weights + nbytes(inputs["pixels"]), 0

    spec = OpSpec("encoder", evit, plain, (), costs, lambda inputs: (BATCH * cost.flops, 0))
    peers = (
        Peer("dense", dense, composition=dense),
        peer("EViT, reference ops")(plain),
        Peer("EViT", evit, ours=True, default=True),
    )
    ideal = dense_cost.flops / cost.flops
    case = f"ViT-S/16, {BATCH} x 3 x {size} x {size}, keep rate {KEEP_RATE} ({ideal:.2f}x fewer FLOPs)"
    bench.compare(spec, {"pixels": pixels}, peers, case, DIRECTIONS[0], [Target("dense", PAPER)])
