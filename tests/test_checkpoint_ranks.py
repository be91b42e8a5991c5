"""Checkpoints of many processes: what two saved, one and four go on with, in one copy of the shards or in two.

The processes start once; some of them first make a group of two.
"""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from test_checkpoint import ALONE, recipe
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy import OPTIMIZERS, Toy, train

from xray.train import TrainError, checkpoint, checkpointer
from xray.train.checkpointer import Checkpointer
from xray.train.distributed import World, whole

RANKS = 4
NAMES = ["fused adamw", "odd"]


@contextmanager
def group(folder: Path, rank: int, size: int) -> Iterator[World]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
    yield World(rank, size, torch.device("cpu"))
    dist.barrier()
    dist.destroy_process_group()


def sharded(mesh_shape: tuple[int, ...], name: str, seed: int = 0) -> tuple[Toy, torch.optim.Optimizer]:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    task = Toy(seed)
    fully_shard(task.first, mesh=mesh)
    fully_shard(task, mesh=mesh)
    return task, OPTIMIZERS[name](task)


def contents(task: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything in full."""
    found: dict[str, Any] = {name: whole(tensor).clone() for name, tensor in task.state_dict().items()}
    for name, parameter in task.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = whole(value).clone() if isinstance(value, Tensor) else value
    return {**found, "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]}


def compute(rank: int, folder_name: str) -> None:
    torch.set_num_threads(1)
    folder = Path(folder_name)
    found: dict[str, Any] = {}
    if rank < 2:
        with group(folder, rank, 2) as place:
            for name in NAMES:
                found[f"two {name}"] = save_while_training(folder / f"two {name}", (2,), name, place)
    with group(folder, rank, 4) as place:
        for name in NAMES:
            for shape in ((4,), (2, 2)):
                task, optimizer = sharded(shape, name, seed=1)
                path = folder / f"two {name}" / "checkpoints" / "step-3"
                torch.manual_seed(100 + rank)
                before = torch.get_rng_state()
                restored = checkpoint.restore(path, task, optimizer, place)
                found[f"{shape} {name}"] = contents(task, optimizer)
                found["restored"] = restored
                found["random state kept"] = torch.equal(torch.get_rng_state(), before)
                train(task, optimizer, range(3, 5))
                found[f"{shape} {name} later"] = contents(task, optimizer)
            found[f"copies {name}"] = save_while_training(folder / f"copies {name}", (2, 2), name, place)
        found["faults"] = faults(folder, place)
    torch.save(found, folder / f"{rank}.pt")


def save_while_training(out: Path, mesh_shape: tuple[int, ...], name: str, place: World) -> dict[str, Any]:
    """What is saved at step 3; the first process writes when training has gone on, over its own group all the time."""
    task, optimizer = sharded(mesh_shape, name)
    train(task, optimizer, range(3))
    expected = contents(task, optimizer)
    with Checkpointer(out, recipe(), {}, place, asynchronous=True) as saver:
        trained, save = threading.Event(), dcp.save

        def wait_and_save(*arguments: Any, **keywords: Any) -> Any:
            assert place.rank or trained.wait(60)
            return save(*arguments, **keywords)

        dcp.save = wait_and_save
        saver.save(3, task, optimizer, {place.rank: bytes([place.rank] * 9)}, {"skipped": 4})
        train(task, optimizer, range(3, 5))
        trained.set()
        saver.wait()
        dcp.save = save
    return expected


def faults(folder: Path, place: World) -> list[Any]:
    """A process that cannot write, and a first one that cannot publish: all take the same turn."""
    task, optimizer = sharded((4,), "fused adamw")
    train(task, optimizer, range(1))
    said: list[Any] = []
    working, rename = checkpointer.save_file, Path.rename

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.ENOSPC, "")

    with Checkpointer(folder / "faults", recipe(), {}, place, asynchronous=True) as saver:
        saver.save(1, task, optimizer, {}, {})
        saver.wait()
        if place.rank == 2:
            checkpointer.save_file = refuse
        saver.save(2, task, optimizer, {}, {})
        try:
            saver.wait()
        except TrainError as error:
            said.append(str(error))
        checkpointer.save_file = working
        if place.rank == 0:
            Path.rename = refuse  # type: ignore[method-assign, assignment]
        saver.save(3, task, optimizer, {}, {})
        saver.save(4, task, optimizer, {}, {})
        try:
            saver.wait()
        except TrainError as error:
            said.append(str(error))
        Path.rename = rename  # type: ignore[method-assign]
        said.append(saver.failures)
        saver.save(5, task, optimizer, {}, {})
        saver.wait()
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes have left their checkpoints and what they found."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed with gloo is not available")
    folder = tmp_path_factory.mktemp("ranks")
    # Forked from one that has imported PyTorch, which takes each of them seconds otherwise.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["test_checkpoint_ranks"])
    multiprocessing.start_processes(compute, (str(folder),), nprocs=RANKS, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def check_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert actual[name].dtype == value.dtype
            assert torch.equal(actual[name], value), name
        else:
            assert actual[name] == value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_two_saved_and_four_go_on(ranks: list[dict[str, Any]], name: str, shape: tuple[int, ...]) -> None:
    alone = Toy()
    optimizer = OPTIMIZERS[name](alone)
    train(alone, optimizer, range(5))
    for found in ranks:
        check_same(found[f"{shape} {name}"], ranks[0][f"two {name}"])
        later = found[f"{shape} {name} later"]
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(later[key], value)
        assert found["restored"] == checkpoint.Restored(3, {0: bytes(9), 1: bytes([1] * 9)}, {"skipped": 4})
    assert [found["random state kept"] for found in ranks] == [False, False, True, True]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("saved", ["two", "copies"])
def test_one_process_goes_on_with_what_many_saved(
    folder: Path, ranks: list[dict[str, Any]], saved: str, name: str
) -> None:
    task = Toy(seed=1)
    optimizer = OPTIMIZERS[name](task)
    path = checkpoint.find(folder / f"{saved} {name}", "latest")
    assert path is not None
    restored = checkpoint.restore(path, task, optimizer, ALONE)
    assert sorted(restored.loader_state) == list(range(2 if saved == "two" else 4))
    check_same(contents(task, optimizer), ranks[0][f"{saved} {name}"])


def test_copies_are_written_once(folder: Path) -> None:
    elements: dict[str, int] = {}
    for path in (folder / "copies odd" / "checkpoints" / "step-3").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                elements[name] = elements.get(name, 0) + file.get_tensor(name).numel()
    for name, tensor in Toy().state_dict().items():
        assert elements[f"model.{name}"] == tensor.numel()
    assert elements["optimizer.first.weight.average"] == 15
    assert elements["optimizer.first.weight.factors"] == 6


def test_all_processes_take_the_same_turn(folder: Path, ranks: list[dict[str, Any]]) -> None:
    run = folder / "faults" / "checkpoints"
    for found in ranks:
        assert found["faults"] == [
            f"the checkpoint of step 2 cannot be written to {run}: no space is left on the disk",
            f"the checkpoint of step 3 cannot be written to {run}, nor any after it up to step 4: "
            "no space is left on the disk",
            3,
        ]
    assert sorted(path.name for path in run.iterdir()) == ["step-1", "step-5"]
