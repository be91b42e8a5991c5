"""Tag loss: the chunked reference of this project against a linear layer and a dense (B, V) target.

There is no kernel here yet. The reference never holds the (B, V) logits and computes them twice: what is compared is
the price of that.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import DEVICE, DIRECTIONS, Bench, ours, peer
from xray_kernels.tag_loss.spec import SPECS, sample_inputs

SPEC = SPECS[0]


@peer("dense target")
def dense(features: Tensor, weight: Tensor, tags: Tensor, offsets: Tensor) -> Tensor:
    counts = offsets.diff()
    samples = torch.arange(len(counts), device=tags.device).repeat_interleave(counts)
    target = features.new_zeros(len(counts), len(weight))
    target.index_put_((samples, tags), (1 / counts[samples]).to(target.dtype), accumulate=True)
    return F.cross_entropy(F.linear(features, weight), target)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tag_loss(direction: str, bench: Bench) -> None:
    like = (torch.float32, DEVICE, torch.Generator().manual_seed(0))
    batch, num_tags, width = (128, 8192, 768) if bench.full else (3, 20, 8)
    inputs = sample_inputs([1 + i % 4 for i in range(batch)], num_tags, width, like)
    bench.compare(SPEC, inputs, (dense, *ours(SPEC)), "128 samples, 8192 tags, 768 features", direction)
