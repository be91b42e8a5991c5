"""Sample inputs, the plain composition, and the cost of the attention ops."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from xray_kernels.attention import (
    attention,
    attention_varlen,
    attention_varlen_with_scores,
    attention_with_scores,
)
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    num_prefix_tokens: int = 1,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with the class row taken from the materialised matrix, as the official EViT code does."""
    weights = _weights(query, key, scale, False, key_lengths)
    scores = weights[:, :, 0, num_prefix_tokens:].mean(1)
    return weights @ value, scores.to(torch.promote_types(scores.dtype, torch.float32))


def compose_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """One sequence after the other, as one does without packing."""
    out = [compose(*sequence, scale=scale, is_causal=is_causal) for sequence in _split(query, key, value, cu_seqlens)]
    return torch.cat([query[:0], *(x[0].transpose(0, 1) for x in out)])


def compose_varlen_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    num_prefix_tokens: int = 1,
) -> tuple[Tensor, Tensor]:
    """The same with the class row of each sequence; 0 for prefix tokens."""
    sequences = _split(query, key, value, cu_seqlens)
    out = [compose_with_scores(*sequence, scale=scale, num_prefix_tokens=0) for sequence in sequences]
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = [x[1][0].masked_fill(torch.arange(x[1].shape[1], device=query.device) < num_prefix_tokens, 0) for x in out]
    return (
        torch.cat([query[:0], *(x[0][0].transpose(0, 1) for x in out)]),
        torch.cat([query.new_empty(0, dtype=wide), *scores]),
    )


def _split(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> list[list[Tensor]]:
    bounds = cu_seqlens.tolist()
    return [
        [x[first:last].transpose(0, 1)[None] for x in (query, key, value)]
        for first, last in itertools.pairwise(bounds)
        if last > first
    ]


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


def _packed(name: str, lengths: list[int], h: int, d: int, *, peak: float = 1.0, **more: object) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
        like = (dtype, device, generator)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        total = int(bounds[-1])
        return {
            "query": randn(total, h, d, like=like) * peak,
            "key": randn(total, h, d, like=like),
            "value": randn(total, h, d, like=like),
            "cu_seqlens": bounds.to(device, torch.int32),
            **more,
        }

    return Case(name, make)


def _traffic(inputs: Inputs) -> tuple[int, int]:
    once = nbytes(inputs["query"], inputs["key"], inputs["value"])
    out = nbytes(inputs["query"])
    return once + out, 2 * once + 2 * out


def _flops(inputs: Inputs) -> tuple[int, int]:
    """Two products of the tiles forward, five backward."""
    query, key = inputs["query"], inputs["key"]
    if "cu_seqlens" in inputs:
        pairs = query.shape[1] * int(inputs["cu_seqlens"].diff().square().sum())
    else:
        pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    product = 2 * pairs * query.shape[-1]
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
            _case("lengths", 4, 2, 40, 40, 32, key_lengths=[40, 0, 1, 17], num_prefix_tokens=2),
            _case("sharp", 1, 2, 50, 50, 64, peak=30.0),
            _case("empty batch", 0, 2, 5, 5, 16),
        ),
        traffic=_traffic,
        flops=_flops,
    ),
    OpSpec(
        name="attention_varlen",
        function=attention_varlen,
        composition=compose_varlen,
        cases=(
            _packed("unequal clips", [20, 1, 50, 33], 2, 32),
            _packed("empty sequences", [0, 7, 0, 0, 9, 0], 3, 16),
            _packed("causal", [30, 5, 41], 2, 64, is_causal=True),
            _packed("no sequence", [], 2, 16),
            _packed("sharp", [50, 21], 2, 64, peak=30.0),
        ),
        traffic=_traffic,
        flops=_flops,
    ),
    OpSpec(
        name="attention_varlen_with_scores",
        function=attention_varlen_with_scores,
        composition=compose_varlen_with_scores,
        cases=(
            _packed("unequal clips", [20, 2, 50, 33], 2, 32),
            _packed("registers", [40, 3, 17], 2, 72, num_prefix_tokens=4),
            _packed("empty sequences", [0, 7, 0, 0, 9, 0], 3, 16),
            _packed("vit", [197, 140], 2, 64),
        ),
        traffic=_traffic,
        flops=_flops,
    ),
)
