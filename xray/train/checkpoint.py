"""Checkpoints of a run: everything that a later process needs to go on as if nothing had happened.

`checkpoints/step-N/` holds, after N steps, `shard-*.safetensors` (PyTorch's Distributed Checkpoint, one
file a process: the model, AdamW's state and the random states) and `state.json` (step, recipe, tags or
tokenizer, and the size of each file). The schedules and the loader need no state: both are functions of the
step.

Nothing is ever unpickled. Distributed Checkpoint's own layout keeps its metadata in a pickle, which runs
code when read, so the safetensors layout of the same library is used instead (`HuggingFaceStorageWriter`),
where metadata are JSON.

A checkpoint is written to a hidden folder, flushed to the disk and renamed, so a folder named `step-N` is
complete.
"""

import errno
import json
import os
import random
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from xray.train.distributed import World
from xray.train.errors import TrainError
from xray.train.recipes import Recipe

FORMAT = 1


@dataclass(frozen=True)
class State:
    """What `state.json` says.

    Attributes:
        step: steps done.
        recipe: the run's recipe, as a dictionary.
        artifacts: what the task learned from the data before training: its tags or its tokenizer.
    """

    step: int
    recipe: dict[str, Any]
    artifacts: dict[str, str]


def save(
    out: Path,
    step: int,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    artifacts: dict[str, str],
    place: World,
) -> Path:
    """Write `out/checkpoints/step-N`, delete all but the newest `recipe.keep_checkpoints`, and return its
    path.

    All processes must call it.

    Raises:
        TrainError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    folder = out / "checkpoints"
    final, draft = folder / f"step-{step}", folder / f".step-{step}.tmp"

    def begin() -> None:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)

    def publish() -> None:
        sizes = {file.name: file.stat().st_size for file in draft.iterdir()}
        state = {"format": FORMAT, **asdict(State(step, asdict(recipe), artifacts)), "files": sizes}
        with (draft / "state.json").open("w", encoding="utf-8") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(draft)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        _sync_folder(folder)
        for old in complete(out)[: -recipe.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)

    try:
        place.first_does(begin)
        writer = dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that a single process is a single process
            dcp.save(_tensors(task, optimizer, place), storage_writer=writer, no_dist=place.size == 1)
        place.first_does(publish)
    except (OSError, CheckpointException) as error:
        if place.is_first:
            shutil.rmtree(draft, ignore_errors=True)
        raise TrainError(f"the checkpoint of step {step} cannot be written to {folder}: {reason(error)}") from error
    return final


def _sync_folder(folder: Path) -> None:
    """Have the disk remember the names in a folder, not only the files' contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def find(out: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` names: "latest" of the run in `out`, a checkpoint's folder, or a run's.

    None means that the run in `out` was stopped before its first checkpoint, and starts over.

    Raises:
        TrainError: there is no such checkpoint.
    """
    if resume == "auto" and not (out / "recipe.json").is_file():
        return None
    run = out if resume in ("latest", "auto") else Path(resume)
    if (run / "state.json").is_file():
        return run
    if checkpoints := complete(run):
        return checkpoints[-1]
    if resume in ("latest", "auto") and (out / "recipe.json").is_file():
        return None
    if resume == "latest":
        raise TrainError(f"resume is latest and {out} holds no run: name its folder by out=FOLDER, or leave resume out")
    raise TrainError(
        f"resume is {resume}, where there is no checkpoint: name one such as runs/NAME/checkpoints/step-100"
    )


def read_state(path: Path) -> State:
    """Read and check `state.json` and the files that it lists.

    Raises:
        TrainError: something is missing, cut short or of another format.
    """
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        state = State(int(content["step"]), dict(content["recipe"]), dict(content["artifacts"]))
        sizes, version = dict(content["files"]), int(content["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(path, f"its state.json cannot be read ({type(error).__name__})") from error
    if version != FORMAT:
        raise TrainError(f"the checkpoint {path} is of format {version} and this version reads format {FORMAT}")
    for name, size in sizes.items():
        file = path / Path(name).name
        if not file.is_file():
            raise _broken(path, f"{name} is missing")
        if file.stat().st_size != size:
            raise _broken(path, f"{name} has {file.stat().st_size} of {size} bytes")
    return state


def restore(path: Path, task: nn.Module, optimizer: torch.optim.Optimizer, place: World) -> None:
    """Load the model, AdamW's state and the random states from a checkpoint, in place. All processes must
    call it.

    A run may be resumed with another number of processes; the random states of new ones are as they are.

    Raises:
        TrainError: a file is damaged, or the checkpoint is of another model.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        stored = reader.read_metadata().state_dict_metadata
        sizes = {name: tuple(entry.size) for name, entry in stored.items()}  # type: ignore[union-attr]
    except Exception as error:  # safetensors and json raise many kinds for a damaged header
        raise _broken(path, "a safetensors header cannot be read") from error
    _start_optimizer(task, optimizer, sizes)
    target = {
        name: tensor for name, tensor in _tensors(task, optimizer, place).items() if name in sizes or "rng." not in name
    }
    for name, tensor in target.items():
        if sizes.get(name) != tuple(tensor.shape):
            had = f"shape {sizes[name]}" if name in sizes else "none"
            raise TrainError(
                f"the checkpoint {path} does not fit the recipe: {name} has shape {tuple(tensor.shape)} here "
                f"and {had} there"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(target, storage_reader=reader, no_dist=place.size == 1)
    except (Exception, CheckpointException) as error:
        raise _broken(path, "its tensors cannot be read") from error
    _set_random_states(target, place)


def _broken(path: Path, what: str) -> TrainError:
    return TrainError(
        f"the checkpoint {path} is damaged, {what}: resume from an earlier one by resume=PATH overwrite=true"
    )


def _tensors(task: nn.Module, optimizer: torch.optim.Optimizer, place: World) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name; shards stay shards, and each process adds its random states."""
    tensors = {f"model.{name}": tensor for name, tensor in task.state_dict().items()}
    for name, parameter in task.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            # AdamW counts steps in a 0-D tensor; Distributed Checkpoint's safetensors layout wants a
            # dimension.
            tensors[f"optimizer.{name}.{key}"] = value.view(1) if value.ndim == 0 else value
    return tensors | {f"rng.{place.rank}.{name}": state for name, state in _random_states().items()}


def _start_optimizer(task: nn.Module, optimizer: torch.optim.Optimizer, sizes: dict[str, tuple[int, ...]]) -> None:
    """Give AdamW empty state for every parameter that has some in the checkpoint, to be loaded into."""
    fused = optimizer.defaults["fused"]
    for name, parameter in task.named_parameters():
        if f"optimizer.{name}.exp_avg" in sizes:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _random_states() -> dict[str, Tensor]:
    """The states of Python's, NumPy's and torch's global generators as tensors."""
    _, words, gauss = random.getstate()
    mersenne: dict[str, Any] = np.random.get_state(legacy=False)
    keys, position = mersenne["state"]["key"], mersenne["state"]["pos"]
    states = {
        "python": torch.tensor([*words, gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor(
            [*keys.tolist(), position, mersenne["has_gauss"], mersenne["gauss"]], dtype=torch.float64
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(tensors: dict[str, Tensor], place: World) -> None:
    prefix = f"rng.{place.rank}."
    states = {name.removeprefix(prefix): state for name, state in tensors.items() if name.startswith(prefix)}
    if "python" in states:
        *words, has_gauss, gauss = states["python"].tolist()
        random.setstate((3, tuple(int(word) for word in words), gauss if has_gauss else None))
    if "numpy" in states:
        *keys, position, has_gauss, cached = states["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
