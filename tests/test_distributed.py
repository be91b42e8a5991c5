"""Training over several processes: the numbers of one process, on one and on two mesh dimensions; starting within the
memory of a shard; and processes that do not fit together.

The processes start once for each world size and compute everything (`training_ranks`); the tests read what each found.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import socket
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import needs_account, run_measured
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from training_ranks import (
    BATCH,
    RUNS,
    SHARD_SIZES,
    STEPS,
    STEPS_OF_A_TASK,
    TAG_ROWS,
    Found,
    batch_of,
    compute,
    part_of,
    step_of,
    task_of,
)

from xray import data, train
from xray.train import distributed, prepare, tasks
from xray.train.recipes import RECIPES

PATIENCE = 600
"""Seconds for all that the processes of one world size do, a minute or so on two cores; what still runs has hung."""
MEASURED = {"seconds", "images_per_s", "tokens_per_s", "data_wait", "mfu", "memory", "memory_peak"}


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
@pytest.mark.parametrize(("way", "stage"), RUNS)
def test_runs_agree_with_one_process(folder: Path, way: str, stage: str) -> None:
    """Every number of 50 steps, and the weights in the end."""
    twin = folder / "alone" / stage.replace("ring", "clip")
    alone, together = lines(twin), lines(folder / way / stage)
    assert len(alone) == len(together) == STEPS
    for key in alone[0].keys() - MEASURED:
        # The rank of a pair, and so whether it is found, is a whole number that rounding may move across a tie.
        bound = 2 / BATCH if key.endswith(("rank", "top1", "top5")) else 0
        # A gradient is a derivative of what agrees to 1e-4, so less smooth; a single step's agrees to 1e-5 (below).
        share = 1e-3 if key == "grad_norm" else 1e-4
        for one, other in zip(alone, together, strict=True):
            assert other[key] == pytest.approx(one[key], rel=share, abs=bound), (key, one["step"])
    weights, others = (load_file(out / "model.safetensors") for out in (twin, folder / way / stage))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize("size", [2, 4])
def test_what_is_not_finite_on_one_process_is_skipped_by_all(folder: Path, size: int) -> None:
    found = lines(folder / f"skipped {size}")
    assert [line["skipped"] for line in found] == [False, True, False]
    assert (found[1]["loss"], found[2]["skipped_total"]) == (None, 1)
    weights = load_file(folder / f"skipped {size}" / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())


@pytest.mark.parametrize("name", STEPS_OF_A_TASK)
@pytest.mark.parametrize(("size", "shard_size"), [(n, shards) for n, sizes in SHARD_SIZES.items() for shards in sizes])
def test_a_step_agrees_with_one_process(found: dict[int, list[Found]], size: int, shard_size: int, name: str) -> None:
    """Weights that it starts from to the bit; metrics, gradients, their norm and what clipping leaves."""
    alone = found[1][0]["steps 0"][name]
    for rank in found[size]:
        together = rank[f"steps {shard_size}"][name]
        assert together["weights"].keys() == alone["weights"].keys()
        assert all(torch.equal(together["weights"][key], value) for key, value in alone["weights"].items())
        assert together["numbers"] == pytest.approx(alone["numbers"], rel=1e-5, abs=1e-7)
        assert together["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        for kind in ("gradients", "clipped"):
            check_close(together[kind], alone[kind])


def check_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All of them, to a hundred-thousandth of the largest entry of any."""
    assert actual.keys() == expected.keys()
    scale = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_selective_checkpointing_and_chunks_change_no_gradient(found: dict[int, list[Found]]) -> None:
    steps = found[1][0]["steps 0"]
    for key, value in steps["clip selective"]["gradients"].items():
        assert torch.equal(value, steps["clip none"]["gradients"][key]), key
    check_close(steps["clip chunks"]["gradients"], steps["clip selective"]["gradients"])


def test_every_tag_counts_the_same(found: dict[int, list[Found]]) -> None:
    """Of the 8 samples 3 have no tags; of 4 processes one has two tagged samples and two have one."""
    alone = found[1][0]["steps 0"]["tags"]["numbers"]
    assert alone["loss"] > 0
    assert {round(rank["steps 0"]["tags"]["numbers"]["loss"], 4) for rank in found[4]} == {round(alone["loss"], 4)}


def test_assign_cuts_as_dtensor_does(found: dict[int, list[Found]]) -> None:
    for rank in found[4]:
        assert len(rank["assigned"]) == 24
        assert all(rank["assigned"].values()), rank["assigned"]


