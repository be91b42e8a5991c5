"""The dry run: its numbers are those of the models, steps and shards of a run, and it says what it lacks."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_ranks import TAG_ROWS, batch_of, task_of

from xray import data, models
from xray.train import TrainError, activations, plan, tasks
from xray.train.distributed import World
from xray.train.recipes import RECIPES, Recipe

ALONE = World(0, 1, torch.device("cpu"))


def recipe_of(name: str, **changes: Any) -> Recipe:
    return replace(RECIPES[name](), **changes)


@pytest.mark.parametrize("name", ["mae_tiny", "tags_tiny", "clip_tiny"])
def test_counts_are_the_models(name: str) -> None:
    recipe = recipe_of(name)
    found = plan.plan_of(recipe, 2)
    model = task_of(recipe.task, ALONE).model
    words = {"tags": 4, "clip": model.config.text.vocab_size if isinstance(model, models.Clip) else 0}
    change = recipe.model and {"tags": "head", "clip": "text"}.get(recipe.task)
    exact = {part: number for part, number in found.parameters.items() if part != change}
    config = tasks.model_config(recipe, words.get(recipe.task, 0))
    assert exact == {part: number for part, number in models.model_cost(config).parts.items() if part != change}
    whole = sum(unit.count * unit.whole_bytes for unit in found.units)
    assert whole == 4 * sum(found.parameters.values())
    assert found.checkpoint_bytes == 3 * whole
    assert found.samples_seen == recipe.steps * recipe.batch_size
    assert found.samples_a_step == recipe.batch_size // 2


def test_stages_follow_the_schedules() -> None:
    recipe = recipe_of(
        "tags_tiny",
        steps=100,
        image_size_schedule="16:30",
        keep_rate_warmup=0,
        keep_rate_schedule="1:50",
        clip_fraction=0.25,
    )
    found = [(s.first_step, s.last_step, s.frames, s.image_size, s.keep_rate) for s in plan.plan_of(recipe).stages]
    assert found == [
        (1, 30, 1, 16, 1.0),
        (1, 30, 4, 16, 1.0),
        (31, 50, 1, 32, 1.0),
        (31, 50, 4, 32, 1.0),
        (51, 100, 1, 32, 0.7),
        (51, 100, 4, 32, 0.7),
    ]
    stages = plan.plan_of(recipe).stages
    assert stages[-2].tokens == (17, 14, 12)  # 16 patches: 12 and a fused one, 10 and a fused one
    assert stages[0].tokens == (5,)
    assert stages[-1].tokens == (65, 47, 35)
    assert sum(stage.share for stage in stages[:2]) == 1


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, 3),
        ({"activation_checkpointing": "selective"}, 3),
        ({"activation_checkpointing": "full"}, 4),
        ({"chunk_size": 8}, 4),
        ({"chunk_size": 16}, 3),
        ({"chunk_size": 8, "activation_checkpointing": "full"}, 5),
    ],
)
def test_recomputation_costs_a_forward_pass(changes: dict[str, Any], times: int) -> None:
    for stage in plan.plan_of(recipe_of("clip_tiny", **changes), 2).stages:
        assert stage.step_flops == times * stage.forward_flops


def held_bytes(run: Callable[[], Any]) -> int:
    """What `run` leaves allocated while its result lives, by the account of PyTorch's CPU allocator."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    results: Any = profiler.profiler
    held = sum(event.nbytes() for event in results.kineto_results.events() if event.name() == "[memory]")
    del result
    return held


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(("name", "rate"), [("mae", None), ("tags", 1.0), ("tags", 0.6), ("clip", 0.6)])
def test_activations_are_estimated_within_a_quarter(name: str, rate: float | None, checkpointing: str) -> None:
    changes: dict[str, Any] = {
        "activation_checkpointing": checkpointing,
        "precision": "float32",
        "clip_fraction": 0.0,
        "keep_rate": rate or 1.0,
        "keep_rate_warmup": 0,
        "model": "demo",
        "image_size": 64,
        "vocab_size": 300,
    }
    recipe, count = recipe_of(f"{name}_tiny", **changes), len(TAG_ROWS)
    task = task_of(name, ALONE, **changes)
    batch = batch_of(TAG_ROWS)
    batch.pixels = torch.randn(count, 3, 64, 64)
    inputs = task.inputs(batch, 1)
    if name == "clip":  # captions as long as they may be
        inputs["token_ids"] = torch.randint(0, 256, (count, recipe.context_length))
        inputs["lengths"] = torch.full((count,), recipe.context_length)
    actual = held_bytes(lambda: task(rate, **inputs))
    (stage,) = plan.plan_of(recipe).stages
    estimate = count * stage.activation_bytes - inputs["pixels"].nbytes  # pixels were there before
    if checkpointing != "none":  # the backward pass has not begun to compute a block again
        config = tasks.model_config(recipe, 300)
        cost = models.model_cost(config, keep_rate=rate, image_size=64)
        estimate -= count * max(activations.block_bytes(b, "none", 4) for b in activations.blocks_of(config, cost))
    assert 0.75 * actual < estimate < 1.25 * actual


