"""Sample inputs, the plain composition, and the cost of the attention ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xray_kernels.attention import attention, attention_with_scores
from xray_kernels.testing import Case, Inputs, OpSpec, nbytes, randn


def compose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Attention as a textbook writes it."""
    return _weights(query, key, scale, is_causal, key_lengths) @ value


def compose_with_scores(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """Attention with the class row taken from the materialised matrix, as the official EViT code does."""
    weights = _weights(query, key, scale, False, None)
    scores = weights[:, :, 0, num_prefix_tokens:].mean(1)
    return weights @ value, scores.to(torch.promote_types(scores.dtype, torch.float32))


def _weights(query: Tensor, key: Tensor, scale: float | None, is_causal: bool, key_lengths: Tensor | None) -> Tensor:
    logits = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    allowed = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    if is_causal:
        allowed = allowed.tril()
    if key_lengths is not None:
        allowed &= torch.arange(key.shape[2], device=key.device) < key_lengths[:, None, None, None]
    some = allowed.any(-1, keepdim=True)
    return logits.masked_fill(~allowed & some, float("-inf")).softmax(-1) * some


def _case(name: str, b: int, h: int, nq: int, nk: int, d: int, *, peak: float = 1.0, **more: object) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
        like = (dtype, device, generator)
        inputs: Inputs = {
            "query": randn(b, h, nq, d, like=like) * peak,
            "key": randn(b, h, nk, d, like=like),
            "value": randn(b, h, nk, d, like=like),
            **more,
        }
        lengths = inputs.get("key_lengths")
        return inputs if lengths is None else {**inputs, "key_lengths": torch.tensor(lengths, device=device)}

    return Case(name, make)


def _traffic(inputs: Inputs) -> tuple[int, int]:
    once = nbytes(inputs["query"], inputs["key"], inputs["value"])
    out = nbytes(inputs["query"])
    return once + out, 2 * once + 2 * out


def _flops(inputs: Inputs) -> tuple[int, int]:
    batch, heads, length, head_dim = inputs["query"].shape
    product = 2 * batch * heads * length * inputs["key"].shape[2] * head_dim
    return 2 * product, 5 * product


SPECS = (
    OpSpec(
        name="attention",
        function=attention,
        composition=compose,
        cases=(
            _case("one token", 3, 2, 1, 1, 16),
            _case("two tokens", 1, 3, 2, 2, 80),
            _case("vit", 2, 2, 197, 197, 64),
            _case("odd head dim", 1, 2, 72, 72, 72),
            _case("more keys", 2, 1, 33, 100, 32),
            _case("more queries", 2, 1, 100, 33, 32),
            _case("causal", 2, 2, 77, 77, 64, is_causal=True),
            _case("causal rectangle", 1, 2, 20, 30, 16, is_causal=True),
            _case("lengths", 4, 2, 40, 40, 32, key_lengths=[40, 0, 1, 17]),
            _case("causal with lengths", 3, 2, 40, 40, 32, is_causal=True, key_lengths=[40, 1, 23]),
            _case("sharp", 1, 2, 50, 50, 64, peak=30.0),
            _case("scale", 1, 2, 24, 24, 16, scale=0.5),
            _case("empty batch", 0, 2, 5, 5, 16),
        ),
        traffic=_traffic,
        flops=_flops,
    ),
    OpSpec(
        name="attention_with_scores",
        function=attention_with_scores,
        composition=compose_with_scores,
        cases=(
            _case("smallest", 3, 2, 2, 2, 16),
            _case("vit", 2, 3, 197, 197, 64),
            _case("after one reorganisation", 2, 2, 140, 140, 64),
            _case("registers", 2, 2, 72, 72, 80, num_prefix_tokens=5),
            _case("one candidate", 2, 2, 8, 8, 32, num_prefix_tokens=7),
            _case("wide head", 1, 1, 30, 30, 256),
            _case("sharp", 1, 2, 50, 50, 64, peak=30.0),
            _case("empty batch", 0, 2, 5, 5, 16),
        ),
        traffic=_traffic,
        flops=_flops,
    ),
)
