"""Recipes and their settings, the schedules, the optimizer's groups, and what each task makes of a batch."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from xray import data, models, train
from xray.train import schedule, tasks
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


def test_learning_rate_warms_up_and_falls_to_nothing() -> None:
    recipe = replace(RECIPES["mae_tiny"](), steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [schedule.learning_rate(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert schedule.learning_rate(replace(recipe, warmup_steps=0), 0) == 1.0


def test_keep_rate_falls_through_few_values() -> None:
    recipe = replace(RECIPES["tags_tiny"](), keep_rate=0.5, keep_rate_warmup=200, keep_rate_buckets=5)
    rates = [schedule.keep_rate(recipe, step) for step in range(300)]
    assert rates[0] == 1.0
    assert set(rates[200:]) == {0.5}
    assert rates == sorted(rates, reverse=True)
    assert sorted(set(rates)) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert schedule.keep_rate(replace(recipe, keep_rate_warmup=0), 0) == 0.5


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

    recipe = replace(RECIPES["clip_tiny"](), keep_rate=0.7, keep_rate_warmup=1000)
    walked = {schedule.keep_rate(recipe, step) for step in range(1200)}
    assert walked == set(schedule.keep_rates(recipe))
    assert shapes(walked) == (4, 10)
    paths, counts = shapes(official_keep_rate(i, 30_000) for i in range(30_000))
    assert paths > 140
    assert counts > 120
    for name, make in RECIPES.items():
        own = make()
        size = replace(models.SIZES[own.model], image_size=own.image_size, num_frames=own.num_frames)
        lengths = {
            tokens
            for rate in schedule.keep_rates(own)
            for tokens in models.encoder_cost(size, keep_rate=rate, num_frames=1).block_tokens
        }
        assert len(lengths) <= 12, name


def test_only_weights_of_layers_decay() -> None:
    recipe = replace(RECIPES["clip_tiny"](), weight_decay=0.3)
    tokenizer = data.Tokenizer.train(["a red circle"], 300).to_json()
    task = tasks.build(recipe, {"tokenizer": tokenizer})
    groups = schedule.optimizer(recipe, task).param_groups
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    decayed, free = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert sorted(decayed + free) == sorted(names.values())
    assert all(name.endswith("weight") for name in decayed)
    assert not [name for name in decayed if "norm" in name or "embed" in name.replace("patch_embed", "")]
    assert {"model.logit_scale", "model.vision.cls_token", "model.text.token_embedding.weight"} <= set(free)
    assert "model.vision.blocks.0.mlp.fc1.weight" in decayed


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
    assert tasks.with_tags(pairs, 2) == ["Red heart, love, card", "love", "a ring"]
    assert tasks.with_tags(pairs, 0) == ["Red heart", "", "a ring"]
