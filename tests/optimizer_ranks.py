"""What one of several gloo processes computes for test_optimizer: optimizers over parameters that FSDP2 shards."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from xray.train import optimizer, schedule
from xray.train.recipes import RECIPES, Recipe

WORLD = 4
ROWS = 8
RATES = (0.01, 0.02, 0.015, 0.01, 0.005, 0.02)
NAMES = ("adamw", "lion", "lamb")


class Model(nn.Module):
    """Linear layers whose rows four processes cannot share alike, a norm, and a scale of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.third = (
            nn.Linear(6, 5),
            nn.Linear(5, 7),
            nn.LayerNorm(7),
            nn.Linear(7, 3),
        )
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, 6) -> the mean loss."""
        hidden = self.norm(self.second(nn.functional.gelu(self.first(inputs))))
        return (self.third(hidden) * self.scale).square().mean()


def model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    made = Model()
    nn.init.zeros_(made.third.bias)  # LAMB must not stop at a norm of zero
    nn.init.zeros_(made.second.weight[3])
    return made.to(dtype)


def inputs(step: int) -> Tensor:
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))


def recipe(name: str) -> Recipe:
    made = RECIPES["clip_tiny"]()
    values: dict[str, Any] = {**vars(made), "optimizer": name, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    return Recipe(**{**values, "epsilon": 1e-3})


def trained(name: str, mesh: Any = None, rank: int = 0, size: int = 1) -> dict[str, Tensor]:
    """The model's whole parameters after a step of each of `RATES`, on this rank's part of each batch."""
    task = model()
    if mesh is not None:
        for layer in (task.first, task.second, task.third):
            fully_shard(layer, mesh=mesh)
        fully_shard(task, mesh=mesh)
    made = optimizer.build(recipe(name), task)
    for step, rate in enumerate(RATES):
        task(inputs(step).chunk(size)[rank]).backward()
        schedule.set_learning_rate(made, rate)
        made.step()
        made.zero_grad()
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in task.named_parameters()}
    return {name: tensor.detach() for name, tensor in whole.items()}


def compute(rank: int, folder: str) -> None:
    """Train on four shards, and on two copies of two shards; each rank writes what it has in the end."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    meshes = {
        "four": init_device_mesh("cpu", (4,)),
        "two by two": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
    }
    found = {(name, shape): trained(name, mesh, rank, WORLD) for shape, mesh in meshes.items() for name in NAMES}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
