"""GradCache over two gloo processes: the gradients of one process, reduced once, under DDP and FSDP2.

The processes start once and compute everything (`compute`); the tests read what each rank found.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from test_grad_cache import Towers, batch_of, caller, check_close, gradients_of
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xray import data
from xray.ops import siglip_loss
from xray.train import distributed, tasks
from xray.train.grad_cache import cached_backward, split_batch
from xray.train.recipes import RECIPES

RANKS = 2
PER_RANK = 7


def clip_task(chunk_size: int) -> tasks.ClipTask:
    torch.manual_seed(0)
    recipe = replace(RECIPES["clip_tiny"](), chunk_size=chunk_size, image_size=16)
    tokenizer = data.Tokenizer.train(["a red circle", "two blue squares"], 300)
    task = tasks.ClipTask(recipe, tokenizer).double()
    return task


def task_inputs() -> dict[str, Any]:
    source = torch.Generator().manual_seed(6)
    count = RANKS * PER_RANK
    return {
        "pixels": torch.randn(count, 3, 16, 16, generator=source, dtype=torch.float64),
        "token_ids": torch.randint(0, 250, (count, 9), generator=source),
        "lengths": torch.randint(1, 10, (count,), generator=source),
    }


class Calls(TorchDispatchMode):
    """Counts PyTorch's distributed operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def compute(rank: int, folder: str) -> None:
    """Gradients under DDP and FSDP2, and how often they were reduced, written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    part = slice(rank * PER_RANK, (rank + 1) * PER_RANK)

    loss_of_all = partial(siglip_loss, group=dist.group.WORLD)
    mine = {name: value[part] for name, value in batch_of(RANKS * PER_RANK).items()}
    for name, chunk_size in (("chunks", 3), ("whole", PER_RANK)):
        towers = Towers()
        wrapped = nn.parallel.DistributedDataParallel(towers)
        with Calls() as calls:
            cached_backward(
                caller(wrapped), split_batch(mine, chunk_size), loss_of_all, num_shared=2, modules=[wrapped]
            )
        found[f"ddp {name}"], found[f"ddp calls {name}"] = gradients_of(towers), calls.counts

    task, inputs = clip_task(3), {name: value[part] for name, value in task_inputs().items()}
    distributed.shard(task, distributed.World(rank, RANKS, torch.device("cpu")), torch.float32)
    for name, chunk_size in (("chunks", 3), ("whole", 0), ("chunks again", 2)):
        task.chunk_size = chunk_size
        with Calls() as calls:
            loss, extra = task.accumulate(0.6, **inputs)
        found[f"fsdp {name}"] = gradients_of(task)
        found[f"fsdp calls {name}"] = calls.counts
        found[f"numbers {name}"] = torch.stack([loss, *extra.values()])
        task.zero_grad(set_to_none=True)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed with gloo is not available")
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(compute, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_ddp_equals_one_process_and_reduces_once(ranks: list[dict[str, Any]]) -> None:
    model = Towers()
    siglip_loss(*model(**batch_of(RANKS * PER_RANK))).backward()
    for found in ranks:
        check_close(found["ddp chunks"], gradients_of(model))
        assert found["ddp calls chunks"] == found["ddp calls whole"]


@pytest.mark.parametrize("name", ["chunks", "whole", "chunks again"])
def test_fsdp_equals_one_process_and_reduces_once(ranks: list[dict[str, Any]], name: str) -> None:
    """And a step without chunks in between reduces as ever."""
    task = clip_task(0)
    loss, extra = task.accumulate(0.6, **task_inputs())
    expected = gradients_of(task)
    for found in ranks:
        actual, calls = found[f"fsdp {name}"], found[f"fsdp calls {name}"]
        assert actual.keys() == expected.keys()
        for key, value in expected.items():  # gradients are reduced in float32
            torch.testing.assert_close(actual[key], value, rtol=1e-6, atol=1e-7, msg=key)
        # Each sharded module once, and once the ranks of texts.
        assert calls["_reduce_scatter_base_"] == len(distributed.units(task)) + 2
        assert calls["allreduce_"] == found["fsdp calls whole"]["allreduce_"]
        torch.testing.assert_close(found[f"numbers {name}"], found["numbers whole"])
    mean = torch.stack([found[f"numbers {name}"] for found in ranks]).mean(0)
    torch.testing.assert_close(mean[0], loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean[1 + list(extra).index("logit_scale")], extra["logit_scale"].double())