def test_shards_and_state_are_a_ranks_part() -> None:
    one, four, pairs = (plan.plan_of(recipe_of("mae_tiny", shard_size=s), n) for s, n in ((0, 1), (0, 4), (2, 4)))
    assert (one.mesh, four.mesh, pairs.mesh) == ((1,), (4,), (2, 2))
    assert one.memory.parameters == sum(one.parameters.values()) * 4
    assert one.memory.parameters / 4 <= four.memory.parameters < one.memory.parameters / 3
    assert one.memory.parameters / 2 <= pairs.memory.parameters < one.memory.parameters / 1.8
    assert four.memory.optimizer == 2 * four.memory.parameters == 2 * four.memory.gradients
    assert plan.plan_of(recipe_of("mae_tiny", optimizer="lion"), 4).memory.optimizer == four.memory.parameters
    assert (one.memory.gathered, four.memory.gathered > 0) == (0, True)
    chunked = plan.plan_of(recipe_of("clip_tiny", chunk_size=4), 4).memory
    assert chunked.gradients > 3 * chunked.parameters  # whole until the last chunk
    assert chunked.activations * 2 == plan.plan_of(recipe_of("clip_tiny", chunk_size=8), 4).memory.activations
    ring, gather = (plan.plan_of(recipe_of("clip_tiny", exchange=way), 8).memory.loss for way in ("ring", "all_gather"))
    assert ring < gather


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"shard_size": 3}, 4, "shard_size is 3 .* processes, which is 4"),
        ({}, 5, "batch_size is 32 .* the 5 processes"),
        ({"model": "timy"}, 1, "did you mean tiny"),
        ({"tags_file": "/nowhere"}, 1, "tags_file is /nowhere"),
    ],
)
def test_what_a_run_refuses_a_plan_refuses(changes: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        plan.describe(recipe_of("tags_tiny", **changes), size)


def test_data_are_looked_at_where_they_are_there(tmp_path: Path) -> None:
    root = data.generated(tmp_path / "shapes", 60, image_size=32, num_frames=2)
    recipe = recipe_of("tags_tiny", data=str(root), steps=10)
    found = plan.plan_of(recipe)
    held = len(data.Dataset(root, "train", min_tags=1))
    assert found.data_samples == held
    assert f"{320 / held:,.1f}" in plan.describe(recipe)
    assert found.parameters["head"] > 33
    assert found.unknown == ()
    stream = replace(recipe, stream=True, readers=1)
    assert plan.plan_of(stream, 1).shards == len(list(root.glob("*.tar")))
    missing = plan.plan_of(replace(recipe, data=str(tmp_path / "nowhere")))
    assert missing.data_samples is None
    assert any("nowhere" in reason for reason in missing.unknown)
    assert any("tags" in reason for reason in missing.unknown)


def test_tags_file_counts_the_head(tmp_path: Path) -> None:
    file = tmp_path / "tags.json"
    file.write_text(json.dumps([f"tag {number}" for number in range(1000)]))
    recipe = recipe_of("tags_tiny", tags_file=str(file))
    assert plan.plan_of(recipe).parameters["head"] == 33 * 1000


def test_the_largest_recipe_is_described_without_its_weights_and_data() -> None:
    text = plan.describe(recipe_of("clip_2b", stream=True, shard_size=8), 64)
    assert "64 processes" in text
    assert re.search(r"vision +2\.016 B", text)
    assert "8 copies, each of 8 shards" in text
    assert "257 > 182 > 129 > 92" in text
    assert "data is empty" in text
    assert max(map(len, text.splitlines())) <= 120
    assert not [line for line in text.splitlines() if line != line.rstrip()]
