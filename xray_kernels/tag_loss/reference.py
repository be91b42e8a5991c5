"""What the tag loss means, in plain PyTorch, a chunk of the vocabulary at a time; never the (B, V) logits.

Log-sum-exps are float64, B numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LEAST_CHUNK = 16
"""Tags of the smallest chunk worth computing."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def bytes_per_tag(batch: int, width: int, dtype: torch.dtype) -> int:
    """Workspace for one tag of a chunk: three copies of its logits, its weight widened and that's gradient."""
    return (3 * batch + 2 * width) * wide_dtype(dtype).itemsize


def _chunks(
    features: Tensor, weight: Tensor, bias: Tensor | None, max_workspace_bytes: int
) -> Iterator[tuple[slice, Tensor]]:
    """(tags, their logits) chunk by chunk."""
    wide = wide_dtype(features.dtype)
    step = max(max_workspace_bytes // bytes_per_tag(features.shape[0], features.shape[1], features.dtype), 1)
    for start in range(0, weight.shape[0], step):
        chunk = slice(start, min(start + step, weight.shape[0]))
        logits = features @ weight[chunk].to(wide).T
        yield chunk, logits if bias is None else logits.add_(bias[chunk].to(wide))


def _targets(tags: Tensor, offsets: Tensor, tag_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each entry its sample, whether it has one, and its weight (float64); how many samples have tags."""
    batch, counts = offsets.shape[0] - 1, offsets.diff()
    samples = torch.searchsorted(offsets[1:], torch.arange(len(tags), device=tags.device), right=True)
    known = samples < batch
    samples = samples.clamp(max=max(batch - 1, 0))
    weights = counts[samples].clamp(min=1).double().reciprocal() if tag_weights is None else tag_weights.double()
    return samples, known, weights, (counts > 0).sum().clamp(min=1)


def _places(tags: Tensor, samples: Tensor, known: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """Where each entry stands in a chunk's flattened (B, C) logits, a valid place, and whether it does."""
    size = chunk.stop - chunk.start
    inside = known & (tags >= chunk.start) & (tags < chunk.stop)
    return samples * size + (tags - chunk.start).clamp(0, size - 1), inside


def tag_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tags: Tensor,
    offsets: Tensor,
    tag_weights: Tensor | None,
    max_workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_t w_t (lse_i - z_it) / (samples with tags), log-sum-exps (B,), entries' logits (nnz,); all float64.

    An entry whose tag or sample does not exist has a logit of NaN, and so has the loss.
    """
    samples, known, weights, tagged = _targets(tags, offsets, tag_weights)
    lse = features.new_full((len(features),), float("-inf"), dtype=torch.float64)
    picked = features.new_full((len(tags),), float("nan"), dtype=torch.float64)
    for chunk, logits in _chunks(features.to(wide_dtype(features.dtype)), weight, bias, max_workspace_bytes):
        peak = logits.amax(1, keepdim=True)
        total = (logits - peak).exp_().sum(1)
        lse = torch.logaddexp(lse, peak.squeeze(1).double() + total.double().log())
        place, inside = _places(tags, samples, known, chunk)
        picked = torch.where(inside, logits.flatten()[place].double(), picked)
    return (weights * (lse[samples] - picked)).sum() / tagged, lse, picked


def tag_loss_backward(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tags: Tensor,
    offsets: Tensor,
    tag_weights: Tensor | None,
    lse: Tensor,
    picked: Tensor,
    max_workspace_bytes: int,
    features_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features, weight, bias and tag_weights.

    dz_iv = (W_i p_iv - sum of w_t where t is v) / (samples with tags); W_i is the sum of sample i's weights. Those of
    features and weight only where asked for, else empty; empty as well for a bias or tag_weights that is None.
    """
    samples, known, weights, tagged = _targets(tags, offsets, tag_weights)
    wide, factor = wide_dtype(features.dtype), grad.double() / tagged
    features_wide = features.to(wide)
    weights = torch.where(known, weights * factor, 0.0)
    row_weight = features.new_zeros(len(features), dtype=torch.float64)
    row_weight = row_weight.index_put((samples,), weights, accumulate=True).to(wide)[:, None]
    high = lse[:, None].to(wide)
    low = (lse[:, None] - high).to(wide)
    grad_features = features_wide.new_zeros(features.shape if features_grad else (0,))
    grad_weight = weight.new_empty(weight.shape if weight_grad else (0,))
    grad_bias = weight.new_empty(0 if bias is None else len(bias))
    for chunk, logits in _chunks(features_wide, weight, bias, max_workspace_bytes):
        dlogits = logits.sub_(high).sub_(low).exp_().mul_(row_weight)
        place, inside = _places(tags, samples, known, chunk)
        dlogits.view(-1).index_put_((place,), torch.where(inside, -weights, 0.0).to(wide), accumulate=True)
        if features_grad:
            grad_features.addmm_(dlogits, weight[chunk].to(wide))
        if weight_grad:
            grad_weight[chunk] = dlogits.T @ features_wide
        if bias is not None:
            grad_bias[chunk] = dlogits.sum(0)
    grad_tag_weights = (
        features.new_empty(0) if tag_weights is None else ((lse[samples] - picked) * factor).to(tag_weights.dtype)
    )
    return grad_features.to(features.dtype), grad_weight, grad_bias, grad_tag_weights
