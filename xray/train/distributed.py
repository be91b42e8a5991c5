"""The only file that knows of processes: starting and ending a group, sharding a task, agreeing on numbers.

With one process none of it is used but `materialize`. Under `torchrun` (which sets WORLD_SIZE, RANK and
LOCAL_RANK) parameters, gradients and optimizer state are sharded by FSDP2.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from xray import models
from xray.models.heads import TagHead
from xray.models.layers import Block
from xray.train import rendezvous
from xray.train.errors import TrainError
from xray.train.recipes import Recipe
from xray.train.tasks import Task

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others before it gives up.

One that ends is noticed by torchrun at once, so this only bounds a hang. What may keep processes waiting for each other
are a tokenizer's training on a million captions, a first compilation and a save to slow storage: minutes each.
"""
Made = TypeVar("Made")
MAY_DIFFER = ("progress",)  # settings that processes of one run need not share


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

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, an object of plain Python types, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first_does(self, action: Callable[[], Made]) -> Made:
        """Let the first process act while the others wait; all get what it returns, and if it fails, so do they.

        What `action` returns is None or made of plain Python types.
        """
        result: Any = None
        failure: Exception | None = None
        if self.is_first:
            try:
                result = action()
            except (OSError, ValueError) as error:
                failure = error
        message, result = self.share(("" if failure is None else str(failure) or type(failure).__name__, result))
        if failure is not None:
            raise failure
        if message:
            raise TrainError(message)
        return result


@contextmanager
def world() -> Iterator[World]:
    """This process's `World`; under torchrun the process group lives as long as the context.

    Raises:
        TrainError: torchrun started more processes on this machine than it has GPUs, or the processes cannot meet.
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
    try:
        rendezvous.join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise _no_meeting(error, rank, size) from error
    try:
        yield World(rank=rank, size=size, device=device)
    finally:
        dist.destroy_process_group()


def _no_meeting(error: Exception, rank: int, size: int) -> TrainError:
    """What to tell a user whose processes could not form a group."""
    address = ":".join(os.environ.get(name, f"${name}") for name in ("MASTER_ADDR", "MASTER_PORT"))
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text:
        reason = "that port is in use: choose another by MASTER_PORT, or end the run that holds it"
    elif "imed out" in text or "timeout" in text:
        reason = (
            f"not all came within {TIMEOUT.total_seconds():.0f} seconds: give every node the same address, port "
            "and number of processes"
        )
    else:
        reason = text
    return TrainError(f"process {rank} of {size} could not meet the others at {address}: {reason}")


def check_alike(recipe: Recipe, place: World) -> None:
    """Make sure that all processes were started with one recipe and one version of the code. All must call it.

    Raises:
        TrainError: on every process, where any differs from the first: which, in what, and both values.
    """
    if place.size == 1:
        return
    mine = {key: value for key, value in asdict(recipe).items() if key not in MAY_DIFFER}
    mine |= {"xray's code": _code_version(), "torch": torch.__version__}
    text = json.dumps(mine)
    digests = place.gather(hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
    if len(set(digests)) == 1:
        return
    settings: list[dict[str, Any]] = [json.loads(text) for text in place.gather(text)]
    first = settings[0]
    key = next(key for key in first if any(other.get(key) != first[key] for other in settings))
    odd = [rank for rank, other in enumerate(settings) if other.get(key) != first[key]]
    who = f"process {odd[0]}" if len(odd) == 1 else f"processes {', '.join(map(str, odd))}"
    raise TrainError(
        f"{who} of {place.size} started with another recipe or version than process 0: {key} is "
        f"{settings[odd[0]].get(key)!r} there and {first[key]!r} on process 0; start all of them by the same command"
    )


def _code_version() -> str:
    """A short digest of this package's and its kernels' Python files."""
    digest = hashlib.blake2b(digest_size=6)
    for package in ("xray", "xray_kernels"):
        folder = Path(sys.modules[package].__path__[0])
        for file in sorted(folder.rglob("*.py"), key=lambda file: file.relative_to(folder).as_posix()):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def mesh_shape(shard_size: int, size: int) -> tuple[int, ...]:
    """The device mesh of `size` processes: (shards,), or (replicas, shards) where a copy takes fewer than all.

    Raises:
        TrainError: `shard_size` does not divide the number of processes.
    """
    if shard_size in (0, size):
        return (size,)
    if shard_size > size or size % shard_size:
        raise TrainError(
            f"shard_size is {shard_size} and must be 0 or divide the number of processes, which is {size}: give "
            f"shard_size=0 or start a multiple of {shard_size} processes"
        )
    return size // shard_size, shard_size


def units(module: nn.Module) -> list[nn.Module]:
    """What is sharded, and so gathered, by itself: blocks, and tables that have a row for each word or tag."""
    return [part for part in module.modules() if isinstance(part, Block | nn.Embedding | TagHead)]


def shard(task: Task, place: World, dtype: torch.dtype, shard_size: int = 0) -> None:
    """Shard every unit, then the rest, over `shard_size` processes, 0 for all (FSDP2; HSDP where there are copies).

    On a GPU blocks are gathered and computed in `dtype`; what is outside of them (embeddings, heads, norms,
    the logit scale) is small or delicate and stays float32 until autocast takes it. Gradients are reduced
    in float32. Weights of units are gathered again for the backward pass; those of the rest stay.

    Raises:
        TrainError: `shard_size` does not divide the number of processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    shape = mesh_shape(shard_size, place.size)
    mesh = init_device_mesh(place.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    # Inputs are left alone: the residual stream stays float32, as it does in one process under autocast. That
    # also computes norms in float32 on a GPU whatever their weights are; on a CPU it does not, and mixing
    # is an error there, so a CPU gathers float32 and autocast does the rest.
    gathered = dtype if place.device.type == "cuda" else None
    block_policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for unit in units(task):
        fully_shard(
            unit,
            mesh=mesh,
            mp_policy=block_policy if isinstance(unit, Block) else policy,
            # The head is the last to be used and the first that the backward pass needs.
            reshard_after_forward=not isinstance(unit, TagHead),
        )
        if isinstance(unit, TagHead):
            register_fsdp_forward_method(unit, "loss")
    fully_shard(task, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for method in task.more_forwards:
        register_fsdp_forward_method(task, method)


def materialize(task: Task, place: World, seed: int) -> None:
    """Give a task that was built on the meta device, and perhaps sharded, memory and freshly drawn weights.

    Weights are drawn on the CPU, one module at a time, and each process keeps its shard of them: it never holds
    more than its shards and one module, and starts with the same weights whatever the number of processes.
    """
    task.to_empty(device=place.device)
    models.initialize(task.model, seed, assign=assign)


@torch.no_grad()
def assign(parameter: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this process's part of it into a sharded one, without traffic."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None  # every process is on the mesh
    for size, index, placement in zip(mesh.shape, coordinate, parameter.placements, strict=True):
        if isinstance(placement, Shard):
            # As DTensor: parts of equal length but for the last ones, which are shorter or empty.
            length = -(-full.shape[placement.dim] // size)
            start = min(index * length, full.shape[placement.dim])
            full = full.narrow(placement.dim, start, min(length, full.shape[placement.dim] - start))
    parameter.to_local().copy_(full)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of which this process may hold a shard; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
