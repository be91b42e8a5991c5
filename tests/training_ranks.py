"""What each of the processes of a training run computes for test_distributed; they start once for each world size.

They are forked from one that has imported PyTorch, and meet at a store that the test hosts, as torchrun's agent does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from xray import data, train
from xray.train import distributed, prepare, tasks
from xray.train.distributed import World
from xray.train.recipes import RECIPES, Recipe

STEPS, BATCH = 50, 16
STAGES = {"mae": "", "tags": "mae", "clip": "tags", "ring": "tags"}
"""Runs, and the run that each starts from; "ring" is clip with the other exchange."""
WAYS = {"2 ranks": (2, 0), "4 ranks": (4, 0), "2 by 2 ranks": (4, 2)}
"""Processes and shard sizes of the runs over several processes."""
RUNS = [(way, stage) for way in WAYS for stage in STAGES if stage != "ring" or way == "4 ranks"]
SHARD_SIZES = {2: (0, 1), 4: (0, 2)}
"""Shard sizes of single steps, by the number of processes."""
TAG_ROWS = [["red"], [], [], ["blue", "ring"], ["red", "blue"], [], ["green"], ["ring"]]
Found = dict[str, Any]


def recipe_of(stage: str, folder: Path, **changes: Any) -> Recipe:
    """One of `STAGES` as every world size runs it, from the weights that one process left."""
    name = "clip" if stage == "ring" else stage
    init = str(folder / "alone" / STAGES[stage] / "model.safetensors") if STAGES[stage] else ""
    settings: dict[str, Any] = {
        "data": str(folder / "shapes"),
        "steps": STEPS,
        "batch_size": BATCH,
        "precision": "float32",
        "peak_tflops": 0.1,
        "checkpoint_every": 0,
        "tensorboard": False,
        "progress": False,
        "init": init,
        "short_texts": 0.3,
        "exchange": "ring" if stage == "ring" else "all_gather",
    }
    return replace(RECIPES[f"{name}_tiny"](), **{**settings, **changes})


def batch_of(rows: list[list[str]]) -> data.Batch:
    """Random pictures with these tags."""
    pixels = torch.randn(len(rows), 3, 32, 32, generator=torch.Generator().manual_seed(7))
    words = [f"a picture of {' and '.join(row)}" for row in rows]
    return data.Batch(pixels, words, rows, [""] * len(rows), [str(row) for row in range(len(rows))])


def part_of(batch: data.Batch, first: int, count: int) -> data.Batch:
    part = slice(first, first + count)
    lists = (batch.captions, batch.tags, batch.labels, batch.ids)
    return data.Batch(batch.pixels[part], *(values[part] for values in lists))  # type: ignore[arg-type]


def task_of(name: str, place: World, *, shard_size: int = 0, **changes: Any) -> tasks.Task:
    """A task as the loop makes it, of tiny models that start from seed 3."""
    recipe = replace(RECIPES[f"{name}_tiny"](), **changes)
    texts = [(caption, tags) for caption, tags in zip(batch_of(TAG_ROWS).captions, TAG_ROWS, strict=True) for _ in "ab"]
    with torch.device("meta"):
        task = tasks.build(recipe, prepare.learned(recipe, texts, None))
    prepare.accelerate(task, recipe)
    if place.size > 1:
        distributed.shard(task, place, torch.float32, shard_size)
    distributed.materialize(task, place, 3)
    return task


def step_of(task: tasks.Task, place: World, keep_rate: float | None = 0.6) -> Found:
    """What one step over `TAG_ROWS` gives: metrics, and gradients by parameter."""
    batch = batch_of(TAG_ROWS)
    count = len(batch) // place.size
    inputs = task.inputs(part_of(batch, place.rank * count, count), 11, place.rank * count, len(batch))
    loss, extra = task.accumulate(keep_rate, **inputs)
    names = ["loss", *extra]
    numbers = dict(zip(names, place.mean(torch.stack([loss.detach().float(), *extra.values()])).tolist(), strict=True))
    gradients = {name: whole(value.grad) for name, value in task.named_parameters() if value.grad is not None}
    norm = distributed.whole(torch.nn.utils.clip_grad_norm_(task.parameters(), 0.1)).item()
    clipped = {name: whole(value.grad) for name, value in task.named_parameters() if value.grad is not None}
    return {"numbers": numbers, "gradients": gradients, "norm": norm, "clipped": clipped}


def whole(tensor: Tensor) -> Tensor:
    return distributed.whole(tensor.detach()).clone()


STEPS_OF_A_TASK: dict[str, dict[str, Any]] = {
    "mae": {},
    "tags": {},
    "clip": {"short_texts": 0.5},
    "clip ring": {"exchange": "ring"},
    "clip none": {},
    "clip selective": {"activation_checkpointing": "selective"},
    "clip full": {"activation_checkpointing": "full"},
    "clip chunks": {"activation_checkpointing": "selective", "chunk_size": 1},
}


def compute_steps(place: World, shard_size: int = 0) -> Found:
    """One step of every task, and the weights that it starts from."""
    found: Found = {}
    for name, changes in STEPS_OF_A_TASK.items():
        task = task_of(name.split()[0], place, shard_size=shard_size, **changes)
        weights = {key: whole(value) for key, value in task.state_dict().items()}
        found[name] = {"weights": weights, **step_of(task, place, None if name == "mae" else 0.6)}
    return found


def compute_assigned(place: World) -> Found:
    """Whether `assign` cuts what DTensor itself does, of lengths that do and do not divide."""
    found: Found = {}
    for shape in ((4,), (2, 2), (4, 1), (1, 4)):
        mesh = init_device_mesh("cpu", shape)
        placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
        for length in (1, 3, 4, 5, 6, 9):
            full = torch.randn(length, 3, generator=torch.Generator().manual_seed(length))
            expected = distribute_tensor(full, mesh, placements)
            actual = torch.zeros_like(expected)
            assert isinstance(actual, DTensor)
            with _Silence():
                distributed.assign(actual, full)
            found[f"{shape} {length}"] = torch.equal(actual.to_local(), expected.to_local())
    return found


class _Silence(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails on any communication."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace not in ("c10d", "_c10d_functional"), func
        return func(*args, **(kwargs or {}))


def compute_skipped(rank: int, size: int, folder: Path) -> None:
    """A run whose second batch holds a pixel that is not a number, on the last process only."""
    usual = data.loader

    def poisoned(*arguments: Any, **settings: Any) -> Iterator[data.Batch]:
        for step, batch in enumerate(usual(*arguments, **settings), start=1):
            if step == 2 and rank == size - 1:
                batch.pixels[0, 0, 0, 0] = torch.nan
            yield batch

    data.loader = poisoned
    train.run(recipe_of("mae", folder, out=str(folder / f"skipped {size}"), steps=3))
    data.loader = usual


def message(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def compute_refusals(rank: int, size: int, folder: Path) -> Found:
    """What each rank is told of recipes that differ, and of recipes that do not fit the number of processes."""
    recipe = recipe_of("mae", folder, out=str(folder / f"refused {size}"))
    given = {
        "steps": replace(recipe, steps=STEPS + rank // (size - 1)),
        "some": replace(recipe, betas=(0.9, 0.95 if rank == 0 else 0.99), seed=0 if rank == 0 else rank),
        "mesh": replace(recipe, shard_size=3),
        "too large": replace(recipe, shard_size=2 * size),
        "batch": replace(recipe, batch_size=size + 1),
        "init": replace(recipe, init=str(folder / "nowhere")),
        "tags file": replace(recipe, task="tags", tags_file=str(folder / "nowhere")),
    }
    found: Found = {name: message(lambda other=other: train.run(other)) for name, other in given.items()}  # type: ignore[misc]
    usual, distributed._code_version = distributed._code_version, lambda: f"version {min(rank, 1)}"
    found["code"] = message(lambda: train.run(recipe))
    distributed._code_version = usual
    # What may differ does not stop a run.
    found["progress"] = message(lambda: train.run(replace(recipe, steps=1, progress=rank == 0)))
    return found


def compute(rank: int, size: int, port: int, folder: str) -> None:
    """All that the tests look at, on one rank of `size`; files go to `folder`."""
    torch.set_num_threads(1)
    out = Path(folder)
    if size == 1:
        for stage in ("mae", "tags", "clip"):
            train.run(recipe_of(stage, out, out=str(out / "alone" / stage)))
        torch.save({"steps 0": compute_steps(World(0, 1, torch.device("cpu")))}, out / "0 of 1.pt")
        return
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    found: Found = {}
    with distributed.world() as place:
        # All runs share one process group: PyTorch caches device meshes, and with them groups that have ended.
        distributed.world = lambda: nullcontext(place)  # type: ignore[assignment, return-value]
        for way, stage in RUNS:
            if WAYS[way][0] == size:
                train.run(recipe_of(stage, out, out=str(out / way / stage), shard_size=WAYS[way][1]))
        compute_skipped(rank, size, out)
        found["refusals"] = compute_refusals(rank, size, out)
        for shard_size in SHARD_SIZES[size]:
            found[f"steps {shard_size}"] = compute_steps(place, shard_size)
        if size == 4:
            found["assigned"] = compute_assigned(place)
        dist.barrier()
    torch.save(found, out / f"{rank} of {size}.pt")
