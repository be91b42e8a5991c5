"""What ranks do together besides exchanging texts: agree on the inputs, merge column statistics, average.

Each rank holds n image-text pairs, computes its own n rows against all N = W n texts, and returns its share
of the loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from xray_kernels._checks import FLOAT_DTYPES
from xray_kernels.contrastive_loss.inputs import EXCHANGES, LOSSES, Call


class Terms(NamedTuple):
    """What every rank must bring alike, as numbers: it decides which collectives there are, and of what size."""

    loss: int
    rows: int
    columns: int
    dtype: int
    exchange: int
    labels: int
    with_ranks: int
    gradients: int


_TERMS: dict[str, tuple[str, tuple[Any, ...] | None]] = {
    "loss": ("the loss", LOSSES),
    "rows": ("the number of rows of image_features", None),
    "columns": ("the number of columns of image_features", None),
    "dtype": ("the dtype of image_features", FLOAT_DTYPES),
    "exchange": ("exchange", EXCHANGES),
    "labels": ("whether labels are given", ("no", "yes")),
    "with_ranks": ("whether ranks of pairs are asked for", ("no", "yes")),
    "gradients": ("what requires a gradient", ("nothing", "not text_features", "text_features")),
}
"""How a message calls a term, and what its numbers stand for; None is the number itself."""
_NO_OPINION = -(2**62)
"""What a rank that failed contributes for a term: less than any value and than the negative of any."""
_agreed: weakref.WeakKeyDictionary[Any, tuple[Terms, Tensor]] = weakref.WeakKeyDictionary()
"""Process group -> the terms that all its ranks were last seen to agree on, and these as they are sent."""


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


def check_backend(features: Tensor, group: Any) -> None:
    """RuntimeError where the group has no backend for the features' device."""
    if features.device.type not in _devices(group):
        raise RuntimeError(
            f"image_features is on {features.device} but the process group's backend is"
            f" {dist.get_backend_config(group)}; move the features or add a backend for {features.device.type}"
        )


def terms_of(call: Call) -> Terms:
    """The terms of a call that was checked."""
    trained = [value.requires_grad for value in call if isinstance(value, Tensor)]
    gradients = 0 if not (torch.is_grad_enabled() and any(trained)) else 1 + call.text.requires_grad
    return Terms(
        LOSSES.index(call.loss),
        call.image.shape[0],
        call.image.shape[1],
        FLOAT_DTYPES.index(call.image.dtype),
        EXCHANGES.index(call.exchange),
        int(call.labels is not None),
        int(call.with_ranks),
        gradients,
    )


@contextmanager
def failing_together(group: Any) -> Iterator[None]:
    """A rank that raises inside takes part in the others' `agree`, which then fails too, before its error goes on."""
    try:
        yield
    except Exception:
        reduced = torch.tensor(
            [_NO_OPINION] * (2 * len(Terms._fields)) + [dist.get_rank(group) + 1], device=_agreement_device(group)
        )
        with suppress(RuntimeError):  # where others have ended, what matters is still this rank's own error
            dist.all_reduce(reduced, dist.ReduceOp.MAX, group=group)
        raise


def agree(terms: Terms, group: Any) -> None:
    """All ranks must bring the same terms: ValueError, on all of them, for the first in which they differ.

    RuntimeError where another rank failed instead. One reduction of a few integers a call. On the CPU, or where the
    group has a backend for the CPU beside the accelerator's ("cpu:gloo,cuda:nccl"), it is one of host memory and
    every rank reads the result: nobody waits for a device, and no failure goes unseen.

    A group with a backend for accelerators alone has to reduce on the device, and reading that would wait for all
    work before it. So only ranks read whose terms differ from the last ones agreed on. Whatever is wrong at the first
    call is thus seen by all, and of ranks that come to differ later at least one raises; the others then wait in the
    exchange until that process ends. Nothing can reach them there: what they do not read back cannot stop them.
    """
    device = _agreement_device(group)
    last, sent = _agreed.get(group, (None, None))
    if sent is None or last != terms:
        sent = torch.tensor([*terms, *(-term for term in terms), 0], device=device)
    reduced = sent.clone()
    dist.all_reduce(reduced, dist.ReduceOp.MAX, group=group)
    if last == terms and not _is_read(device):
        return
    *bounds, failed = reduced.tolist()
    rank = dist.get_rank(group)
    if failed:
        raise RuntimeError(
            f"rank {failed - 1} of the group failed before the exchange, see its error; so rank {rank} stops"
        )
    for name, mine, most, negative in zip(
        Terms._fields, terms, bounds[: len(terms)], bounds[len(terms) :], strict=True
    ):
        if most != -negative:
            what, names = _TERMS[name]
            other = -negative if mine == most else most
            mine, other = (value if names is None else names[value] for value in (mine, other))
            raise ValueError(f"{what} must be the same on every rank, got {mine} on rank {rank} and {other} on another")
    _agreed[group] = (terms, sent)


def _devices(group: Any) -> list[str]:
    """Types of the devices whose tensors a group can send, from a configuration such as "cpu:gloo,cuda:nccl"."""
    return [backend.partition(":")[0] for backend in dist.get_backend_config(group).split(",")]


def _agreement_device(group: Any) -> torch.device:
    devices = _devices(group)
    return torch.device("cpu" if "cpu" in devices else devices[0])


def _is_read(device: torch.device) -> bool:
    """Whether every agreement on this device is read: where that waits for nothing but the other ranks."""
    return device.type == "cpu"


def all_gather(value: Tensor, group: Any) -> Tensor:
    """(n, ...) of every rank, in rank order: (N, ...), without gradient."""
    return start_all_gather(value, group, False)[0]


def start_all_gather(value: Tensor, group: Any, async_op: bool = True) -> tuple[Tensor, Any]:
    """`all_gather` under way: its result, to be read after `wait` of what comes second."""
    out = value.new_empty(dist.get_world_size(group) * value.shape[0], *value.shape[1:])
    # torch 2.13 renames the collective and warns of the old name, which is the only one in 2.10
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return out, collective(out, value.contiguous(), group=group, async_op=async_op)


def _reduce_scatter(value: Tensor, group: Any) -> Tensor:
    """This rank's (n, ...) of the sum over ranks of (N, ...)."""
    out = value.new_empty(value.shape[0] // dist.get_world_size(group), *value.shape[1:])
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    collective(out, value.contiguous(), group=group)
    return out


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


def merge_columns(column_lse: Tensor, group: Any) -> Tensor:
    """Log-sum-exp over ranks of each rank's (N,) partial ones: those of this rank's own n columns."""
    return _MergeColumns.apply(column_lse, group)


def mean_over_ranks(value: Tensor, group: Any) -> Tensor:
    """The mean over ranks, on every rank; so is its gradient."""
    return _Mean.apply(value, group)
