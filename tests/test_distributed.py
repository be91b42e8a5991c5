"""Training over several processes: the numbers of one process, on one and on two mesh dimensions; starting within the
memory of a shard; and processes that do not fit together.

The processes start once for each world size and compute everything (`training_ranks`); the tests read what each found.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from training_ranks import BATCH, STAGES, STEPS, Found, compute

from xray import data

PATIENCE = 400
"""Seconds for all that the processes of one world size do, a minute or so on two cores; what still runs has hung."""
WAYS = ("2 ranks", "4 ranks", "2 by 2 ranks")


def launch(size: int, port: int, folder: Path) -> list[Found]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_ranks", "torch._dynamo"])
    processes = [
        context.Process(target=compute, args=(rank, size, port, str(folder)), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE
    states: list[int | None] = [None] * size
    while None in states and not any(states) and time.monotonic() < deadline:
        time.sleep(0.05)
        states = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert states == [0] * size, "exit codes of the processes; None is one that did not end"
    return [torch.load(folder / f"{rank} of {size}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs lie, beside the data that they share."""
    root = tmp_path_factory.mktemp("ranks")
    data.generated(root / "shapes", 240, image_size=32, num_frames=4)
    return root


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[Found]]:
    """What each rank of each world size found."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch.distributed with gloo is not available")
    results = {}
    for size in (1, 2, 4):
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        results[size] = launch(size, store.port, folder)
    return results


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", WAYS)
def test_runs_agree_with_one_process(folder: Path, way: str, stage: str) -> None:
    """Every number of 50 steps, and the weights in the end."""
    alone, together = lines(folder / "alone" / stage), lines(folder / way / stage)
    assert len(alone) == len(together) == STEPS
    for key in alone[0].keys() - {"seconds", "images_per_s", "data_wait"}:
        # The rank of a pair, and so whether it is found, is a whole number that rounding may move across a tie.
        bound = 2 / BATCH if key.endswith(("rank", "top1", "top5")) else 0
        for one, other in zip(alone, together, strict=True):
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=bound), (key, one["step"])
    weights, others = (load_file(out / stage / "model.safetensors") for out in (folder / "alone", folder / way))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-4, msg=name)
