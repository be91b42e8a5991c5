"""Schedules: learning rate, image size and keep rate by step, what is refused, and a run that stops halfway."""

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from xray import data, models, train
from xray.train import prepare, schedule, sources, tasks
from xray.train.recipes import RECIPES, Recipe


def recipe_of(name: str = "tags_tiny", **changes: Any) -> Recipe:
    return replace(RECIPES[name](), **changes)


def progressive(name: str, patch: int) -> Recipe:
    """A recipe with three sizes and three keep rates, whose changes do not coincide."""
    sizes = f"{7 * patch}:60000,{10 * patch}:40000"
    rates = {} if name.startswith("mae") else {"keep_rate_schedule": "1:50000,0.85:70000", "keep_rate_warmup": 0}
    return recipe_of(name, image_size_schedule=sizes, data="shards", **rates)


LARGE = [name for name, make in RECIPES.items() if make().image_size == 224]
PROGRESSIVE = {name: progressive(name, models.SIZES[RECIPES[name]().model].patch_size) for name in LARGE}


# Values by step


def test_learning_rate_warms_up_and_falls_to_nothing() -> None:
    recipe = recipe_of("mae_tiny", steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [schedule.learning_rate(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert schedule.learning_rate(replace(recipe, warmup_steps=0), 0) == 1.0


def test_each_group_gets_its_part_of_the_learning_rate() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": [weight], "lr_scale": scale} for weight, scale in zip(weights, (1.0, 0.25), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for rate in (0.1, 0.2):  # the second does not build on the first
        schedule.set_learning_rate(optimizer, rate)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, 0.25 * rate]


def test_keep_rate_falls_through_few_values() -> None:
    recipe = recipe_of(keep_rate=0.5, keep_rate_warmup=200, keep_rate_buckets=5)
    rates = [schedule.keep_rate(recipe, step) for step in range(300)]
    assert rates[0] == 1.0
    assert set(rates[200:]) == {0.5}
    assert rates == sorted(rates, reverse=True)
    assert sorted(set(rates)) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert schedule.keep_rate(replace(recipe, keep_rate_warmup=0), 0) == 0.5


def test_sizes_and_keep_rates_take_their_turns() -> None:
    recipe = recipe_of(
        steps=10,
        image_size=32,
        image_size_schedule="16:3,24:2",
        keep_rate=0.7,
        keep_rate_warmup=0,
        keep_rate_schedule="0.5:4,1:2",
    )
    train.validate(recipe)
    assert [schedule.image_size(recipe, step) for step in range(10)] == [16] * 3 + [24] * 2 + [32] * 5
    assert [schedule.keep_rate(recipe, step) for step in range(10)] == [0.5] * 4 + [1.0] * 2 + [0.7] * 4
    assert schedule.image_sizes(recipe) == [16, 24, 32]
    assert schedule.shapes(recipe) == [
        schedule.Shape(16, 0.5, 0, 3),
        schedule.Shape(24, 0.5, 3, 1),
        schedule.Shape(24, 1.0, 4, 1),
        schedule.Shape(32, 1.0, 5, 1),
        schedule.Shape(32, 0.7, 6, 4),
    ]


@pytest.mark.parametrize(
    "recipe", [*(make() for make in RECIPES.values()), *PROGRESSIVE.values()], ids=lambda recipe: recipe.name
)
def test_shapes_are_the_walk_through_all_steps(recipe: Recipe) -> None:
    recipe = replace(recipe, data="shards")
    train.validate(recipe)
    shapes = schedule.shapes(recipe)
    assert [shape.first_step for shape in shapes] == [0, *itertools.accumulate(shape.steps for shape in shapes)][:-1]
    assert sum(shape.steps for shape in shapes) == recipe.steps
    for shape, following in itertools.zip_longest(shapes, shapes[1:]):
        assert shape.steps > 0
        assert following is None or shape[:2] != following[:2]
        for step in (shape.first_step, shape.first_step + shape.steps // 2, shape.first_step + shape.steps - 1):
            assert schedule.image_size(recipe, step) == shape.image_size
            assert (1.0 if recipe.task == "mae" else schedule.keep_rate(recipe, step)) == shape.keep_rate


def test_a_run_that_ends_within_its_warmup_has_the_shapes_up_to_there() -> None:
    assert [shape[1:] for shape in schedule.shapes(recipe_of(steps=1))] == [(1.0, 0, 1)]
    whole = schedule.shapes(recipe_of(steps=100, keep_rate_warmup=80))
    part = schedule.shapes(recipe_of(steps=50, keep_rate_warmup=80))
    assert part[:-1] == whole[: len(part) - 1]
    assert part[-1].first_step == whole[len(part) - 1].first_step
    assert sum(shape.steps for shape in part) == 50


def test_mae_drops_no_tokens() -> None:
    assert schedule.shapes(recipe_of("mae_tiny", keep_rate=0.5, keep_rate_warmup=9)) == [(32, 1.0, 0, 100)]


# Few shapes


def official_keep_rate(iteration: int, iterations: int) -> float:
    """EViT's schedule in DeiT's 300 epochs: 1 until epoch 10, then a cosine down to 0.7 until epoch 100."""
    epoch = 300 * iteration / iterations
    return 0.7 + 0.3 * 0.5 * (1 + math.cos(math.pi * min(max(epoch - 10, 0) / 90, 1)))


def test_keep_rate_schedule_needs_few_shapes() -> None:
    config = models.SIZES["s16"]

    def shapes(rates: Iterable[float]) -> tuple[int, int]:
        """Combinations of token counts through the encoder, and different token counts."""
        paths = {(*(cost := models.encoder_cost(config, keep_rate=r)).block_tokens, *cost.kept_tokens) for r in rates}
        return len(paths), len({tokens for path in paths for tokens in path[: config.depth]})

    recipe = recipe_of("clip_tiny", keep_rate=0.7, keep_rate_warmup=1000, steps=2000)
    assert shapes({shape.keep_rate for shape in schedule.shapes(recipe)}) == (4, 10)
    paths, counts = shapes(official_keep_rate(i, 30_000) for i in range(30_000))
    assert paths > 140
    assert counts > 120


def block_shapes(recipe: Recipe) -> set[tuple[int, int | None]]:
    """(tokens, tokens to keep) that the blocks of a run's image encoder meet, of images and of clips."""
    config = replace(models.SIZES[recipe.model], num_frames=recipe.num_frames)
    met: set[tuple[int, int | None]] = set()
    for shape in schedule.shapes(recipe):
        for frames in (1,) if recipe.task == "mae" else (1, recipe.num_frames):
            size, rate = shape.image_size, shape.keep_rate
            cost = models.encoder_cost(config, keep_rate=rate, num_frames=frames, image_size=size)
            kept = iter(cost.kept_tokens)
            met |= {
                (tokens, next(kept) if rate < 1 and block in config.evit_blocks else None)
                for block, tokens in enumerate(cost.block_tokens)
            }
    return met


def test_shapes_of_every_recipe_are_few() -> None:
    """A dense encoder has one shape, one that prunes at three blocks seven; four keep rates share the first."""
    for name, make in RECIPES.items():
        assert len(block_shapes(make())) <= 2 * (1 + 3 * 6 + 1), name
    assert len(PROGRESSIVE) == 12
    for name, recipe in PROGRESSIVE.items():
        assert len(schedule.shapes(recipe)) == (3 if recipe.task == "mae" else 5)
        assert len(block_shapes(recipe)) <= 2 * 4 * 7 < prepare.MOST_GRAPHS, name


# Refusals


def check(recipe: Recipe) -> None:
    """What a run checks of its schedules before it makes anything."""
    train.validate(recipe)
    tasks.vision_config(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_size_schedule": "16"},
            "image_size_schedule is '16' and must be pairs of value and steps, such as 112",
        ),
        ({"image_size_schedule": "16.5:3"}, "image_size_schedule is '16.5:3' and must be pairs"),
        ({"image_size_schedule": "16:3,"}, "image_size_schedule is '16:3,' and must be pairs"),
        ({"image_size_schedule": "16:3:2"}, "image_size_schedule is '16:3:2' and must be pairs"),
        ({"image_size_schedule": "16:many"}, "image_size_schedule is '16:many' and must be pairs"),
        ({"image_size_schedule": "0:3"}, "image_size_schedule is '0:3', where 0 must be at least 1"),
        ({"image_size_schedule": "16:0"}, "image_size_schedule is '16:0', where 16 has 0 steps and must have at least"),
        ({"image_size_schedule": "16:60,24:40"}, "image_size_schedule takes 100 steps and must take fewer than the"),
        ({"keep_rate_schedule": "high:3"}, "keep_rate_schedule is 'high:3' and must be pairs of value and steps, such"),
        ({"keep_rate_schedule": "0:3"}, "keep_rate_schedule is '0:3', where 0 must be more than 0 and at most 1"),
        ({"keep_rate_schedule": "1.5:3"}, "keep_rate_schedule is '1.5:3', where 1.5 must be more than 0 and at most 1"),
        ({"keep_rate_schedule": "nan:3"}, "keep_rate_schedule is 'nan:3', where nan must be more than 0 and at most 1"),
        ({"keep_rate_schedule": "0.5:3,1:-1"}, "keep_rate_schedule is '0.5:3,1:-1', where 1 has -1 steps and must"),
        ({"keep_rate_schedule": "1:100"}, "keep_rate_schedule takes 100 steps and must take fewer than the run's 100"),
        ({"keep_rate_schedule": "1:9", "task": "mae"}, "keep_rate_schedule must be empty for mae"),
        (
            {"keep_rate_schedule": "1:9", "keep_rate_warmup": 5},
            "keep_rate_schedule and keep_rate_warmup 5 are two ways",
        ),
        ({"image_size_schedule": "20:3"}, "a size of image_size_schedule is 20 and must be a multiple of 8, the patch"),
        ({"image_size": 36}, "image_size is 36 and must be a multiple of 8, the patch size of tiny"),
    ],
)
def test_schedules_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    recipe = recipe_of(**{"keep_rate_warmup": 0, "clip_fraction": 0.0, "steps": 100, **changes})
    with pytest.raises(train.TrainError) as caught:
        check(recipe)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# A run


@pytest.fixture(scope="module")
def shapes_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.generated(tmp_path_factory.mktemp("data") / "shapes", 60, image_size=32, num_frames=4)


def test_the_loader_takes_the_size_of_the_step(shapes_set: Path) -> None:
    recipe = recipe_of(steps=9, image_size_schedule="16:2,24:1,16:2", keep_rate_warmup=0)
    transform = sources.train_transform(recipe)
    dataset = data.Dataset(shapes_set, "train")

    def sides(start: int, workers: int = 0) -> list[int]:
        batches = data.loader(dataset, 4, transform, start_step=start, num_workers=workers, clip_fraction=0.5)
        return [batch.pixels.shape[-1] for batch in itertools.islice(batches, 7 - start)]

    assert sides(0) == sides(0, workers=2) == [16, 16, 24, 16, 16, 32, 32]
    assert sides(3) == [16, 16, 32, 32]
    assert sources.train_transform(recipe_of()) == data.transforms.train(32, 4)


def test_a_stream_takes_the_size_of_the_step(shapes_set: Path) -> None:
    transform = sources.train_transform(recipe_of(steps=9, image_size_schedule="16:2", keep_rate_warmup=0))
    stream = data.Stream([str(shapes_set)], readers=1, seed=0)
    batches = data.stream_loader(stream, 4, transform)
    assert [batch.pixels.shape[-1] for batch in itertools.islice(batches, 4)] == [16, 16, 32, 32]


@pytest.mark.parametrize("stages", [(), (1, "a"), (0, "a", 3, "b", 2, "c"), (0, "a", 0, "b")])
def test_transforms_that_do_not_take_turns(stages: tuple[Any, ...]) -> None:
    with pytest.raises(data.DataError, match="0 and then increasing steps are needed"):
        data.transforms.Scheduled(tuple(zip(stages[::2], stages[1::2], strict=True)))


def test_a_resumed_run_stands_at_the_right_stage(shapes_set: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        steps=10,
        batch_size=8,
        image_size_schedule="16:4,24:4",
        keep_rate_schedule="1:3,0.85:3",
        keep_rate_warmup=0,
        data=str(shapes_set),
        out=str(tmp_path / "whole"),
        checkpoint_every=6,
        tensorboard=False,
        progress=False,
    )
    whole = train.run(recipe)
    # A kill after the sixth step, in the second size and at the end of the second keep rate, leaves just this.
    halfway = whole / "checkpoints" / "step-6"
    again = train.run(replace(recipe, out=str(tmp_path / "again"), resume=str(halfway)))
    one, two = (load_file(run / "model.safetensors") for run in (whole, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, again)]
    assert [line["keep_rate"] for line in lines[0]] == [1.0] * 3 + [0.85] * 3 + [0.7] * 4
    assert [line["loss"] for line in lines[1]] == [line["loss"] for line in lines[0][6:]]
