"""Checkpoints: training goes on as if nothing had happened, and no fault loses one that was whole."""

import errno
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from limits import small_files
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from toy import OPTIMIZERS, Odd, Toy, train

from xray.train import Recipe, TrainError, checkpoint, checkpointer
from xray.train.checkpointer import Checkpointer
from xray.train.distributed import World
from xray.train.recipes import RECIPES

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def recipe(**changes: Any) -> Recipe:
    return replace(RECIPES["mae_tiny"](), **changes)


def writer(out: Path, asynchronous: bool = False, **changes: Any) -> Checkpointer:
    return Checkpointer(out, recipe(**changes), {"tags": "[]"}, ALONE, asynchronous)


def trained(name: str = "adamw", steps: int = 3) -> tuple[Toy, torch.optim.Optimizer]:
    task = Toy()
    optimizer = OPTIMIZERS[name](task)
    train(task, optimizer, range(steps))
    return task, optimizer


def save_steps(saver: Checkpointer, *steps: int) -> None:
    task, optimizer = trained()
    for step in steps:
        saver.save(step, task, optimizer, {}, {})


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def damage(path: Path) -> None:
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing begins only when this is set."""
    event, save = threading.Event(), dcp.save

    def wait_and_save(*arguments: Any, **keywords: Any) -> Any:
        assert event.wait(60)
        return save(*arguments, **keywords)

    monkeypatch.setattr(dcp, "save", wait_and_save)
    return event


# What a checkpoint holds


@BOTH
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_happened(
    name: str, asynchronous: bool, tmp_path: Path, held: threading.Event
) -> None:
    """Also where the weights change, in place, while the checkpoint is being written."""
    task, optimizer = trained(name)
    with writer(tmp_path, asynchronous) as saver:
        if not asynchronous:
            held.set()
        saver.save(3, task, optimizer, {}, {})
        train(task, optimizer, range(3, 5))
        held.set()
        saver.wait()
        # The second save uses the first one's buffers.
        saver.save(5, task, optimizer, {}, {})
        train(task, optimizer, range(5, 7))
        saver.wait()
    for step in (3, 5):
        other = Toy(seed=1)
        resumed = OPTIMIZERS[name](other)
        restored = checkpoint.restore(tmp_path / "checkpoints" / f"step-{step}", other, resumed, ALONE)
        assert restored.step == step
        train(other, resumed, range(step, 7))
        for key, value in task.state_dict().items():
            assert torch.equal(other.state_dict()[key], value), key
        assert resumed.state_dict().keys() == optimizer.state_dict().keys()
        for before, after in zip(optimizer.state.values(), resumed.state.values(), strict=True):
            assert {key: kind_of(value) for key, value in before.items()} == {
                key: kind_of(value) for key, value in after.items()
            }


def kind_of(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else type(value)


@BOTH
def test_loader_counts_and_random_states_come_back(asynchronous: bool, tmp_path: Path) -> None:
    readers = {0: b"", 3: bytes(range(256)) * 5, 11: b"\x00"}
    task, optimizer = trained()

    def draw() -> list[float]:
        numbers = [random.random(), random.gauss(), float(np.random.standard_normal()), np.random.random()]
        return [*numbers, float(torch.rand(()))]

    draw()  # an odd number of normal deviates leaves one behind
    with writer(tmp_path, asynchronous) as saver:
        saver.save(6, task, optimizer, {0: b"of another length", 3: bytes(1280), 5: b"gone later"}, {})
        saver.save(7, task, optimizer, readers, {"skipped": 2, "bad_samples": 10**12})
    expected = draw()
    draw()
    restored = checkpoint.restore(tmp_path / "checkpoints" / "step-7", task, optimizer, ALONE)
    assert restored == checkpoint.Restored(7, readers, {"skipped": 2, "bad_samples": 10**12})
    assert draw() == expected


def test_settings_of_the_optimizer_are_the_recipes(tmp_path: Path) -> None:
    """What a resumed run may change is not brought back; what an optimizer counts is."""
    task, optimizer = trained("odd")
    with writer(tmp_path) as saver:
        saver.save(3, task, optimizer, {}, {})
    resumed = OPTIMIZERS["odd"](task)
    resumed.param_groups[0] |= {"lr": 0.7, "flag": False}
    checkpoint.restore(tmp_path / "checkpoints" / "step-3", task, resumed, ALONE)
    group = resumed.param_groups[0]
    assert {key: group[key] for key in ("lr", "flag", "step", "distance")} == {
        "lr": 0.7,
        "flag": False,
        "step": 3,
        "distance": 1.5**3,
    }


def test_optimizers_that_cannot_be_saved(tmp_path: Path) -> None:
    task, optimizer = trained()
    optimizer.state[task.scale]["history"] = [torch.zeros(1)]
    with writer(tmp_path) as saver, pytest.raises(TrainError, match="AdamW keeps history of scale as a list, and only"):
        saver.save(3, task, optimizer, {}, {})


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    task, optimizer = trained()
    with writer(tmp_path) as saver:
        saver.save(3, task, optimizer, {}, {})
    path = checkpoint.complete(tmp_path)[0]

    class More(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(2, 2)

    class Fewer(Toy):
        def __init__(self) -> None:
            super().__init__()
            del self.second

    for other, match in [
        (Toy(width=4), r"model\.first\.weight has shape \(4, 3\) here and shape \(5, 3\) there"),
        (More(), r"model\.third\.weight has shape \(2, 2\) here and none there"),
        (Fewer(), r"model\.second\.bias has none here and shape \(2,\) there"),
    ]:
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(TrainError, match=f"step-3 does not fit the recipe: {match}"):
            checkpoint.restore(path, other, OPTIMIZERS["adamw"](other), ALONE)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    state = checkpoint.read_state(path)
    checkpoint.check_recipe(path, state, recipe())
    with pytest.raises(TrainError, match="is of task mae and tags_tiny of task tags"):
        checkpoint.check_recipe(path, state, RECIPES["tags_tiny"]())
    with pytest.raises(TrainError, match="is of optimizer adamw and mae_tiny of optimizer lion"):
        checkpoint.check_recipe(path, state, recipe(optimizer="lion"))


def test_groups_that_count_must_agree(tmp_path: Path) -> None:
    task, optimizer = trained("odd")
    with writer(tmp_path) as saver:
        saver.save(3, task, optimizer, {}, {})
    two = Odd([{"params": [*task.first.parameters()]}, {"params": [*task.second.parameters(), task.scale]}])
    with pytest.raises(TrainError, match="the optimizer has 2 groups of parameters here and 1 there"):
        checkpoint.restore(tmp_path / "checkpoints" / "step-3", task, two, ALONE)


# Which are kept


@pytest.mark.parametrize(("keep", "every", "kept"), [(2, 0, [8, 9]), (1, 4, [4, 8, 9]), (3, 3, [3, 6, 7, 8, 9])])
@BOTH
def test_retention(keep: int, every: int, kept: list[int], asynchronous: bool, tmp_path: Path) -> None:
    with writer(tmp_path, asynchronous, keep_checkpoints=keep, keep_every=every) as saver:
        save_steps(saver, *range(1, 10))
    assert names(tmp_path) == [f"step-{step}" for step in kept]


def test_nothing_is_deleted_before_the_new_one_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    delete = checkpointer.shutil.rmtree

    def look_and_delete(path: Path, **keywords: Any) -> None:
        if path.exists():
            seen.append([path.name, *names(tmp_path)])
        delete(path, **keywords)

    with writer(tmp_path, keep_checkpoints=1) as saver:
        save_steps(saver, 1)
        monkeypatch.setattr(checkpointer.shutil, "rmtree", look_and_delete)
        save_steps(saver, 2, 2)  # the same step again
    assert seen == [[".step-1.old", ".step-1.old", "step-2"], [".step-2.old", ".step-2.old", "step-2"]]


def test_all_is_flushed_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename, fsync = Path.rename, os.fsync

    def look_and_flush(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def look_and_rename(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("there is no /proc to tell which file is flushed")
    monkeypatch.setattr(os, "fsync", look_and_flush)
    monkeypatch.setattr(Path, "rename", look_and_rename)
    with writer(tmp_path) as saver:
        save_steps(saver, 1)
    assert done == ["shard-00001.safetensors", "state.json", ".step-1.tmp", "rename", "checkpoints"]


def test_one_save_at_a_time(tmp_path: Path, held: threading.Event) -> None:
    task, optimizer = trained()
    with writer(tmp_path, True) as saver:
        saver.save(1, task, optimizer, {}, {})
        timer = threading.Timer(0.2, held.set)
        timer.start()
        saver.save(2, task, optimizer, {}, {})
        assert "step-1" in names(tmp_path)
        saver.wait()
    assert names(tmp_path) == ["step-1", "step-2"]


# Saves that fail


@BOTH
def test_a_full_disk_costs_one_checkpoint(asynchronous: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with writer(tmp_path, asynchronous) as saver:
        save_steps(saver, 1)
        saver.wait()
        with small_files(500):
            save_steps(saver, 2)
            saver._thread.submit(int).result()  # the save has ended, whether or not anybody waits for it
        saver.check()
        saver.check()
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert f"the checkpoint of step 2 cannot be written to {tmp_path}" in errors
        assert os.strerror(errno.EFBIG) in errors
        assert saver.failures == 1
        assert names(tmp_path) == ["step-1"]
        save_steps(saver, 3)
        saver.wait()
    assert names(tmp_path) == ["step-1", "step-3"]
    assert not capsys.readouterr().err


@BOTH
def test_the_last_save_must_not_fail(asynchronous: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with writer(tmp_path, asynchronous) as saver:
        with small_files(500):
            save_steps(saver, 2)
            with pytest.raises(TrainError, match=r"the checkpoint of step 2 cannot be written to .*: File too large"):
                saver.wait()
        save_steps(saver, 3)
        saver.wait()
        assert saver.failures == 1


@BOTH
def test_many_failures_end_the_run(asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working = checkpointer.save_file

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with writer(tmp_path, asynchronous) as saver:
        monkeypatch.setattr(checkpointer, "save_file", fail)
        save_steps(saver, 1, 2)
        saver.check()
        saver._thread.submit(int).result()
        monkeypatch.setattr(checkpointer, "save_file", working)
        save_steps(saver, 3)  # in between one that works: the count begins again
        saver._thread.submit(int).result()
        monkeypatch.setattr(checkpointer, "save_file", fail)
        save_steps(saver, 4, 5)
        with pytest.raises(TrainError) as caught:
            save_steps(saver, 6, 7)
    assert str(caught.value) == (
        f"the checkpoint of step 4 cannot be written to {tmp_path / 'checkpoints'}, nor any after it up to step 6: "
        "no space is left on the disk"
    )
    assert saver.failures == 5
    assert names(tmp_path) == ["step-3"]


@BOTH
def test_a_folder_that_cannot_be_made(asynchronous: bool, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder is needed")
    with writer(tmp_path, asynchronous) as saver:
        save_steps(saver, 2)
        with pytest.raises(TrainError, match="step 2 cannot be written to"):
            saver.wait()


def test_publishing_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writer(tmp_path) as saver:
        save_steps(saver, 1)
        monkeypatch.setattr(Path, "rename", refuse)
        save_steps(saver, 2)
        monkeypatch.undo()
        assert names(tmp_path) == ["step-1"]
        assert saver.failures == 1


def refuse(*arguments: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import test_checkpoint
from xray.train import checkpointer

def hang(*arguments, **keywords):
    print("now", flush=True)
    time.sleep(100)

with test_checkpoint.writer(Path(sys.argv[1]), asynchronous=True) as saver:
    test_checkpoint.save_steps(saver, 1)
    saver.wait()
    {place} = hang
    test_checkpoint.save_steps(saver, 2)
    time.sleep(100)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    """Before the shard is flushed, and before the folder has its name."""
    root = Path(__file__).parents[1]
    processes = {}
    for name, place in (("shard", "checkpointer._sync"), ("publish", "checkpointer.Path.rename")):
        places = map(str, (tmp_path / name, root, root / "tests"))
        command = [sys.executable, "-c", KILLED.format(place=place), *places]
        processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for name, process in processes.items():
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.kill()
        process.communicate()
        out = tmp_path / name
        assert names(out) == [".step-2.tmp", "step-1"]
        assert checkpoint.find(out, "latest") == out / "checkpoints" / "step-1"
        with writer(out) as saver:
            assert names(out) == ["step-1"]
            save_steps(saver, 2)
        assert checkpoint.find(out, "latest") == out / "checkpoints" / "step-2"


# Which one is resumed


def test_find(tmp_path: Path) -> None:
    run, empty, begun = tmp_path / "run", tmp_path / "empty", tmp_path / "begun"
    with writer(run) as saver:
        save_steps(saver, 9, 10)
    begun.mkdir()
    (begun / "recipe.json").write_text("{}")
    newest = run / "checkpoints" / "step-10"
    for resume in ("latest", "auto", str(run), str(newest)):
        assert checkpoint.find(run, resume) == newest
    assert checkpoint.find(run, str(newest.with_name("step-9"))) == newest.with_name("step-9")
    assert checkpoint.find(empty, "auto") is None
    assert checkpoint.find(begun, "auto") is None
    assert checkpoint.find(begun, "latest") is None
    with pytest.raises(TrainError, match=f"resume is latest and {empty} holds no run"):
        checkpoint.find(empty, "latest")
    with pytest.raises(TrainError, match=f"resume is {empty}, where there is no checkpoint"):
        checkpoint.find(run, str(empty))


def remove(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def scramble(path: Path) -> None:
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(b"\xff" * 64 + shard.read_bytes()[64:])


def behead(path: Path) -> None:
    (path / "state.json").write_text("[]")


@pytest.mark.parametrize("harm", [damage, remove, scramble, behead])
@pytest.mark.parametrize("resume", ["latest", "auto"])
def test_a_damaged_checkpoint_is_passed_over(
    harm: Callable[[Path], None], resume: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with writer(tmp_path, keep_checkpoints=3) as saver:
        save_steps(saver, 1, 2, 3)
    first, second, third = checkpoint.complete(tmp_path)
    harm(third)
    assert checkpoint.find(tmp_path, resume) == second
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert f"the checkpoint {third} is damaged" in errors
    assert f"going on from {second}" in errors
    harm(second)
    assert checkpoint.find(tmp_path, resume, say=False) == first
    assert not capsys.readouterr().err
    harm(first)
    with pytest.raises(TrainError, match=f"{third} is damaged"):
        checkpoint.find(tmp_path, resume)
    with pytest.raises(TrainError, match=f"{third} is damaged"):
        checkpoint.read_state(third)


def test_a_later_format_is_not_passed_over(tmp_path: Path) -> None:
    with writer(tmp_path) as saver:
        save_steps(saver, 1, 2)
    state = checkpoint.complete(tmp_path)[-1] / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 99}))
    with pytest.raises(TrainError, match="step-2 is of format 99"):
        checkpoint.find(tmp_path, "latest")


def test_files_are_the_users(tmp_path: Path) -> None:
    """Readable as the user's umask says, and each a whole safetensors file that others can read."""
    previous = os.umask(0o027)
    try:
        with writer(tmp_path) as saver:
            save_steps(saver, 1)
    finally:
        os.umask(previous)
    shard = next(checkpoint.complete(tmp_path)[0].glob("*.safetensors"))
    assert shard.stat().st_mode & 0o777 == 0o640
    assert torch.equal(load_file(shard)["model.first.weight"], trained()[0].first.weight)
