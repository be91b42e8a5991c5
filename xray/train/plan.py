"""The dry run: what a recipe would cost on so many processes, without training and without allocating a weight.

Parameters, FLOPs, token counts and shards are exact; the memory of activations is an estimate (`activations`).
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xray import data, models, ops
from xray.models.config import Config
from xray.train import activations, distributed, prepare, schedule, sources, tasks
from xray.train.errors import TrainError
from xray.train.overrides import validate
from xray.train.recipes import Recipe

STATES = {"adamw": 2, "lion": 1, "lamb": 2}
"""Tensors that each optimizer keeps for a parameter."""
FLOAT32 = 4
MODELS: dict[type[Config], type[nn.Module]] = {
    models.MaeConfig: models.MaskedAutoencoder,
    models.TagConfig: models.TagClassifier,
    models.ClipConfig: models.Clip,
}


@dataclass(frozen=True)
class Stage:
    """Consecutive steps whose samples of one kind cost the same.

    Attributes:
        first_step: the first of them, from 1.
        last_step: the last.
        frames: of a sample; 1 is an image.
        share: of these steps that hold this kind.
        image_size: side of the input, pixels.
        keep_rate: share of tokens that each EViT layer keeps.
        tokens: of a sample in the first block, and after each EViT layer; all tokens, prefix and fused ones included.
        forward_flops: of one sample, matrix products only, a multiply-add counted as two.
        step_flops: of one sample in a training step: three times as many, and what is computed again.
        activation_bytes: of one sample (an estimate).
    """

    first_step: int
    last_step: int
    frames: int
    share: float
    image_size: int
    keep_rate: float
    tokens: tuple[int, ...]
    forward_flops: int
    step_flops: int
    activation_bytes: int

    @property
    def total_flops(self) -> float:
        """Of one sample in each of these steps."""
        return (self.last_step - self.first_step + 1) * self.share * self.step_flops


@dataclass(frozen=True)
class Unit:
    """Modules that are alike and are sharded one by one.

    Attributes:
        name: of their place in the model.
        count: how many there are.
        whole_bytes: of one of them, float32.
        shard_bytes: of one of them on the first process.
    """

    name: str
    count: int
    whole_bytes: int
    shard_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the first process.

    Attributes:
        parameters: its shards, float32.
        gradients: of its shards; with chunks the whole gradients, which wait there for the last chunk.
        optimizer: the optimizer's state.
        gathered: weights that are whole at a time: the rest, and two units and the gradients of one.
        activations: kept for the backward pass (an estimate), of the costliest stage.
        loss: workspace and gathered features of the loss.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """What `plan_of` finds.

    Attributes:
        parameters: trainable scalars by part.
        stages: of the run, in order.
        memory: of the first process.
        mesh: its dimensions, (shards,) or (replicas, shards).
        units: what is sharded.
        samples_a_step: of one process.
        samples_seen: of all steps.
        total_flops: of all steps.
        data_samples: that the training data hold; None where that is not known.
        readers: parts of a stream, or worker processes, over all processes.
        shards: that the readers share; None where that is not known.
        checkpoint_bytes: of one checkpoint, weights and optimizer state.
        unknown: what could not be found out, and what depends on it.
    """

    parameters: dict[str, int]
    stages: tuple[Stage, ...]
    memory: Memory
    mesh: tuple[int, ...]
    units: tuple[Unit, ...]
    samples_a_step: int
    samples_seen: int
    total_flops: float
    data_samples: int | None
    readers: int
    shards: int | None
    checkpoint_bytes: int
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class _Data:
    """What the data tell: samples, shards and tags where these are known, and what is not."""

    samples: int | None
    shards: int | None
    words: int
    unknown: tuple[str, ...]


def plan_of(recipe: Recipe, world_size: int = 1) -> Plan:
    """Work out what a run would cost; data that are missing are named in `Plan.unknown`.

    Raises:
        TrainError: a value, mesh or batch that `xray.train.run` would refuse too.
    """
    # Data may be missing, and generated ones never are.
    validate(replace(recipe, data=recipe.data or "generated"))
    mesh = distributed.mesh_shape(recipe.shard_size, world_size)
    if recipe.batch_size % world_size:
        raise TrainError(f"batch_size is {recipe.batch_size} and must be a multiple of the {world_size} processes")
    found = _look_at_data(recipe, world_size)
    config = tasks.model_config(recipe, found.words)
    with torch.device("meta"):
        model = MODELS[type(config)](config)
    stages = tuple(_stages(recipe, config, world_size))
    units = tuple(_units(model, mesh[-1]))
    total = sum(parameter.numel() for parameter in model.parameters())
    state = STATES[recipe.optimizer]
    return Plan(
        parameters=models.model_cost(config).parts,
        stages=stages,
        memory=_memory(recipe, config, stages, units, world_size),
        mesh=mesh,
        units=units,
        samples_a_step=recipe.batch_size // world_size,
        samples_seen=recipe.steps * recipe.batch_size,
        total_flops=recipe.batch_size * sum(stage.total_flops for stage in stages),
        data_samples=found.samples,
        readers=sources.num_readers(recipe, world_size) or recipe.num_workers * world_size,
        shards=found.shards,
        checkpoint_bytes=total * (1 + state) * FLOAT32,
        unknown=found.unknown,
    )


def _look_at_data(recipe: Recipe, world_size: int) -> _Data:
    """What is known of the data without training on them; nothing is generated, downloaded or decoded."""
    words, unknown = recipe.vocab_size, []
    if recipe.task == "tags":
        words = len(prepare.read_tags(recipe.tags_file)) if recipe.tags_file else 0
    samples: int | None = None
    shards: int | None = None
    alone = distributed.World(0, 1, torch.device("cpu"))
    try:
        if not recipe.data:
            unknown.append("data is empty: epochs and shards")
        elif recipe.data == "generated":
            samples = recipe.data_size
            unknown.append("how many of the generated samples are for tests: epochs count these too")
        elif recipe.stream:
            shards = sources.Streamed(recipe, replace(alone, size=world_size)).stream.num_shards
            unknown.append("a stream does not say how many samples it has: epochs")
        else:
            indexed = sources.Indexed(recipe, Path(), alone)
            samples = sum(map(len, indexed.datasets))
            if recipe.task == "tags" and not words:
                words = len(json.loads(tasks.learn(recipe, indexed.texts())["tags"]))
    except data.DataError as error:
        unknown.append(f"{error}: epochs and shards")
    if not words:
        unknown.append("the tags are learned from the data: the head, counted here with one tag")
    if recipe.task == "clip" and not recipe.tokenizer_file:
        unknown.append(f"the tokenizer is learned from the data: counted here with vocab_size {recipe.vocab_size}")
    return _Data(samples, shards, max(words, 1), tuple(unknown))


def _item(recipe: Recipe) -> int:
    """Bytes of a number in the compute dtype, where "auto" means a GPU."""
    return 4 if recipe.precision == "float32" else 2


def _samples_at_once(recipe: Recipe, world_size: int) -> int:
    """Samples whose activations a process holds."""
    return min(recipe.batch_size // world_size, recipe.chunk_size or recipe.batch_size)


def _stages(recipe: Recipe, config: Config, world_size: int) -> list[Stage]:
    share = recipe.clip_fraction
    kinds = {1: 1 - share, recipe.num_frames: share} if recipe.num_frames > 1 else {1: 1.0}
    chunked = _samples_at_once(recipe, world_size) < recipe.batch_size // world_size
    times = 3 + (recipe.activation_checkpointing == "full") + chunked
    stages = []
    for shape in schedule.shapes(recipe):
        for frames, part in kinds.items():
            if not part:
                continue
            rate = None if recipe.task == "mae" else shape.keep_rate
            cost = models.model_cost(config, keep_rate=rate, num_frames=frames, image_size=shape.image_size)
            kept = activations.sample_bytes(
                config, cost, frames, shape.image_size, recipe.activation_checkpointing, _item(recipe)
            )
            tokens = [n for n, before in zip(cost.block_tokens, [0, *cost.block_tokens], strict=False) if n != before]
            first, last = shape.first_step + 1, shape.first_step + shape.steps
            sizes = (shape.image_size, shape.keep_rate, tuple(tokens), cost.flops, times * cost.flops, kept)
            stages.append(Stage(first, last, frames, part, *sizes))
    return stages


def _units(model: nn.Module, shards: int) -> list[Unit]:
    names = {module: re.sub(r"\.\d+$", "", name) for name, module in model.named_modules()}
    parts = distributed.units(model)
    inside = {parameter for part in parts for parameter in part.parameters()}
    groups = Counter((names[part], *_bytes(list(part.parameters()), shards)) for part in parts)
    rest = [parameter for parameter in model.parameters() if parameter not in inside]
    units = [Unit(name, count, whole, own) for (name, whole, own), count in groups.items()]
    return [*units, Unit("the rest", 1, *_bytes(rest, shards))]


def _bytes(parameters: list[nn.Parameter], shards: int) -> tuple[int, int]:
    """Bytes of whole float32 parameters, and of the first of their shards, which are cut along dimension 0."""
    rows = [(len(parameter), parameter[:1].numel()) for parameter in parameters]
    whole = sum(count * size for count, size in rows)
    own = sum(-(-count // shards) * size for count, size in rows)
    return whole * FLOAT32, own * FLOAT32


def _memory(
    recipe: Recipe, config: Config, stages: tuple[Stage, ...], units: tuple[Unit, ...], world_size: int
) -> Memory:
    own = sum(unit.count * unit.shard_bytes for unit in units)
    whole = sum(unit.count * unit.whole_bytes for unit in units)
    batch, at_once = recipe.batch_size // world_size, _samples_at_once(recipe, world_size)
    *gathered, rest = units
    # Blocks, the largest units as a rule, are gathered in the compute dtype.
    largest = max(unit.whole_bytes for unit in gathered) * _item(recipe) // FLOAT32
    losses: dict[str, Callable[..., Any]] = {"tags": ops.tag_loss, "clip": ops.clip_loss}
    loss = 0
    if recipe.task in losses:
        loss = inspect.signature(losses[recipe.task]).parameters["max_workspace_bytes"].default
    if isinstance(config, models.ClipConfig):
        texts = recipe.batch_size if recipe.exchange == "all_gather" else 2 * batch
        loss += config.embed_dim * (texts * _item(recipe) + 4 * batch * FLOAT32)
    return Memory(
        parameters=own,
        gradients=own if at_once == batch else whole,
        optimizer=own * STATES[recipe.optimizer],
        gathered=0 if world_size == 1 else rest.whole_bytes + 3 * largest,
        activations=at_once * max(stage.activation_bytes for stage in stages),
        loss=loss,
    )


def describe(recipe: Recipe, world_size: int = 1) -> str:
    """The plan as text for a person.

    Raises:
        TrainError: as `plan_of`.
    """
    plan = plan_of(recipe, world_size)
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    lines = [f"{recipe.name}: task {recipe.task}, model {recipe.model}, on {processes}; nothing is trained", ""]
    lines += _table(
        [["Parameters", _count(sum(plan.parameters.values()))]]
        + [[f"  {part}", _count(number)] for part, number in plan.parameters.items()]
        + [["Steps", f"{recipe.steps:,}"], ["  samples a step", f"{recipe.batch_size:,}"]]
        + [["  of each process", f"{plan.samples_a_step:,}"], ["Samples seen", _count(plan.samples_seen)]]
        + [["PFLOP in all", _digits(plan.total_flops / 1e15)]]
        + (
            [["  of the data's", f"{plan.data_samples:,}"], ["Epochs", f"{plan.samples_seen / plan.data_samples:,.1f}"]]
            if plan.data_samples
            else []
        )
    )
    lines += ["", *_stage_lines(recipe, plan)]
    lines += ["", *_memory_lines(recipe, plan)]
    lines += ["", *_shard_lines(recipe, plan, world_size)]
    if plan.unknown:
        lines += ["", "Not known"] + [f"  {reason}" for reason in plan.unknown]
    return "\n".join(lines)


def _stage_lines(recipe: Recipe, plan: Plan) -> list[str]:
    rows = [["Steps", "sample", "pixels", "keep", "GFLOP forward", "in a step", "tokens, and after each EViT layer"]]
    for stage in plan.stages:
        kind = "image" if stage.frames == 1 else f"clip of {stage.frames}"
        rows.append(
            [
                f"{stage.first_step:,}-{stage.last_step:,}",
                kind if stage.share == 1 else f"{kind}, {stage.share:.0%}",
                str(stage.image_size),
                f"{stage.keep_rate:.3g}",
                _digits(stage.forward_flops / 1e9),
                _digits(stage.step_flops / 1e9),
                " > ".join(f"{tokens:,}" for tokens in stage.tokens),
            ]
        )
    return _table(rows, left=(0, 1, 6))


def _memory_lines(recipe: Recipe, plan: Plan) -> list[str]:
    memory = plan.memory
    dtype = "float32" if _item(recipe) == 4 else "bfloat16"
    whole = "whole, for chunks" if memory.gradients > memory.parameters else "float32"
    samples = min(plan.samples_a_step, recipe.chunk_size or plan.samples_a_step)
    rows = [
        ["Memory of a process", _size(memory.total), f"computing in {dtype}" + _precision_note(recipe)],
        ["  parameters", _size(memory.parameters), "float32"],
        ["  gradients", _size(memory.gradients), whole],
        ["  optimizer state", _size(memory.optimizer), recipe.optimizer],
        ["  gathered weights", _size(memory.gathered), "two units and the gradients of one, and the rest"],
        [
            "  activations",
            _size(memory.activations),
            f"estimate, of {samples:,} samples, activation_checkpointing {recipe.activation_checkpointing}",
        ],
        [
            "  loss",
            _size(memory.loss),
            "workspace" + (f", exchange {recipe.exchange}" if recipe.task == "clip" else ""),
        ],
        ["Checkpoint", _size(plan.checkpoint_bytes), "weights and optimizer state, all processes together"],
    ]
    return _table(rows, left=(0, 2))


def _precision_note(recipe: Recipe) -> str:
    return "" if recipe.precision != "auto" else ", as on a GPU; precision=float32 plans for a CPU"


def _shard_lines(recipe: Recipe, plan: Plan, world_size: int) -> list[str]:
    *copies, shards = plan.mesh
    mesh = f"{copies[0]} copies, each of {shards} shards" if copies else f"1 copy of {shards} shard{'s'[: shards > 1]}"
    rows = [["Shards of the model", "modules", "each whole", "on a process"]]
    rows += [[f"  {u.name}", str(u.count), _size(u.whole_bytes), _size(u.shard_bytes)] for u in plan.units]
    lines = [*_table(rows), f"  mesh: {mesh}"]
    if recipe.stream:
        reading = f"{plan.readers:,} readers of a stream, {plan.readers / world_size:,.4g} on each process"
        if plan.shards is not None:
            reading += f"; {plan.shards:,} shards, {plan.shards / plan.readers:,.4g} for each reader"
    else:
        reading = f"samples at random through an index, {recipe.num_workers} workers on each process"
    return [*lines, f"  data: {reading}"]


def _table(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    """Lines with aligned columns, those in `left` to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if place in left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _digits(number: float) -> str:
    """A number to four digits, without an exponent."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def _count(number: int) -> str:
    """A large number to four digits: 2.015 B."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return f"{number:,}"


def _size(number: int) -> str:
    """Bytes to four digits: 4.1 GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:,.4g} {name}"
    return f"{number} B"
