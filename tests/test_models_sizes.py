"""Images of other sizes than the native one, as progressive resolution feeds them, and masks from given noise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xray import models
from xray.models.layers import resize_positions

TINY = dataclasses.replace(models.SIZES["tiny"], num_registers=1, num_frames=2)
MAE = models.MaeConfig(TINY, decoder_width=16, decoder_depth=1, decoder_heads=2)


def shaken(model: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize(("old", "new"), [(3, 5), (5, 2), (4, 7), (1, 3), (3, 1)])
def test_resized_positions_are_bicubic_and_differentiable(old: int, new: int) -> None:
    positions = torch.randn(1, old * old, 3, dtype=torch.float64, requires_grad=True)
    picture = positions.unflatten(1, (old, old)).movedim(3, 1).contiguous()
    expected = F.interpolate(picture, (new, new), mode="bicubic", antialias=True).movedim(1, 3).flatten(1, 2)
    resized = resize_positions(positions, new)
    torch.testing.assert_close(resized, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda p: resize_positions(p, new), positions)
    narrow = positions.detach().bfloat16()
    assert torch.equal(resize_positions(narrow, new), resize_positions(narrow.float(), new).bfloat16())


@pytest.mark.parametrize("shape", [(2, 3, 56, 56), (2, 3, 2, 16, 16), (2, 3, 8, 8)], ids=str)
def test_another_size_equals_a_model_whose_native_size_it_is(shape: tuple[int, ...], tmp_path: Path) -> None:
    encoder = shaken(models.VisionTransformer(TINY))
    native = models.VisionTransformer(dataclasses.replace(TINY, image_size=shape[-1]))
    models.save(encoder, tmp_path / "model.safetensors")
    models.load_encoder(native, tmp_path / "model.safetensors")
    pixels = torch.randn(shape)
    ours, theirs = encoder.encode(pixels, 0.5), native.encode(pixels, 0.5)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert [k.shape for k in ours.kept] == [k.shape for k in theirs.kept]
    assert models.encoder_cost(
        TINY, keep_rate=0.5, image_size=shape[-1], num_frames=shape[2] if len(shape) == 5 else 1
    ).kept_tokens == [kept.shape[1] for kept in ours.kept]
    (ours.pooled**2).sum().backward()
    assert encoder.pos_embed.grad.abs().amin(-1).gt(0).all() or shape[-1] < 32


def test_native_positions_are_added_as_they_are() -> None:
    encoder = shaken(models.VisionTransformer(TINY))
    images = torch.randn(2, 3, 32, 32)
    expected = encoder.patch_embed(images) + (encoder.pos_embed + encoder.time_embed[:, :1])
    assert torch.equal(encoder.embed(images), expected)


@pytest.mark.parametrize("size", [16, 48])
def test_masked_autoencoding_of_another_size(size: int, tmp_path: Path) -> None:
    model = shaken(models.MaskedAutoencoder(MAE))
    native = models.MaskedAutoencoder(dataclasses.replace(MAE, vision=dataclasses.replace(TINY, image_size=size)))
    models.save(model, tmp_path / "model.safetensors")
    models.load_encoder(native, tmp_path / "model.safetensors")
    models.load_rest(native, tmp_path / "model.safetensors")
    patches = (size // 8) ** 2
    images, noise = torch.randn(2, 3, size, size), torch.rand(2, patches)
    ours, theirs = model(images, noise=noise), native(images, noise=noise)
    assert torch.equal(ours.prediction, theirs.prediction)
    assert torch.equal(ours.loss, theirs.loss)
    assert ours.mask.sum(1).tolist() == [round(0.75 * patches)] * 2
    assert model.reconstruct(images).shape == images.shape
    ours.loss.backward()
    assert model.decoder_pos_embed.grad.abs().sum() > 0
    assert model.encoder.pos_embed.grad.abs().sum() > 0


def test_an_image_too_small_to_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask_ratio 0.75 must hide at least one .* of 1 patches, and hides 1"):
        models.MaskedAutoencoder(MAE)(torch.randn(1, 3, 8, 8))


def test_compiled_blocks_take_several_sizes() -> None:
    torch.compiler.reset()
    encoder = shaken(models.VisionTransformer(dataclasses.replace(TINY, depth=2)))
    images = [torch.randn(2, 3, size, size) for size in (16, 32)]

    def gradients() -> list[Tensor]:
        losses = [encoder(pixels, 0.7).square().sum() for pixels in images]
        return [*losses, *torch.autograd.grad(sum(losses), [encoder.pos_embed, encoder.patch_embed.proj.weight])]

    expected = gradients()
    for block in encoder.blocks:
        block.forward = torch.compile(block.forward, dynamic=False, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(), expected)


def test_masks_follow_the_order_of_the_noise() -> None:
    model = models.MaskedAutoencoder(MAE)
    noise = torch.rand(3, 16)
    mask = model.mask_from_noise(noise)
    for row in range(3):
        least = sorted(range(16), key=lambda patch: noise[row, patch].item())[:12]
        assert mask[row].nonzero().flatten().tolist() == sorted(least)
    assert torch.equal(model.mask_from_noise(torch.zeros(1, 16)), torch.arange(16)[None] < 12)
    generator = torch.Generator().manual_seed(2)
    drawn = torch.rand(5, 16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(model.random_mask(5, generator), model.mask_from_noise(drawn))


def test_a_sample_has_its_mask_in_any_batch() -> None:
    model = shaken(models.MaskedAutoencoder(MAE))
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    state = torch.get_rng_state()
    whole = model(images, noise=noise)
    assert torch.equal(torch.get_rng_state(), state)
    halves = [model(images[rows], noise=noise[rows]) for rows in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat([half.mask for half in halves]), whole.mask)
    torch.testing.assert_close((halves[0].loss + halves[1].loss) / 2, whole.loss)


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        (torch.rand(2, 15), ValueError, r"noise must be \(2, 16\), a number for each patch, got shape \(2, 15\)"),
        (torch.rand(1, 16), ValueError, r"noise must be \(2, 16\)"),
        (torch.zeros(2, 16, dtype=torch.int64), TypeError, "noise must be a floating-point tensor, got torch.int64"),
        ([0.5], TypeError, "noise must be a floating-point tensor, got list"),
    ],
)
def test_wrong_noise(noise: Any, error: type[Exception], message: str) -> None:
    model = models.MaskedAutoencoder(MAE)
    with pytest.raises(error, match=message):
        model(torch.randn(2, 3, 32, 32), noise=noise)
    with pytest.raises(ValueError, match="noise and generator must not both be given"):
        model(torch.randn(2, 3, 32, 32), torch.Generator(), noise=noise)
