"""Costs of whole models: parameters against the models themselves, operations against torch's own counter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from xray import models, ops
from xray.models.costs import num_kept

TINY = dataclasses.replace(models.SIZES["tiny"], num_registers=2, num_frames=3)
TEXT = models.TextConfig(vocab_size=50, context_length=12, width=48, depth=3, heads=2, mlp_ratio=3.0)


def configs(vision: models.VisionConfig) -> dict[str, models.Config]:
    return {
        "vision": vision,
        "text": TEXT,
        "clip": models.ClipConfig(vision, TEXT, embed_dim=24),
        "mae": models.MaeConfig(vision, decoder_width=16, decoder_depth=3, decoder_heads=2),
        "tags": models.TagConfig(vision, num_tags=7),
    }


def build(config: models.Config) -> nn.Module:
    kinds: dict[type, type[nn.Module]] = {
        models.VisionConfig: models.VisionTransformer,
        models.TextConfig: models.TextTransformer,
        models.ClipConfig: models.Clip,
        models.MaeConfig: models.MaskedAutoencoder,
        models.TagConfig: models.TagClassifier,
    }
    return kinds[type(config)](config)


def part_of(name: str, kind: str) -> str:
    """The part that a parameter belongs to, from its name."""
    if kind in ("vision", "text"):
        return kind
    first = name.split(".")[0]
    parts = {"encoder": "vision", "vision_projection": "projections", "text_projection": "projections"}
    return "decoder" if first.startswith(("decoder", "mask_token")) else parts.get(first, first)


@pytest.mark.parametrize("size", models.SIZES)
@pytest.mark.parametrize("registers", [0, 4])
def test_parameters_of_every_size_and_kind(size: str, registers: int) -> None:
    for kind, config in configs(dataclasses.replace(models.SIZES[size], num_registers=registers)).items():
        with torch.device("meta"):
            model = build(config)
        parts: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            parts[part_of(name, kind)] = parts.get(part_of(name, kind), 0) + parameter.numel()
        cost = models.model_cost(config)
        assert cost.parts == parts
        assert cost.parameters == sum(parts.values())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts matrix products of a call, attention written out as the two products that it is."""

    def attention_with_scores(
        query: Tensor, key: Tensor, value: Tensor, num_prefix_tokens: int
    ) -> tuple[Tensor, Tensor]:
        probabilities = (query @ key.mT).softmax(-1)
        return probabilities @ value, probabilities[:, :, 0, num_prefix_tokens:].mean(1)

    monkeypatch.setattr(ops, "attention", lambda q, k, v, **_: attention_with_scores(q, k, v, 1)[0])
    monkeypatch.setattr(ops, "attention_with_scores", attention_with_scores)

    def count(call: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return int(counter.get_total_flops())

    return count


@pytest.mark.parametrize(("frames", "size"), [(1, None), (3, None), (1, 48), (2, 16)])
def test_encoder_operations_equal_a_count(counted: Any, frames: int, size: int | None) -> None:
    pixels = torch.randn(1, 3, frames, size or 32, size or 32)
    for kind in ("vision", "tags"):
        config = configs(dataclasses.replace(TINY, keep_rate=0.6))[kind]
        model: Any = build(config)
        for rate in (0.7, 1.0):
            cost = models.model_cost(config, keep_rate=rate, num_frames=frames, image_size=size)
            assert cost.flops == counted(lambda model=model, rate=rate: model(pixels, rate))
        assert models.model_cost(config, num_frames=frames, image_size=size).flops == counted(lambda m=model: m(pixels))
    encoder = build(configs(TINY)["vision"])
    assert isinstance(encoder, models.VisionTransformer)
    for rate in (0.7, 1.0):
        cost = models.encoder_cost(encoder.config, keep_rate=rate, num_frames=frames, image_size=size)
        assert cost.flops == counted(lambda rate=rate: encoder.encode(pixels, rate))


@pytest.mark.parametrize("size", [None, 48])
def test_masked_autoencoder_operations_equal_a_count(counted: Any, size: int | None) -> None:
    config: Any = configs(TINY)["mae"]
    images = torch.randn(1, 3, size or 32, size or 32)
    cost = models.model_cost(config, image_size=size)
    assert cost.flops == counted(lambda: build(config)(images))
    assert cost.block_tokens == [3 + config.num_masked_of(16 if size is None else 36) // 3] * 4
    assert cost.kept_tokens == []


@pytest.mark.parametrize("tokens", [None, 5])
def test_clip_operations_equal_a_count(counted: Any, tokens: int | None) -> None:
    ids, lengths = torch.zeros(1, tokens or 12, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    config = configs(TINY)["clip"]
    model: Any = build(config)
    cost = models.model_cost(config, keep_rate=0.5, num_frames=2, text_tokens=tokens)
    assert cost.flops == counted(lambda: model(torch.randn(1, 3, 2, 32, 32), ids, lengths, 0.5))
    assert models.model_cost(TEXT, text_tokens=tokens).flops == counted(lambda: model.text(ids, lengths))
    assert models.model_cost(TEXT).block_tokens == [12, 12, 12]


def test_costs_agree_with_the_literature() -> None:
    assert models.encoder_cost(models.SIZES["2b"]).parameters == pytest.approx(2.0e9, rel=0.02)
    dense, evit = (models.encoder_cost(models.SIZES["s16"], keep_rate=rate) for rate in (1.0, 0.7))
    assert dense.flops / 2e9 == pytest.approx(4.6, abs=0.05)  # GMACs of DeiT-S, and of EViT-DeiT-S at 0.7
    assert evit.flops / 2e9 == pytest.approx(3.0, abs=0.05)


def test_num_kept_is_the_ceiling() -> None:
    assert [num_kept(0.7, n) for n in (196, 139, 99, 1)] == [138, 98, 70, 1]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("vision", {"num_frames": 4}, "num_frames must lie in 1 to 3, got 4"),
        ("vision", {"image_size": 36}, "image_size must be a positive multiple of patch_size 8, got 36"),
        ("tags", {"image_size": 0}, "image_size must be a positive multiple of patch_size 8, got 0"),
        ("tags", {"text_tokens": 3}, "text_tokens must not be given for a TagConfig, which has no text encoder"),
        ("clip", {"text_tokens": 13}, r"text_tokens must lie in 1 to 12 \(context_length\), got 13"),
        ("text", {"text_tokens": 0}, "text_tokens must lie in 1 to 12"),
        ("mae", {"keep_rate": 0.5}, "keep_rate and num_frames must be 1 for a MaeConfig, got keep_rate 0.5"),
        ("mae", {"num_frames": 2}, "must be 1 for a MaeConfig, got keep_rate None and num_frames 2"),
        ("mae", {"image_size": 8}, "mask_ratio 0.75 must hide at least one"),
    ],
)
def test_wrong_arguments(kind: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.model_cost(configs(TINY)[kind], **arguments)


def test_a_cost_needs_a_configuration() -> None:
    with pytest.raises(TypeError, match="config must be a model's configuration, got str"):
        models.model_cost("s16")  # type: ignore[arg-type]
