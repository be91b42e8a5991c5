"""One safetensors file of a run's model: the one that a run ends with, and that of any of its checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xray import models
from xray.train import checkpoint, distributed, snapshot, tasks
from xray.train.distributed import World
from xray.train.errors import TrainError
from xray.train.recipes import Recipe

PLACES = ("out", "init", "resume", "overwrite")  # settings that mean nothing away from this machine


def export(source: str | Path, out: str | Path, *, step: int | None = None, timm: bool = False) -> Path:
    """Write the model of a checkpoint, of however many shards, to one safetensors file, in one process.

    Only the weights are read, once, and none of the optimizer's state.

    Args:
        source: a run's folder or that of a checkpoint.
        out: the file to write.
        step: of a run, the checkpoint to take; None takes the newest that is whole.
        timm: write the image encoder alone, for timm's VisionTransformer (`xray.models.save_timm`), instead of the
            whole model for `xray.models.load`.

    Returns:
        `out`.

    Raises:
        TrainError: there is no such checkpoint, or it is damaged.
        CheckpointError: the file cannot be written.
    """
    path = _checkpoint(Path(source), step)
    state = checkpoint.read_state(path)
    recipe = recipe_of(state.recipe)
    with torch.device("meta"):  # no time spent on weights about to be replaced
        task = tasks.build(recipe, state.artifacts).to_empty(device="cpu")
    reader, stored = checkpoint.open_tensors(path)
    try:
        target = snapshot.model_targets(task, stored)
    except snapshot.Mismatch as error:
        raise TrainError(f"the checkpoint {path} does not fit its own recipe: {error}") from error
    checkpoint.load_tensors(path, reader, target, no_dist=True)
    strings = header(recipe, state.artifacts)
    if timm:
        models.save_timm(task.model, out, state_dict=None, **strings)
    else:
        models.save(task.model, out, state_dict=None, **strings)
    return Path(out)


def final_model(task: tasks.Task, recipe: Recipe, artifacts: Mapping[str, str], place: World, path: Path) -> None:
    """Write the model that is trained to one file, gathering its shards tensor by tensor on the first process.

    All processes must call it.

    Raises:
        CheckpointError: the file cannot be written (TrainError on the other processes).
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in task.state_dict().items():
        full = distributed.whole(tensor)
        if place.is_first:
            weights[name.removeprefix("model.")] = full.cpu()
    strings = header(recipe, artifacts)
    place.first_does(lambda: models.save(task.model, path, state_dict=weights, **strings))


def header(recipe: Recipe, artifacts: Mapping[str, str]) -> dict[str, str]:
    """What a model's file says of its making: the recipe as JSON, and the tags or the tokenizer."""
    settings = {key: value for key, value in asdict(recipe).items() if key not in PLACES}
    return {"recipe": json.dumps(settings), **artifacts}


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """A recipe from the dictionary that a checkpoint keeps; keys of other versions are passed over."""
    known = {field.name for field in fields(Recipe)}
    kept: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items() if key in known
    }
    return Recipe(**kept)


def _checkpoint(source: Path, step: int | None) -> Path:
    checkpoints = {checkpoint.step_of(path): path for path in checkpoint.complete(source)}
    if step is not None and step not in checkpoints:
        there = f"checkpoints of steps {', '.join(map(str, checkpoints))}" if checkpoints else "no checkpoints"
        raise TrainError(f"step is {step} and {source} has {there}")
    if step is not None:
        return checkpoints[step]
    if (source / "state.json").is_file():
        return source
    found = checkpoint.find(source, "latest") if checkpoints else None
    if found is None:
        raise TrainError(f"{source} is neither a checkpoint nor a run that has one, such as runs/NAME")
    return found
