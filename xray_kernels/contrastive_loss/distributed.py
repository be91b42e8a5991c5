"""Collectives with gradients for the contrastive losses: gather texts, merge column statistics, average.

Each rank holds n image-text pairs, computes its own n rows against all N = W n texts, and returns its share
of the loss.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from xray_kernels.contrastive_loss.tiling import wide_dtype

_verified_rows: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""Process group -> the rows per rank that all its ranks were last seen to agree on."""


def resolve_group(group: Any) -> Any:
    """The process group to compute over, the default one for `group=None`; None where one process is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise RuntimeError(
                "group was given but torch.distributed is not initialised; call init_process_group first"
            )
        return None
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError("group does not contain this process; only its members may compute the loss")
    return group if dist.get_world_size(group) > 1 else None


def check_equal_rows(features: Tensor, group: Any) -> None:
    """Every rank must bring as many rows as the others; ValueError where they do not.

    One reduction of two integers a call. It is read back, which on an accelerator waits for the device, only
    by ranks whose number of rows differs from the last one agreed on: where ranks disagree, at least one of
    them reads and raises.
    """
    rows = features.shape[0]
    bounds = features.new_full((2,), rows, dtype=torch.int64)  # filled there: a copy would wait for the device
    bounds[1].neg_()
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    if features.device.type == "cpu" or _verified_rows.get(group) != rows:
        most, least = bounds.tolist()
        if most != -least:
            raise ValueError(
                f"image_features must have the same number of rows on every rank, got {rows} on rank"
                f" {dist.get_rank(group)} and between {-least} and {most} over the group"
            )
        _verified_rows[group] = rows


def all_gather(value: Tensor, group: Any) -> Tensor:
    """(n, ...) of every rank, in rank order: (N, ...), without gradient."""
    out = value.new_empty(dist.get_world_size(group) * value.shape[0], *value.shape[1:])
    # torch 2.13 renames the collective and warns of the old name, which is the only one in 2.10
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(out, value.contiguous(), group=group)
    return out


def _reduce_scatter(value: Tensor, group: Any) -> Tensor:
    """This rank's (n, ...) of the sum over ranks of (N, ...)."""
    out = value.new_empty(value.shape[0] // dist.get_world_size(group), *value.shape[1:])
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    collective(out, value.contiguous(), group=group)
    return out


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_gather(value, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad.to(wide_dtype(grad.dtype)), ctx.group).to(grad.dtype), None


class _MergeColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, column_lse: Tensor, group: Any) -> Tensor:
        peak = column_lse.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
        total = (column_lse - peak).exp_()
        dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
        merged = peak.add_(total.log_())
        ctx.group = group
        ctx.save_for_backward((column_lse - merged).exp_())
        n = len(merged) // dist.get_world_size(group)
        return merged[n * dist.get_rank(group) :][:n].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return all_gather(grad, ctx.group).mul_(share), None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _mean(value, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _mean(grad, ctx.group), None


def _mean(value: Tensor, group: Any) -> Tensor:
    value = value / dist.get_world_size(group)
    dist.all_reduce(value, group=group)
    return value


def place(features: Tensor, group: Any) -> tuple[int, int]:
    """The number of ranks, and where this rank's (n, D) stand among the rows of all of them."""
    return dist.get_world_size(group), features.shape[0] * dist.get_rank(group)


def sum_columns(counts: Tensor, group: Any) -> Tensor:
    """Sums over ranks of (N,) integers: this rank's own n; empty where these are."""
    return _reduce_scatter(counts, group) if counts.numel() else counts


def gather_rows(value: Tensor, group: Any) -> Tensor:
    """(n, D) of every rank as (N, D); the gradient is summed over ranks in float32, its own rows to each."""
    return _GatherRows.apply(value, group)


def merge_columns(column_lse: Tensor, group: Any) -> Tensor:
    """Log-sum-exp over ranks of each rank's (N,) partial ones: those of this rank's own n columns."""
    return _MergeColumns.apply(column_lse, group)


def mean_over_ranks(value: Tensor, group: Any) -> Tensor:
    """The mean over ranks, on every rank; so is its gradient."""
    return _Mean.apply(value, group)
