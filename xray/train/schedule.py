"""What changes along a run, as pure functions of the step: learning rate, image size and keep rate.

Nothing here has a state, so a run that is resumed stands where it was. Nothing imports torch either: recipes are
checked before there is anything to train.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from xray.train.errors import TrainError
from xray.train.recipes import Recipe

if TYPE_CHECKING:
    from torch.optim import Optimizer

KINDS: dict[str, type[int] | type[float]] = {"image_size_schedule": int, "keep_rate_schedule": float}


class Shape(NamedTuple):
    """Consecutive steps of one image size and one keep rate.

    Attributes:
        image_size: side of the square input, pixels.
        keep_rate: share of tokens that each EViT layer keeps; 1 for mae.
        first_step: the first of the steps, counted from 0.
        steps: how many there are.
    """

    image_size: int
    keep_rate: float
    first_step: int
    steps: int


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of step `step`, counted from 0: linear warm-up to the peak, then a cosine down to zero."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give each parameter group its part of `rate`, `lr_scale`, as `optimizer.parameter_groups` lays it down."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def image_size(recipe: Recipe, step: int) -> int:
    """The side of the input at step `step`, counted from 0: that of `image_size_schedule`, then `image_size`."""
    return int(_value(parse_schedule("image_size_schedule", recipe.image_size_schedule), step, recipe.image_size))


def image_sizes(recipe: Recipe) -> list[int]:
    """Every side that the input has along a run, each once."""
    scheduled = parse_schedule("image_size_schedule", recipe.image_size_schedule)
    return list(dict.fromkeys([*(int(size) for size, _ in scheduled), recipe.image_size]))


def keep_rate(recipe: Recipe, step: int) -> float:
    """EViT's keep rate at step `step`, counted from 0: that of `keep_rate_schedule`, or of the warm-up.

    In a warm-up it falls from 1 to `recipe.keep_rate` along a cosine over `keep_rate_warmup` steps (EViT, ICLR 2022,
    section 4.1), but only through `keep_rate_buckets` evenly spaced values. Every value means token counts of its
    own, and each token count is a shape to compile and to capture. At 196 patches and a keep rate of 0.7, three
    buckets make 4 values and 10 token counts; the official schedule, which moves at every iteration, makes 146
    combinations of 126 token counts.
    """
    if step < recipe.keep_rate_warmup:
        fallen = 0.5 * (1 - math.cos(math.pi * step / recipe.keep_rate_warmup))
        return 1 - (1 - recipe.keep_rate) * math.floor(fallen * recipe.keep_rate_buckets) / recipe.keep_rate_buckets
    return _value(parse_schedule("keep_rate_schedule", recipe.keep_rate_schedule), step, recipe.keep_rate)


def shapes(recipe: Recipe) -> list[Shape]:
    """The whole run in order, cut wherever the image size or the keep rate changes."""
    steps = set(range(recipe.keep_rate_warmup + 1))  # where either may change
    for key in KINDS:
        steps |= set(itertools.accumulate(count for _, count in parse_schedule(key, getattr(recipe, key))))
    found: list[tuple[int, int, float]] = []
    for step in sorted(step for step in steps if step < recipe.steps):
        shape = image_size(recipe, step), 1.0 if recipe.task == "mae" else keep_rate(recipe, step)
        if not found or found[-1][1:] != shape:
            found.append((step, *shape))
    ends = [*(first for first, *_ in found[1:]), recipe.steps]
    return [Shape(size, rate, first, end - first) for (first, size, rate), end in zip(found, ends, strict=True)]


@lru_cache
def parse_schedule(key: str, text: str) -> tuple[tuple[float, int], ...]:
    """The (value, steps) pairs of a schedule such as "112:1000,160:500", in order; none of an empty one.

    Raises:
        TrainError: it is not written so, a value is out of its range, or it is given no step.
    """
    kind = KINDS[key]
    example = "112:1000,160:500" if kind is int else "1:1000,0.85:500"
    pairs: list[tuple[float, int]] = []
    for part in text.split(",") if text else []:
        value, _, steps = part.partition(":")
        try:
            pairs.append((kind(value), int(steps)))
        except ValueError:
            raise TrainError(f"{key} is {text!r} and must be pairs of value and steps, such as {example}") from None
    for number, times in pairs:
        if not (number >= 1 if kind is int else 0 < number <= 1):
            needed = "at least 1" if kind is int else "more than 0 and at most 1"
            raise TrainError(f"{key} is {text!r}, where {number:g} must be {needed}")
        if times < 1:
            raise TrainError(f"{key} is {text!r}, where {number:g} has {times} steps and must have at least 1")
    return tuple(pairs)


def check(recipe: Recipe) -> None:
    """Check the schedules of a recipe against its other keys.

    Raises:
        TrainError: a schedule is wrong in itself, never comes to its end, or contradicts another key.
    """
    for key in KINDS:
        total = sum(steps for _, steps in parse_schedule(key, getattr(recipe, key)))
        last = key.removesuffix("_schedule")
        if total >= recipe.steps:
            raise TrainError(
                f"{key} takes {total} steps and must take fewer than the run's {recipe.steps}, the last of which are "
                f"at {last} {getattr(recipe, last)}"
            )
    if recipe.keep_rate_schedule and recipe.task == "mae":
        raise TrainError("keep_rate_schedule must be empty for mae, which drops no tokens that it has not masked")
    if recipe.keep_rate_schedule and recipe.keep_rate_warmup:
        raise TrainError(
            f"keep_rate_schedule and keep_rate_warmup {recipe.keep_rate_warmup} are two ways of the same rate: set "
            "keep_rate_warmup=0 or leave the schedule empty"
        )


def check_image_sizes(recipe: Recipe, patch_size: int) -> None:
    """Check that every image size of a run is made of whole patches.

    Raises:
        TrainError: one is not.
    """
    for size in image_sizes(recipe):
        if size % patch_size:
            name = "image_size" if size == recipe.image_size else "a size of image_size_schedule"
            raise TrainError(
                f"{name} is {size} and must be a multiple of {patch_size}, the patch size of {recipe.model}"
            )


def _value(schedule: tuple[tuple[float, int], ...], step: int, last: float) -> float:
    """The value whose turn it is at a step, `last` when all others have had theirs."""
    for value, steps in schedule:
        if step < steps:
            return value
        step -= steps
    return last
