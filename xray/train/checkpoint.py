"""Checkpoints of a run: everything that a later process needs to go on as if nothing had happened.

`checkpoints/step-N/` holds, after N steps, `shard-*.safetensors` (PyTorch's Distributed Checkpoint, one file a process:
what `snapshot.take` lists) and `state.json` (step, recipe, tags or tokenizer, counts, the optimizer's layout, and the
size of each file). The schedules need no state, being functions of the step.

Nothing is ever unpickled. Distributed Checkpoint's own layout keeps its metadata in a pickle, which runs code when
read, so the safetensors layout of the same library is used instead, where metadata are JSON.

A checkpoint is written to a hidden folder, flushed to the disk and renamed, and renamed again before it is deleted: so
a folder named `step-N` is complete, whatever happened to the process that wrote it. `checkpointer` writes them; this
file finds and reads them.
"""

import errno
import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from xray.train import snapshot
from xray.train.distributed import World
from xray.train.errors import TrainError
from xray.train.recipes import Recipe

FORMAT = 1


class Damaged(TrainError):
    """A checkpoint of which something is missing or cut short."""


@dataclass(frozen=True)
class State:
    """What `state.json` says.

    Attributes:
        step: steps done.
        recipe: the run's recipe, as a dictionary.
        artifacts: what the task learned from the data before training: its tags or its tokenizer.
        counts: what the run has counted so far, such as skipped steps.
        optimizer: `snapshot.take`'s layout.
    """

    step: int
    recipe: dict[str, Any]
    artifacts: dict[str, str]
    counts: dict[str, int]
    optimizer: dict[str, Any]


@dataclass(frozen=True)
class Restored:
    """Where a resumed run stands.

    Attributes:
        step: steps done.
        loader_state: position of each reader of the data by its number, of all processes.
        counts: what the run had counted.
    """

    step: int
    loader_state: dict[int, bytes]
    counts: dict[str, int]


def hush() -> None:
    """The library warns that a single process is a single process."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def reason(error: BaseException) -> str:
    """Why a file could not be written, in a few words; torch hides the cause under its own exception."""
    if isinstance(error, CheckpointException):
        error = next((cause for cause, _ in error.failures.values() if isinstance(cause, OSError)), error)
    if isinstance(error, OSError):
        return "no space is left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
    return str(error).strip().splitlines()[-1]


def complete(out: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The number of steps that a checkpoint's folder names."""
    return int(path.name.removeprefix("step-"))


def find(out: Path, resume: str, say: bool = True) -> Path | None:
    """The checkpoint that `resume` names.

    Args:
        out: the run's folder.
        resume: "latest" or "auto" for the newest whole checkpoint of the run in `out`; a checkpoint's folder, or a
            run's, for its newest.
        say: print a warning to stderr where a damaged checkpoint is passed over.

    Returns:
        None where the run is to start over: it was stopped before its first checkpoint or, of "auto", has never begun.

    Raises:
        TrainError: there is no such checkpoint, or all that there are are damaged.
    """
    if resume not in ("latest", "auto"):
        run = Path(resume)
        if (run / "state.json").is_file():
            return run
        if checkpoints := complete(run):
            return checkpoints[-1]
        raise TrainError(
            f"resume is {resume}, where there is no checkpoint: name one such as runs/NAME/checkpoints/step-100"
        )
    damage: Damaged | None = None
    for path in reversed(complete(out)):
        try:
            read_state(path)
        except Damaged as error:
            damage = damage or error
            continue
        if damage is not None and say:
            print(f"{str(damage).partition(': ')[0]}; going on from {path}", file=sys.stderr)
        return path
    if damage is not None:
        raise damage
    if resume == "auto" or (out / "recipe.json").is_file():
        return None
    raise TrainError(f"resume is latest and {out} holds no run: name its folder by out=FOLDER, or leave resume out")


def read_state(path: Path) -> State:
    """Read and check `state.json` and the files that it lists.

    Raises:
        TrainError: something is missing, cut short or of another format.
    """
    state, sizes = _read(path)
    for name, size in sizes.items():
        file = path / Path(name).name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if file.stat().st_size != size:
            raise _damaged(path, f"{name} has {file.stat().st_size} of {size} bytes")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise _damaged(path, f"{name}'s header cannot be read") from error
    return state


def _read(path: Path) -> tuple[State, dict[str, int]]:
    """What `state.json` says, and the sizes of the other files."""
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version = int(content["format"])
        if version == FORMAT:
            parts = (dict(content[part]) for part in ("recipe", "artifacts", "counts", "optimizer"))
            return State(int(content["step"]), *parts), dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"its state.json cannot be read ({type(error).__name__})") from error
    raise TrainError(f"the checkpoint {path} is of format {version} and this version reads format {FORMAT}")


def check_recipe(path: Path, state: State, recipe: Recipe) -> None:
    """See that a checkpoint is of the task and the optimizer that a recipe asks for.

    Raises:
        TrainError: it is of another.
    """
    for key in ("task", "optimizer"):
        was, asked = state.recipe.get(key, getattr(Recipe, key, None)), getattr(recipe, key)
        if was != asked:
            raise TrainError(f"the checkpoint {path} is of {key} {was} and {recipe.name} of {key} {asked}")


def restore(path: Path, task: nn.Module, optimizer: torch.optim.Optimizer, place: World) -> Restored:
    """Load a checkpoint into a new model and optimizer, in place, and set the random states.

    All processes must call it. A run may be resumed with another number of processes; the random states of new ones
    are as they are.

    Raises:
        TrainError: a file is damaged, or the checkpoint is of another model.
    """
    state, _ = _read(path)
    reader, stored = open_tensors(path)
    try:
        target = snapshot.targets(task, optimizer, state.optimizer, stored, place.rank)
    except snapshot.Mismatch as error:
        raise TrainError(f"the checkpoint {path} does not fit the recipe: {error}") from error
    load_tensors(path, reader, target, no_dist=place.size == 1)
    return Restored(state.step, snapshot.finish(target, place.rank), state.counts)


def open_tensors(path: Path) -> tuple[dcp.HuggingFaceStorageReader, dict[str, snapshot.Stored]]:
    """A reader of a checkpoint's tensors, and what they are.

    Raises:
        TrainError: a file is damaged.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        entries = reader.read_metadata().state_dict_metadata
        stored = {name: snapshot.Stored(tuple(e.size), e.properties.dtype) for name, e in entries.items()}  # type: ignore[union-attr]
    except Exception as error:  # safetensors and json raise many kinds for a damaged header
        raise _damaged(path, "a safetensors header cannot be read") from error
    return reader, stored


def load_tensors(path: Path, reader: dcp.HuggingFaceStorageReader, target: dict[str, Tensor], no_dist: bool) -> None:
    """Read tensors of a checkpoint, each process its shards, into those of the same names.

    Raises:
        TrainError: a file is damaged.
    """
    try:
        hush()
        dcp.load(target, storage_reader=reader, no_dist=no_dist)
    except (Exception, CheckpointException) as error:
        raise _damaged(path, "its tensors cannot be read") from error


def _damaged(path: Path, what: str) -> Damaged:
    return Damaged(
        f"the checkpoint {path} is damaged, {what}: resume from an earlier one by resume=PATH overwrite=true"
    )
