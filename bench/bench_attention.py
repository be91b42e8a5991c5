"""Attention with the class token's scores, against attention without them and against what EViT users do today.

On a CPU: 197 tokens of images and 1,569 of clips, heads of 64. On a GPU: the lengths of ViT and EViT layers from 72 to
1,569 tokens, heads of 64 and 128, half a million tokens a batch; below about 500 tokens memory is the limit (GB/s
counts), above the matrix units are.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness import DEVICE, DIRECTIONS, Bench, Peer, ours, peer
from bench.results import Target
from xray_kernels.attention import attention, attention_with_scores
from xray_kernels.attention.spec import SPECS, compose
from xray_kernels.testing import Inputs, randn

ON_GPU = DEVICE.type == "cuda"
SPEC = next(spec for spec in SPECS if spec.name == "attention_with_scores")
TOKENS = 2**19
LENGTHS = (72, 100, 140, 197, 257, 577, 1025, 1569)
SHAPES = (
    [(TOKENS // n, 768 // d, n, d) for d in (64, 128) for n in LENGTHS]
    if ON_GPU
    else [(32, 12, 197, 64), (2, 12, 1569, 64)]
)
SMOKE = (1, 2, 9, 16)
NO_SCORES = "xray without scores"


@peer("eager with scores")
def eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The official EViT code."""
    weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
    return weights @ value, weights[:, :, 0, 1:].mean(1).float()


def without_scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def separate_scores(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """SDPA, and the class token's row once more by itself: the best one can do without a kernel."""
    row = (query[:, :, :1].float() @ key.transpose(-2, -1).float() * query.shape[-1] ** -0.5).softmax(-1)
    return F.scaled_dot_product_attention(query, key, value), row[:, :, 0, 1:].mean(1)


SDPA = Peer("torch SDPA, no scores", without_scores, composition=compose)
SEPARATE = Peer("torch SDPA + separate scores", separate_scores)
MINE_WITHOUT = Peer(NO_SCORES, attention, composition=compose)
CUDNN, FLASH = (
    Peer(f"{name} SDPA, no scores", without_scores, composition=compose, context=functools.partial(sdpa_kernel, kind))
    for name, kind in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION))
)
OVER = [
    Peer(f"xray {name}", functools.partial(attention_with_scores, backend=name), ours=True, needs=needs)
    for name, needs in (("sdpa", ""), ("flash_attn", "flash_attn"), ("xformers", "xformers"))
    if ON_GPU
]


def own() -> list[Peer]:
    """The reference materialises what does not fit on a GPU at these sizes."""
    return [each for each in ours(SPEC) if not (ON_GPU and each.name == "xray reference")]


def peers() -> tuple[Peer, ...]:
    if not ON_GPU:
        return (SDPA, eager, SEPARATE, MINE_WITHOUT, *own())
    return (SDPA, CUDNN, FLASH, SEPARATE, MINE_WITHOUT, *OVER, *own())


def targets(dtype: torch.dtype, direction: str) -> list[Target]:
    """What is wanted of attention with its scores, beside any other peer on the same machine."""
    if ON_GPU:
        return [Target(CUDNN.name, 1.0), Target(FLASH.name, 1.0), Target(SEPARATE.name, 1.3)]
    if direction == DIRECTIONS[1]:
        return [Target(SDPA.name, 1.2)]
    is_half = dtype == torch.bfloat16
    wanted = [Target(SDPA.name, 1.3 if is_half else 1.05), Target(eager.name, 3.0 if is_half else 2.5)]
    return [*wanted, Target(NO_SCORES, 1 / 1.05)]


def make_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Inputs:
    """Query, key and value as a model has them: views of one projection, (B, N, 3, H, D)."""
    batch, heads, length, head_dim = shape
    joint = randn(batch, length, 3, heads, head_dim, like=(dtype, DEVICE, torch.Generator().manual_seed(0)))
    return dict(zip(("query", "key", "value"), joint.permute(2, 0, 3, 1, 4).unbind(0), strict=True))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_attention(shape: tuple[int, int, int, int], dtype: torch.dtype, direction: str, bench: Bench) -> None:
    if ON_GPU and dtype == torch.float32:
        pytest.skip("on a GPU what matters is bfloat16")
    size = shape if bench.full else SMOKE
    # one row of the batch is enough to be right on, where all of them would be too large to materialise
    checked = make_inputs((1, *size[1:]), dtype) if ON_GPU else None
    case = " x ".join(map(str, size))
    bench.compare(SPEC, make_inputs(size, dtype), peers(), case, direction, targets(dtype, direction), checked=checked)