@pytest.mark.parametrize("size", [2, 4])
def test_what_does_not_fit_is_refused_everywhere(found: dict[int, list[Found]], size: int) -> None:
    others = f"process{'es 1, 2, 3' if size == 4 else ' 1'} of {size}"
    messages = {
        "steps": rf"process {size - 1} of {size} .*: steps is 51 there and 50 on process 0",
        "some": rf"{others} .*: betas is \[0\.9, 0\.99\] there and \[0\.9, 0\.95\] on process 0",
        "mesh": rf"shard_size is 3 and must be 0 or divide the number of processes, which is {size}:",
        "too large": rf"shard_size is {2 * size} and must .* which is {size}:",
        "batch": rf"batch_size is {size + 1} and must be a multiple of the {size} processes",
        "init": "init is .*nowhere",
        "tags file": "tags_file is .*nowhere, which cannot be read as JSON: No such file",
        "code": rf"{others} .*: xray's code is 'version 1' there and 'version 0' on process 0",
    }
    for rank in found[size]:
        for name, message in messages.items():
            assert re.search(rf"^(TrainError|ValueError): .*{message}", rank["refusals"][name]), rank["refusals"][name]
        assert rank["refusals"]["progress"] == "no error"


START = """
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from xray.train import RECIPES, distributed, tasks

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
place = distributed.World(0, 64, torch.device("cpu"))
with torch.device("meta"):
    task = tasks.build(RECIPES["mae_l14"](), {})
distributed.shard(task, place, torch.float32, int(sys.argv[1]))
peak, _ = peak_of(lambda: distributed.materialize(task, place, 0))
print(peak)
print(sum(parameter.to_local().nbytes for parameter in task.parameters()))
print(max(sum(p.numel() * 4 for p in module.parameters(recurse=False)) for module in task.modules()))
print(sum(parameter.numel() * 4 for parameter in task.parameters()))
"""


@needs_account
@pytest.mark.parametrize("shard_size", [0, 16])
def test_a_process_starts_within_its_shard(shard_size: int) -> None:
    """The first of 64: at most its shards, the largest module, and 4 MiB for allocators and Python's objects."""
    peak, own, module, whole = map(int, run_measured(START, str(shard_size)))
    assert own < 1.1 * whole / (shard_size or 64)
    assert peak < own + module + 4 * 2**20


@pytest.mark.parametrize(("shard_size", "size", "shape"), [(0, 6, (6,)), (6, 6, (6,)), (2, 6, (3, 2)), (1, 6, (6, 1))])
def test_mesh(shard_size: int, size: int, shape: tuple[int, ...]) -> None:
    assert distributed.mesh_shape(shard_size, size) == shape


@pytest.mark.parametrize("shard_size", [4, 12])
def test_impossible_mesh(shard_size: int) -> None:
    with pytest.raises(train.TrainError, match=f"shard_size is {shard_size} .* number of processes, which is 6"):
        distributed.mesh_shape(shard_size, 6)


def test_draws_are_rows_of_one_matrix() -> None:
    for width in (1, 2, 4, 5, 196):
        whole = tasks.uniform_rows(9, 0, 12, width)
        assert whole.shape == (12, width)
        for first, count in ((0, 1), (1, 4), (5, 7), (11, 1)):
            assert (tasks.uniform_rows(9, first, count, width) == whole[first : first + count]).all()
        assert len(set(whole.ravel().tolist())) == whole.size
        assert 0 <= whole.min() <= whole.max() < 1
    assert (tasks.uniform_rows(10, 0, 12, 196) != tasks.uniform_rows(9, 0, 12, 196)).all()
    assert abs(tasks.uniform_rows(9, 0, 100, 196).mean() - 0.5) < 0.01


def test_what_is_drawn_for_a_sample_does_not_depend_on_its_part() -> None:
    """Masks, texts, and which samples are scored, of 8 samples in one part and in four."""
    batch = batch_of(TAG_ROWS)
    place = distributed.World(0, 1, torch.device("cpu"))
    mae, clip, tags = (task_of(name, place, short_texts=0.5) for name in ("mae", "clip", "tags"))
    parts = [(part_of(batch, first, 2), 4, first, 8) for first in range(0, 8, 2)]
    noise = [mae.inputs(*part)["noise"] for part in parts]
    assert torch.equal(torch.cat(noise), mae.inputs(batch, 4)["noise"])
    texts = [row for part in parts for row in rows_of(clip.inputs(*part))]
    assert texts == rows_of(clip.inputs(batch, 4))
    assert texts != rows_of(clip.inputs(batch, 5))
    counts = sum(tags.inputs(*part)["counts"] for part in parts)
    assert torch.equal(counts, tags.inputs(batch, 4)["counts"])


def rows_of(inputs: dict[str, Any]) -> list[list[int]]:
    return [row[:length] for row, length in zip(inputs["token_ids"].tolist(), inputs["lengths"].tolist(), strict=True)]


