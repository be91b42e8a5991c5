"""Recipes and their settings, the schedules, the optimizer's groups, and what each task makes of a batch."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from xray import data, train
from xray.train import tasks
from xray.train.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_describes_a_model(name: str) -> None:
    recipe = RECIPES[name]()
    assert recipe.name == name
    train.validate(replace(recipe, data="somewhere"))
    learned = {"tags": '["a", "b"]', "tokenizer": data.Tokenizer.train(["a red circle"], 300).to_json()}
    with torch.device("meta"):
        task = tasks.build(recipe, learned)
    config: Any = task.model.config
    assert len(task.blocks()) >= config.vision.depth


def test_recipe_for_real_data_needs_data() -> None:
    with pytest.raises(train.TrainError, match="clip_b16 needs data=FOLDER"):
        train.validate(RECIPES["clip_b16"]())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stpes=3"], "a recipe has no key 'stpes'; did you mean steps?"),
        (["task=mae"], "a recipe has no key 'task'"),
        (["steps"], "'steps' is not a setting: write key=value, such as steps=100"),
        (["steps=1.5"], "steps is '1.5' and must be a whole number"),
        (["learning_rate=fast"], "learning_rate is 'fast' and must be a number"),
        (["compile=maybe"], "compile is 'maybe' and must be true or false"),
        (["betas=0.9"], "betas is '0.9' and must be two numbers such as 0.9,0.95"),
    ],
)
def test_settings_that_cannot_be_read(words: list[str], message: str) -> None:
    with pytest.raises(train.TrainError) as caught:
        train.parse_overrides(RECIPES["clip_tiny"](), words)
    assert str(caught.value).startswith(message)


def test_settings_are_converted() -> None:
    words = ["steps=7", "learning_rate=1e-2", "compile=true", "betas=0.8,0.9", "out=a=b", "progress=off"]
    recipe = train.parse_overrides(RECIPES["clip_tiny"](), words)
    assert (recipe.steps, recipe.learning_rate, recipe.compile, recipe.progress) == (7, 1e-2, True, False)
    assert (recipe.betas, recipe.out) == ((0.8, 0.9), "a=b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0 and must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0 and must be at least 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan and must be at least 0"),
        ({"weight_decay": math.inf}, "weight_decay is inf and must be at least 0"),
        ({"clip_fraction": 1.5}, "clip_fraction is 1.5 and must be from 0 to 1"),
        ({"keep_rate": 0.0}, "keep_rate is 0 and must be more than 0"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1 and must be less than 1"),
        ({"betas": (0.9, 1.0)}, "betas are (0.9, 1.0) and must both be at least 0 and less than 1"),
        ({"seed": -1}, "seed is -1 and must be at least 0"),
        ({"precision": "float16"}, "precision is 'float16' and must be one of auto, float32, bfloat16"),
        ({"clip_fraction": 0.5, "task": "mae"}, "clip_fraction is 0.5 and must be 0 for mae"),
    ],
)
def test_values_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(train.TrainError) as caught:
        train.run(replace(RECIPES["tags_tiny"](), **change))
    assert str(caught.value).startswith(message)


def test_some_texts_become_one_tag() -> None:
    texts, tags = ["a red heart"] * 1000 + ["nothing"], [["heart", "love", "red"]] * 1000 + [[]]
    draws = tasks.uniform_rows(5, 0, len(texts), 2)
    made = tasks.shortened(texts, tags, 0.25, draws)
    counts = Counter(made)
    assert counts.keys() == {"a red heart", "nothing", "heart", "love", "red"}
    assert all(50 < counts[tag] < 120 for tag in tags[0])
    assert tasks.shortened(texts, tags, 0.0, draws) == texts
    assert tasks.shortened(texts, tags, 1.0, draws)[-1] == "nothing"


def test_logit_scale_stays_at_most_100() -> None:
    tokenizer = data.Tokenizer.train(["a red circle"], 300).to_json()
    task = tasks.build(RECIPES["clip_tiny"](), {"tokenizer": tokenizer})
    assert isinstance(task, tasks.ClipTask)
    torch.nn.init.constant_(task.model.logit_scale, 7.0)
    task.settle()
    assert task.model.logit_scale.detach().exp().item() == pytest.approx(100)
    torch.nn.init.constant_(task.model.logit_scale, 2.0)
    task.settle()
    assert task.model.logit_scale.detach().item() == 2.0


def batch_of(tags: list[list[str]]) -> data.Batch:
    count = len(tags)
    return data.Batch(torch.randn(count, 3, 32, 32), ["x"] * count, tags, [""] * count, ["i"] * count)


def test_tags_become_rows_of_numbers() -> None:
    task = tasks.TagTask(RECIPES["tags_tiny"](), ["red", "blue", "ring"])
    inputs = task.inputs(batch_of([["ring", "red", "ring"], [], ["green"], ["blue"]]), seed=0)
    assert inputs["tags"].tolist() == [0, 2, 1]
    assert inputs["offsets"].tolist() == [0, 2, 2, 2, 3]


def test_top1_counts_samples_with_tags_only(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.TagTask(RECIPES["tags_tiny"](), ["a", "b", "c"])
    torch.nn.init.zeros_(task.model.head.weight)
    task.model.head.bias.data = torch.tensor([0.0, 1.0, 0.0])  # always guesses b
    inputs = task.inputs(batch_of([["a", "b"], [], ["c"], ["b"], ["a"]]), seed=0)
    _, values = task(1.0, **inputs)
    assert float(values["top1"]) == pytest.approx(2 / 4)
    monkeypatch.setattr(tasks, "MOST_LOGITS", 8)  # every second sample only
    inputs = task.inputs(batch_of([["a", "b"], [], ["c"], ["b"], ["a"]]), seed=0)
    _, values = task(1.0, **inputs)
    assert float(values["top1"]) == pytest.approx(1 / 3)


def test_tags_are_added_to_captions_unless_said() -> None:
    pairs = [("Red heart", ["RED", "heart", "love", "card", "gift"]), ("", ["love"]), ("a ring", [])]
    assert data.with_tags(pairs, 2) == ["Red heart, love, card", "love", "a ring"]
    assert data.with_tags(pairs, 0) == ["Red heart", "", "a ring"]
