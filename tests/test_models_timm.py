"""Weights of timm's VisionTransformer in our encoder: the same outputs, or a clear refusal."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from oracles import import_oracle
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
