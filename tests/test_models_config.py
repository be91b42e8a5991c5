"""Configurations; every wrong input to a model; the cost of importing the models."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from xray import models

TINY = models.SIZES["tiny"]
TEXT = models.TextConfig(vocab_size=50, context_length=12, width=32, depth=2, heads=2)
CLIP = models.ClipConfig(TINY, TEXT, embed_dim=24)
MAE = models.MaeConfig(TINY, decoder_width=32, decoder_depth=2, decoder_heads=2)


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (images(3, 32, 32), ValueError, r"\(B, 3, H, W\) or \(B, 3, T, H, W\), got shape \(3, 32, 32\)"),
        (images(1, 4, 32, 32), ValueError, r"3 channels.*\(1, 4, 32, 32\)"),
        (
            images(1, 3, 36, 36),
            ValueError,
            r"multiple of patch_size 8, such as this model's own image_size 32, got shape \(1, 3, 36, 36\)",
        ),
        (images(1, 3, 32, 40), ValueError, r"pixels must be square .*\(1, 3, 32, 40\)"),
        (images(1, 3, 0, 0), ValueError, r"multiple of patch_size 8.*\(1, 3, 0, 0\)"),
        (images(1, 3, 3, 32, 32), ValueError, r"1 to 2 frames.*\(1, 3, 3, 32, 32\)"),
        (images(1, 3, 0, 32, 32), ValueError, "1 to 2 frames"),
        (images(1, 3, 32, 32, dtype=torch.uint8), TypeError, "floating point.*torch.uint8"),
        ([[0.0]], TypeError, "pixels must be a tensor, got list"),
    ],
)
def test_wrong_pixels(pixels: Any, error: type[Exception], message: str) -> None:
    config = dataclasses.replace(TINY, num_frames=2)
    for model in (
        models.VisionTransformer(config),
        models.MaskedAutoencoder(dataclasses.replace(MAE, vision=config)),
        models.TagClassifier(models.TagConfig(config, 3)),
    ):
        with pytest.raises(error, match=message) as caught:
            model(pixels)
        assert "\n" not in str(caught.value)


def test_mae_refuses_clips() -> None:
    model = models.MaskedAutoencoder(dataclasses.replace(MAE, vision=dataclasses.replace(TINY, num_frames=2)))
    with pytest.raises(ValueError, match="one frame"):
        model(images(1, 3, 2, 32, 32))


@pytest.mark.parametrize(
    ("rate", "error"), [(0.0, ValueError), (1.5, ValueError), (math.nan, ValueError), ("1", TypeError)]
)
def test_wrong_keep_rate(rate: Any, error: type[Exception]) -> None:
    encoder = models.VisionTransformer(TINY)
    for call in (
        lambda: encoder(images(1, 3, 32, 32), rate),
        lambda: models.encoder_cost(TINY, keep_rate=rate),
        lambda: dataclasses.replace(TINY, keep_rate=rate),
    ):
        with pytest.raises(error, match=r"keep_rate must .*\(0, 1\]"):
            call()


@pytest.mark.parametrize(
    ("ids", "lengths", "error", "message"),
    [
        (
            torch.zeros(2, 13, dtype=torch.long),
            [1, 1],
            ValueError,
            r"1 to 12 \(context_length\) columns, got \(2, 13\)",
        ),
        (torch.zeros(2, 0, dtype=torch.long), [1, 1], ValueError, "1 to 12"),
        (torch.zeros(4, dtype=torch.long), [1], ValueError, r"\(B, L\), got shape \(4,\)"),
        (torch.full((2, 4), 50), [1, 1], ValueError, r"0 to 49 \(vocab_size\), got 50"),
        (torch.full((2, 4), -1), [1, 1], ValueError, "0 to 49.*got -1"),
        (torch.zeros(2, 4), [1, 1], TypeError, "token_ids must be int64 or int32, got torch.float32"),
        ("a cat", [1, 1], TypeError, "token_ids must be a tensor, got str"),
        (torch.zeros(2, 4, dtype=torch.long), [1, 5], ValueError, "lengths must lie in 1 to 4, got 5"),
        (torch.zeros(2, 4, dtype=torch.long), [0, 4], ValueError, "lengths must lie in 1 to 4, got 0"),
        (torch.zeros(2, 4, dtype=torch.long), [1, 2, 3], ValueError, r"lengths must be \(2,\)"),
        (torch.zeros(2, 4, dtype=torch.long), [1.0, 2.0], TypeError, "lengths must be int64 or int32"),
    ],
)
def test_wrong_text(ids: Any, lengths: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        models.TextTransformer(TEXT)(ids, torch.tensor(lengths))


@pytest.mark.parametrize(
    ("config", "changes", "error", "message"),
    [
        (TINY, {"heads": 3}, ValueError, "width 32 must be divisible by heads 3"),
        (TINY, {"image_size": 33}, ValueError, "image_size must be a multiple of patch_size 8, got 33"),
        (TINY, {"width": 0}, ValueError, "VisionConfig.width must be at least 1, got 0"),
        (TINY, {"depth": 2.0}, TypeError, "VisionConfig.depth must be an int, got float"),
        (TINY, {"num_frames": True}, TypeError, "num_frames must be an int"),
        (TINY, {"num_registers": -1}, ValueError, "num_registers must be at least 0"),
        (TINY, {"mlp_ratio": -1}, ValueError, "mlp_ratio must be positive"),
        (TINY, {"reorganize_blocks": (1, 4)}, ValueError, r"from 0 to 3, got \[1, 4\]"),
        (TINY, {"reorganize_blocks": (2, 1)}, ValueError, "increasing"),
        (TINY, {"reorganize_blocks": 3}, TypeError, "must be a list of block numbers, got 3"),
        (TEXT, {"heads": 5}, ValueError, "width 32 must be divisible by heads 5"),
        (TEXT, {"vocab_size": 0}, ValueError, "TextConfig.vocab_size"),
        (CLIP, {"embed_dim": 0}, ValueError, "ClipConfig.embed_dim"),
        (CLIP, {"text": TINY}, TypeError, "ClipConfig.text must be a TextConfig, got VisionConfig"),
        (MAE, {"mask_ratio": 1.0}, ValueError, "mask_ratio 1.0"),
        (MAE, {"mask_ratio": 0.01}, ValueError, "mask_ratio 0.01"),
        (MAE, {"decoder_heads": 7}, ValueError, "decoder.*divisible by heads 7"),
        (models.TagConfig(TINY, 5), {"num_tags": 0}, ValueError, "TagConfig.num_tags"),
    ],
)
def test_wrong_config(config: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, reorganize_blocks=(1, 2)), TEXT, CLIP, MAE])
def test_config_survives_json(config: Any) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="has no field 'wdith'"):
        type(config).from_dict({**config.to_dict(), "wdith": 3})
    first = next(iter(config.to_dict()))
    with pytest.raises(ValueError, match=f"missing.*{first}"):
        type(config).from_dict({k: v for k, v in config.to_dict().items() if k != first})


@pytest.mark.parametrize("model", [models.VisionTransformer, models.Clip, models.TagClassifier, models.TextTransformer])
def test_model_needs_its_own_config(model: Any) -> None:
    with pytest.raises(TypeError, match=r"config must be a .*Config, got MaeConfig"):
        model(MAE)


def test_import_is_lean() -> None:
    heavy = "timm PIL open_clip torchvision transformers tokenizers pyarrow av webdataset matplotlib jinja2"
    code = f"import sys, xray.models; print(*[name for name in {heavy.split()} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
