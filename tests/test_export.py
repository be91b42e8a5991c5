"""A checkpoint's model as one file: the weights, the settings and the words that came with them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_checkpoint import ALONE, OPTIMIZERS, damage

from xray import data, models
from xray.train import Recipe, TrainError, checkpoint, tasks
from xray.train.checkpointer import Checkpointer
from xray.train.export import export, final_model
from xray.train.recipes import RECIPES


def clip() -> tuple[Recipe, dict[str, str]]:
    recipe = replace(RECIPES["clip_tiny"](), out="somewhere", keep_checkpoints=9, data_weights=(1.0, 2.0))
    texts = ["a red circle", "two blue squares", "the green star"]
    return recipe, {"tokenizer": data.Tokenizer.train(texts, 300).to_json()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2, and the model of the end, equal to that of step 2."""
    out = tmp_path_factory.mktemp("run")
    recipe, artifacts = clip()
    task = tasks.build(recipe, artifacts)
    optimizer = OPTIMIZERS["adamw"](task)
    with Checkpointer(out, recipe, artifacts, ALONE) as saver:
        for step in (1, 2):
            for parameter in task.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            saver.save(step, task, optimizer, {0: b"x"}, {})
    final_model(task, recipe, artifacts, ALONE, out / "model.safetensors")
    return out


def check_same(actual: Path, expected: Path) -> None:
    weights, wanted = load_file(actual), load_file(expected)
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in wanted.items())
    assert models.load(actual)[1] == models.load(expected)[1]


def test_what_is_exported_is_the_final_model(run: Path, tmp_path: Path) -> None:
    for source in (run, run / "checkpoints" / "step-2"):
        path = export(source, tmp_path / "model.safetensors")
        assert path == tmp_path / "model.safetensors"
        check_same(path, run / "model.safetensors")
    model, header = models.load(path)
    recipe, artifacts = clip()
    assert isinstance(model, models.Clip)
    assert header["tokenizer"] == artifacts["tokenizer"]
    settings = json.loads(header["recipe"])
    assert settings["data_weights"] == [1.0, 2.0]
    assert settings["steps"] == recipe.steps
    assert not settings.keys() & {"out", "init", "resume", "overwrite"}


def test_an_earlier_step(run: Path, tmp_path: Path) -> None:
    first = load_file(export(run, tmp_path / "a", step=1))
    second = load_file(export(run, tmp_path / "b", step=2))
    assert first.keys() == second.keys()
    assert not torch.equal(first["logit_scale"], second["logit_scale"])
    with pytest.raises(TrainError, match=f"step is 3 and {run} has checkpoints of steps 1, 2"):
        export(run, tmp_path / "c", step=3)
    with pytest.raises(TrainError, match="has no checkpoints"):
        export(tmp_path, tmp_path / "c", step=3)
    with pytest.raises(TrainError, match="neither a checkpoint nor a run that has one"):
        export(tmp_path, tmp_path / "c")


def test_damage(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = tmp_path / "run" / "checkpoints"
    copy.mkdir(parents=True)
    for path in checkpoint.complete(run):
        (copy / path.name).mkdir()
        for file in path.iterdir():
            (copy / path.name / file.name).write_bytes(file.read_bytes())
    damage(copy / "step-2")
    export(copy.parent, tmp_path / "newest")
    assert "going on from" in capsys.readouterr().err
    check_same(tmp_path / "newest", export(run, tmp_path / "first", step=1))
    with pytest.raises(TrainError, match="step-2 is damaged"):
        export(copy.parent, tmp_path / "second", step=2)
    with pytest.raises(models.CheckpointError, match="cannot write checkpoint"):
        export(run, tmp_path / "no" / "folder")


def test_weights_only_and_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's state is not read, and no weight is made before it is read."""
    read: list[str] = []
    load = checkpoint.load_tensors

    def look_and_load(path: Path, reader: Any, target: dict[str, torch.Tensor], no_dist: bool) -> None:
        read.extend(target)
        load(path, reader, target, no_dist)

    monkeypatch.setattr(checkpoint, "load_tensors", look_and_load)
    generator = torch.get_rng_state()
    export(run, tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), generator)
    assert read
    assert all(name.startswith("model.") for name in read)


def test_timm(run: Path, tmp_path: Path) -> None:
    """The image encoder alone, under timm's names, with the words that came with the model."""
    export(run, tmp_path / "timm.safetensors", timm=True)
    model, header = models.load(run / "model.safetensors")
    words = {key: header[key] for key in ("recipe", "tokenizer")}
    models.save_timm(model, tmp_path / "expected.safetensors", state_dict=None, **words)
    actual, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("timm", "expected"))
    assert actual.keys() == expected.keys()
    assert "pos_embed" in actual
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    headers = []
    for name in ("timm", "expected"):
        with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
            headers.append(file.metadata())
    assert headers[0] == headers[1]
