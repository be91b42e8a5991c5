"""Weights of timm's VisionTransformer in our encoder and ours in timm's: equal outputs, or a clear refusal."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import import_oracle
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from xray import models

TINY = models.SIZES["tiny"]


@pytest.fixture
def timm_vit() -> Any:
    vision_transformer = import_oracle("timm.models.vision_transformer")

    def build(**changes: Any) -> nn.Module:
        torch.manual_seed(1)
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 4,
            "num_heads": 2,
            "num_classes": 7,
        }
        model = vision_transformer.VisionTransformer(**{**sizes, **changes})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model.eval()

    return build


@pytest.mark.parametrize(
    ("registers", "no_embed_class", "image_size"),
    # The last has 4 patches and 5 prefix tokens: 9 positions that are not a grid of 3 x 3.
    [(0, False, 32), (0, True, 32), (4, True, 32), (4, False, 32), (4, False, 16)],
)
def test_outputs_equal_timm(timm_vit: Any, registers: int, no_embed_class: bool, image_size: int) -> None:
    theirs = timm_vit(reg_tokens=registers, no_embed_class=no_embed_class, img_size=image_size)
    config = dataclasses.replace(TINY, num_registers=registers, num_frames=2, image_size=image_size)
    ours = models.VisionTransformer(config)
    with torch.no_grad():
        ours.time_embed.normal_()
        models.load_timm(ours, theirs.state_dict())
        images = torch.randn(3, 3, image_size, image_size)
        torch.testing.assert_close(ours.encode(images).tokens, theirs.forward_features(images), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_timm_weights_of_another_size_are_interpolated(timm_vit: Any, registers: int) -> None:
    theirs = timm_vit(dynamic_img_size=True, reg_tokens=registers)
    ours = models.VisionTransformer(dataclasses.replace(TINY, image_size=56, num_registers=registers))
    models.load_timm(ours, theirs.state_dict())
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(images).tokens, theirs.forward_features(images), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_values": 0.1}, "unknown to the model.*ls1.gamma"),
        ({"depth": 3}, "lacks? 12 weights.*blocks.3"),
        ({"patch_size": 16}, "patch_embed.proj.weight.*shape"),
        ({"reg_tokens": 4}, "reg_token"),
        ({"class_token": False, "global_pool": "avg"}, "lack 'cls_token'"),
        ({"embed_dim": 64}, "cls_token.*shape"),
    ],
)
def test_timm_weights_that_do_not_fit_change_nothing(timm_vit: Any, changes: dict[str, Any], message: str) -> None:
    ours = models.VisionTransformer(TINY)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        models.load_timm(ours, timm_vit(**changes).state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def timm_of(path: Path) -> nn.Module:
    """What a user of timm builds from the file alone."""
    vision_transformer = import_oracle("timm.models.vision_transformer")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    norm = functools.partial(nn.LayerNorm, eps=float(header["layer_norm_eps"]))
    model = vision_transformer.VisionTransformer(**json.loads(header["timm_model"]), norm_layer=norm)
    model.load_state_dict(load_file(path), strict=True)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # An MLP whose width is no whole multiple, and an epsilon that shows.
        {"num_frames": 3, "num_registers": 3, "mlp_ratio": 6144 / 1408, "layer_norm_eps": 1e-2, "keep_rate": 0.5},
    ],
)
def test_timm_gives_the_features_of_an_exported_encoder(changes: dict[str, Any], tmp_path: Path) -> None:
    ours, path = shaken(models.VisionTransformer(dataclasses.replace(TINY, **changes))), tmp_path / "timm.safetensors"
    models.save_timm(ours, path, note="mine")
    theirs = timm_of(path)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tokens = ours.encode(images, keep_rate=1.0).tokens
        torch.testing.assert_close(theirs.forward_features(images), tokens, rtol=1e-5, atol=2e-5)  # type: ignore[operator]
        torch.testing.assert_close(theirs(images), tokens[:, 0], rtol=1e-5, atol=2e-5)
        back = models.VisionTransformer(ours.config)
        models.load_timm(back, theirs.state_dict())
        torch.testing.assert_close(back(images), ours(images), rtol=1e-5, atol=2e-5)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["note"] == "mine"
    with pytest.raises(models.CheckpointError, match="not written by xray"):
        models.load(path)


def test_every_model_with_an_encoder_exports_it_and_a_classifier_its_head(tmp_path: Path) -> None:
    text, path = models.TextConfig(50, 12, 32, 1, 2), tmp_path / "timm.safetensors"
    exported: list[Any] = [
        models.TagClassifier(models.TagConfig(TINY, 5)),
        models.MaskedAutoencoder(models.MaeConfig(TINY, 16, 1, 2)),
        models.Clip(models.ClipConfig(TINY, text, 24)),
    ]
    images = torch.randn(2, 3, 32, 32)
    for model in exported:
        shaken(model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        models.save_timm(model, path)
        output = model(images) if isinstance(model, models.TagClassifier) else models_encoder(model)(images)
        torch.testing.assert_close(timm_of(path)(images), output, rtol=1e-5, atol=2e-5)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    gathered = {name: tensor + 1 for name, tensor in exported[0].state_dict().items()}
    assert torch.equal(
        models.to_timm(exported[0], state_dict=gathered)["pos_embed"],
        gathered["encoder.pos_embed"] + gathered["encoder.time_embed"],
    )
    with pytest.raises(TypeError, match="must have an image encoder, got TextTransformer"):
        models.save_timm(models.TextTransformer(text), path)


def models_encoder(model: Any) -> models.VisionTransformer:
    return model.vision if isinstance(model, models.Clip) else model.encoder


def shaken(model: Any) -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
