"""The only file that knows of processes: starting and ending a group, sharding a task, agreeing on numbers.

With one process none of it is used. Under `torchrun` (which sets WORLD_SIZE, RANK and LOCAL_RANK)
parameters, gradients and optimizer state are sharded by FSDP2.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from xray.train import rendezvous
from xray.train.errors import TrainError
from xray.train.tasks import Task

TIMEOUT = timedelta(minutes=10)  # for which processes wait for each other before they take one for dead


@dataclass(frozen=True)
class World:
    """This process's place among the processes of a run.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: where it computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files that are written once."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of a small tensor; what is not finite anywhere is so everywhere."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def share(self, value: Any) -> Any:
        """The first process's `value`, an object of plain Python types, on all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first_does(self, action: Callable[[], None]) -> None:
        """Let the first process act while the others wait; if it fails, so do they."""
        failure: Exception | None = None
        if self.is_first:
            try:
                action()
            except (OSError, ValueError) as error:
                failure = error
        message = self.share("" if failure is None else str(failure) or type(failure).__name__)
        if failure is not None:
            raise failure
        if message:
            raise TrainError(message)


@contextmanager
def world() -> Iterator[World]:
    """This process's `World`; under torchrun the process group lives as long as the context.

    Raises:
        TrainError: torchrun started more processes on this machine than it has GPUs.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise TrainError(
                f"process {local_rank} of this machine has no GPU, it has {torch.cuda.device_count()}: start "
                f"torchrun with --nproc-per-node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size == 1:
        yield World(rank=0, size=1, device=device)
        return
    rendezvous.join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", TIMEOUT)
    try:
        yield World(rank=rank, size=size, device=device)
    finally:
        dist.destroy_process_group()


def shard(task: Task, place: World, dtype: torch.dtype) -> None:
    """Shard every block, then the rest, over all processes (FSDP2).

    On a GPU blocks are gathered and computed in `dtype`; what is outside of them (embeddings, heads, norms,
    the logit scale) is small or delicate and stays float32 until autocast takes it. Gradients are reduced
    in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(place.device.type, (place.size,))
    # Inputs are left alone: the residual stream stays float32, as it does in one process under autocast. That
    # also computes norms in float32 on a GPU whatever their weights are; on a CPU it does not, and mixing
    # is an error there, so a CPU gathers float32 and autocast does the rest.
    gathered = dtype if place.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in task.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(task, mesh=mesh)
    for method in task.more_forwards:
        register_fsdp_forward_method(task, method)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of which this process may hold a shard; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