def test_few_samples_are_scored_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third of the whole batch, whoever has it."""
    place = distributed.World(0, 1, torch.device("cpu"))
    task = task_of("tags", place)
    assert isinstance(task, tasks.TagTask)
    monkeypatch.setattr(tasks, "MOST_LOGITS", 3 * len(task.tags))
    batch = batch_of(TAG_ROWS)
    scored = [
        [*range(8)][first : first + 2][task.inputs(part_of(batch, first, 2), 4, first, 8)["scored"]]
        for first in range(0, 8, 2)
    ]
    assert scored == [[0], [3], [], [6]]
    assert task.inputs(batch, 4)["counts"].tolist() == [5, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as JSON: No such file"),
        ("[", "cannot be read as JSON: Expecting value"),
        ("{}", "holds dict and must hold a JSON list"),
        ("[]", "holds an empty list"),
        ('["a", 3]', "entry 1 is 3 and must be a tag"),
        ('["a", " "]', "entry 1 is ' ' and must be a tag"),
        ('["a", "b", "a"]', "lists 'a' twice"),
    ],
)
def test_tags_file_is_checked(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "tags.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(train.TrainError, match=rf"tags_file is .*tags\.json, .*{message}"):
        prepare.learned(replace(RECIPES["tags_tiny"](), tags_file=str(file)), [], None)


def test_files_replace_what_is_learned(tmp_path: Path) -> None:
    (tmp_path / "tags.json").write_text('["b", "a"]')
    tags = replace(RECIPES["tags_tiny"](), tags_file=str(tmp_path / "tags.json"))
    assert json.loads(prepare.learned(tags, [("x", ["c"])], None)["tags"]) == ["b", "a"]
    tokenizer = data.Tokenizer.train(["a red circle"], 300).to_json()
    file = tmp_path / "tokenizer.json"
    clip = replace(RECIPES["clip_tiny"](), tokenizer_file=str(file))
    with pytest.raises(train.TrainError, match=r"tokenizer_file is .*tokenizer\.json, which cannot be used: No such"):
        prepare.learned(clip, [], None)
    file.write_text("{}")
    with pytest.raises(train.TrainError, match=r"tokenizer_file is .*tokenizer\.json, which cannot be used"):
        prepare.learned(clip, [], None)
    file.write_text(tokenizer)
    assert prepare.learned(clip, [], None) == {"tokenizer": tokenizer}


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        values = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with (
            pytest.raises(train.TrainError, match=rf"0 of 2 could not meet .* localhost:{port}: that port is in use"),
            distributed.world(),
        ):
            pass


def test_processes_that_do_not_come_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    values = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    with (
        pytest.raises(train.TrainError, match=rf"0 of 2 could not meet .* localhost:{port}: not all came within 1 sec"),
        distributed.world(),
    ):
        pass


@pytest.mark.parametrize(("name", "changes"), [("mae", {}), ("tags", {}), ("clip", {}), ("clip", {"compile": True})])
def test_checkpointing_changes_no_gradient(name: str, changes: dict[str, Any]) -> None:
    """To the bit where blocks are not compiled; EViT drops the same tokens in both passes."""
    place = distributed.World(0, 1, torch.device("cpu"))
    plain, *others = (
        step_of(task_of(name, place, activation_checkpointing=mode, **changes), place, None if name == "mae" else 0.6)
        for mode in ("none", "selective", "full")
    )
    for other in others:
        if changes:
            check_close(other["gradients"], plain["gradients"])
        else:
            assert all(torch.equal(other["gradients"][key], value) for key, value in plain["gradients"].items())


def test_selective_checkpointing_runs_no_product_twice() -> None:
    """Nor attention, nor reorganisation; "full" runs them all again."""
    place = distributed.World(0, 1, torch.device("cpu"))
    counts = {}
    for mode in ("none", "selective", "full"):
        task = task_of("tags", place, activation_checkpointing=mode)
        inputs = task.inputs(batch_of(TAG_ROWS), 1)
        with Counted() as counted:
            task.accumulate(0.6, **inputs)
        counts[mode] = counted.calls
    kept = ["aten::mm", "aten::addmm", "xray_kernels::attention_with_scores", "xray_kernels::add_reorganize_norm"]
    for name in kept:
        assert counts["selective"][name] == counts["none"][name] > 0
        assert counts["full"][name] >= counts["none"][name]
    assert counts["full"]["xray_kernels::attention_with_scores"] == 2 * counts["none"][kept[2]]
    assert counts["selective"]["aten::gelu"] == counts["full"]["aten::gelu"] == 2 * counts["none"]["aten::gelu"]


class Counted(TorchDispatchMode):
    """Counts ops by name as they are really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))
