"""From the command line to a recipe: find it by name, apply `key=value`, check the values."""

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from xray.train import metrics, schedule
from xray.train.errors import TrainError
from xray.train.recipes import RECIPES, Recipe

TASKS = ("mae", "tags", "clip")
CHOICES = {
    "task": TASKS,
    "precision": ("auto", "float32", "bfloat16"),
    "optimizer": ("adamw", "lion", "lamb"),
    "exchange": ("all_gather", "ring"),
    "activation_checkpointing": ("none", "selective", "full"),
}
TRACKERS = ("wandb", "trackio")
LARGEST_SEED = 2**63 - 1

AT_LEAST_ONE = (
    "image_size",
    "num_frames",
    "data_size",
    "steps",
    "batch_size",
    "max_bad_steps",
    "keep_rate_buckets",
    "decoder_width",
    "decoder_depth",
    "decoder_heads",
    "min_tag_count",
    "embed_dim",
    "text_width",
    "text_depth",
    "text_heads",
    "context_length",
    "vocab_size",
    "shuffle_buffer",
    "keep_checkpoints",
    "log_every",
)
AT_LEAST_ZERO = (
    "num_workers",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "grad_clip",
    "keep_rate_warmup",
    "caption_tags",
    "chunk_size",
    "readers",
    "shard_size",
    "checkpoint_every",
    "keep_every",
    "epsilon",
    "peak_tflops",
)

WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def nearest(word: str, choices: Iterable[str]) -> str:
    """ " Did you mean ...?" for a mistyped word, or nothing where no choice is near."""
    matches = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        TrainError: there is none; the message suggests the nearest.
    """
    if name not in RECIPES:
        raise TrainError(f"there is no recipe {name!r}{nearest(name, RECIPES) or ': see `xray train --list`'}")
    return RECIPES[name]()


def parse_overrides(recipe: Recipe, arguments: Iterable[str]) -> Recipe:
    """`recipe` with every "key=value" of `arguments` applied, converted to the key's type.

    Raises:
        TrainError: an argument is not key=value, the key does not exist, or the value is of another type.
    """
    kinds = {field.name: field.type for field in fields(Recipe)}
    changes: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise TrainError(f"{argument!r} is not a setting: write key=value, such as steps=100")
        if key not in kinds or key in ("name", "task"):
            known = [name for name in kinds if name not in ("name", "task")]
            raise TrainError(f"a recipe has no key {key!r}{nearest(key, known) or ': see `xray train --list`'}")
        changes[key] = _convert(key, text, kinds[key])
    return replace(recipe, **changes)


def recipe_for(name: str, arguments: Sequence[str]) -> Recipe:
    """The recipe that `xray train NAME key=value ...` means.

    Going on with an interrupted run, its own settings count instead of the recipe's defaults, so
    `xray train NAME out=FOLDER resume=latest` is enough.

    Raises:
        TrainError: an unknown recipe or key, or a value of the wrong type.
    """
    recipe = find_recipe(name)
    asked = parse_overrides(recipe, arguments)
    run = Path(asked.out or f"runs/{name}")
    if not asked.resume or (asked.resume == "auto" and not (run / "recipe.json").is_file()):
        return asked
    if asked.resume not in ("latest", "auto"):
        path = Path(asked.resume)
        source = path / "state.json"
        if not asked.out:
            run = path.parent.parent if source.is_file() else path
    if asked.resume in ("latest", "auto") or not source.is_file():
        source = run / "recipe.json"
    saved = _saved_settings(source)
    if saved.get("name", name) != name:
        raise TrainError(f"{source.parent} belongs to a run of {saved['name']} and not of {name}")
    return parse_overrides(replace(recipe, **saved, out=str(run)), arguments)


def _saved_settings(path: Path) -> dict[str, Any]:
    """The settings that a run has left in a JSON file, none if it is unreadable; resuming reports that."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content.get("recipe", content)
        saved = {field.name: content[field.name] for field in fields(Recipe) if field.name in content}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    saved = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    return {key: value for key, value in saved.items() if key not in ("out", "resume", "overwrite")}


def _convert(key: str, text: str, kind: Any) -> Any:
    """The value that `text` stands for; `kind` is the field's annotation."""
    try:
        if kind is bool:
            return WORDS[text.lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if kind is str:
            return text
        numbers = tuple(float(part) for part in text.split(",")) if text else ()
        if key == "betas" and len(numbers) != 2:
            raise ValueError
        return numbers
    except (KeyError, ValueError):
        needed = {bool: "true or false", int: "a whole number", float: "a number"}.get(
            kind, "two numbers such as 0.9,0.95" if key == "betas" else "numbers such as 2,1,1"
        )
        raise TrainError(f"{key} is {text!r} and must be {needed}") from None


def validate(recipe: Recipe) -> None:
    """Check every value that can be checked without data or model.

    Raises:
        TrainError: the first value out of its range, in one sentence.
    """
    for key, allowed in CHOICES.items():
        value = getattr(recipe, key)
        if value not in allowed:
            raise TrainError(
                f"{key} is {value!r} and must be one of {', '.join(allowed)}{nearest(str(value), allowed)}"
            )
    for key in AT_LEAST_ONE:
        _check(recipe, key, 1, math.inf)
    for key in AT_LEAST_ZERO:
        _check(recipe, key, 0, math.inf)
    _check(recipe, "seed", 0, LARGEST_SEED)
    _check(recipe, "clip_fraction", 0, 1)
    _check(recipe, "short_texts", 0, 1)
    for key, high in (("keep_rate", 1), ("mask_ratio", 1), ("layer_decay", 1), ("read_timeout", math.inf)):
        _check(recipe, key, 0, high)
        if getattr(recipe, key) == 0:
            raise TrainError(f"{key} is 0 and must be more than 0")
    if recipe.mask_ratio == 1:
        raise TrainError("mask_ratio is 1 and must be less than 1: some patches must be seen")
    if not all(0 <= beta < 1 for beta in recipe.betas):
        raise TrainError(f"betas are {recipe.betas} and must both be at least 0 and less than 1")
    if not all(0 < weight < math.inf for weight in recipe.data_weights):
        raise TrainError(f"data_weights are {recipe.data_weights} and must all be positive numbers")
    for name in filter(None, recipe.trackers.split(",")):
        if name not in TRACKERS:
            raise TrainError(
                f"trackers has {name!r} and must be one or both of {', '.join(TRACKERS)}{nearest(name, TRACKERS)}"
            )
    metrics.check(recipe)
    if not recipe.data:
        raise TrainError(f"data is empty and {recipe.name} needs data=FOLDER, a folder written by `xray data pack`")
    if recipe.task == "mae" and recipe.clip_fraction:
        raise TrainError(
            f"clip_fraction is {recipe.clip_fraction} and must be 0 for mae, which learns from images only"
        )
    if recipe.task != "clip" and recipe.chunk_size:
        raise TrainError(
            f"chunk_size is {recipe.chunk_size} and must be 0 for {recipe.task}, whose loss compares no samples with "
            "each other as clip's does: lower batch_size instead"
        )
    if recipe.optimizer == "lamb" and not recipe.weight_decay:
        raise TrainError(
            "weight_decay is 0 and must be more than 0 for lamb, which scales the steps of decayed weights only"
        )
    schedule.check(recipe)


def _check(recipe: Recipe, key: str, low: float, high: float) -> None:
    value = getattr(recipe, key)
    if not (low <= value <= high) or math.isinf(value):
        bound = f"at least {low}" if high in (math.inf, LARGEST_SEED) else f"from {low} to {high}"
        raise TrainError(f"{key} is {value} and must be {bound}")
