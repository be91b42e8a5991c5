"""The models: the encoder against a plainly written EViT, masked autoencoding, text, CLIP and tags."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xray import models, ops
from xray.models.layers import resize_frame_positions, resize_positions, sin_cos_positions
from xray.models.mae import patchify, unpatchify

TINY = models.SIZES["tiny"]
TEXT = models.TextConfig(vocab_size=50, context_length=12, width=32, depth=2, heads=2)
CLIP = models.ClipConfig(TINY, TEXT, embed_dim=24)
MAE = models.MaeConfig(TINY, decoder_width=32, decoder_depth=2, decoder_heads=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by sharing their work between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vision(seed: int = 0, **changes: Any) -> models.VisionTransformer:
    """An encoder whose attention is peaked and whose every parameter matters."""
    torch.manual_seed(seed)
    encoder = models.VisionTransformer(dataclasses.replace(TINY, **changes))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("qkv.weight"):
                parameter.mul_(2.0)
    return encoder


def plain_evit(encoder: models.VisionTransformer, pixels: Tensor, keep_rate: float) -> tuple[Tensor, list[Tensor], Any]:
    """EViT with every matrix materialised, one sample and one head at a time, in float64."""
    config = encoder.config
    weights = {n: p.detach().double().requires_grad_() for n, p in encoder.named_parameters()}
    clips = pixels.double() if pixels.ndim == 5 else pixels.double()[:, :, None]
    num_prefix, head_dim, size = 1 + config.num_registers, config.width // config.heads, config.patch_size

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + config.layer_norm_eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    outputs, kept = [], []
    for clip in clips:
        rows = [weights["cls_token"][0, 0]]
        rows += [weights["reg_token"][0, i] for i in range(config.num_registers)]
        for time in range(clip.shape[1]):
            for patch in range(config.grid_size**2):
                top, left = (size * i for i in divmod(patch, config.grid_size))
                square = clip[:, time, top : top + size, left : left + size].flatten()
                row = weights["patch_embed.proj.weight"].flatten(1) @ square + weights["patch_embed.proj.bias"]
                rows.append(row + weights["pos_embed"][0, patch] + weights["time_embed"][0, time])
        x, kept_here = torch.stack(rows), []
        for index in range(config.depth):
            block = f"blocks.{index}"
            qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
            heads, class_rows = [], []
            for head in range(config.heads):
                start = head * head_dim
                q, k, v = (qkv[:, part * config.width + start :][:, :head_dim] for part in range(3))
                probabilities = (q @ k.T / math.sqrt(head_dim)).softmax(-1)
                heads.append(probabilities @ v)
                class_rows.append(probabilities[0, num_prefix:])
            x = x + linear(torch.cat(heads, -1), f"{block}.attn.proj")
            keep = math.ceil(keep_rate * (len(x) - num_prefix))
            if index in config.evit_blocks and keep < len(x) - num_prefix:
                scores = torch.stack(class_rows).mean(0)
                order = scores.argsort(descending=True)
                rest = x[num_prefix:]
                fused = torch.stack([scores[j] * rest[j] for j in order[keep:]]).sum(0, keepdim=True)
                x = torch.cat([x[:num_prefix], rest[order[:keep]], fused])
                kept_here.append(order[:keep])
            hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + linear(hidden, f"{block}.mlp.fc2")
        outputs.append(norm(x, "norm"))
        kept.append(kept_here)
    return torch.stack(outputs), [torch.stack(layer) for layer in zip(*kept, strict=True)], weights


@pytest.mark.parametrize(
    ("registers", "frames", "keep_rate"), [(0, 0, 0.7), (2, 0, 0.5), (1, 2, 0.7), (0, 3, 0.3), (2, 0, 1.0)]
)
def test_encoder_equals_plain_evit(registers: int, frames: int, keep_rate: float) -> None:
    encoder = vision(num_registers=registers, num_frames=max(frames, 1), keep_rate=keep_rate)
    pixels = torch.randn((2, 3, frames, 32, 32) if frames else (2, 3, 32, 32))
    output = encoder.encode(pixels)
    tokens, kept, weights = plain_evit(encoder, pixels, keep_rate)
    assert len(output.kept) == len(kept) == (0 if keep_rate == 1 else 3)
    for ours, plain in zip(output.kept, kept, strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, plain)
    torch.testing.assert_close(output.tokens.double(), tokens, rtol=1e-4, atol=2e-5)
    assert torch.equal(output.pooled, output.tokens[:, 0])
    direction = torch.randn_like(tokens)
    (output.tokens * direction.float()).sum().backward()
    (tokens * direction).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        scale = weights[name].grad.abs().max().clamp_min(1e-3)
        error = (parameter.grad.double() - weights[name].grad).abs().max() / scale
        assert error < 1e-4, f"gradient of {name} is off by {error:.1e} of its largest element"


def test_token_counts_of_the_evit_paper() -> None:
    config = models.VisionConfig(224, 16, 32, 12, 2, keep_rate=0.7)
    encoder = models.VisionTransformer(config)
    output = encoder.encode(torch.randn(1, 3, 224, 224))
    assert [tuple(indices.shape) for indices in output.kept] == [(1, 138), (1, 98), (1, 70)]
    assert output.tokens.shape == (1, 72, 32)
    cost = models.encoder_cost(config)
    assert cost.kept_tokens == [138, 98, 70]
    assert cost.block_tokens == [197] * 4 + [140] * 3 + [100] * 3 + [72] * 2
    assert [indices.shape[1] for indices in encoder.encode(torch.randn(1, 3, 224, 224), 0.5).kept] == [
        98,
        50,
        26,
    ]


@pytest.mark.parametrize(("depth", "blocks"), [(12, (3, 6, 9)), (24, (6, 12, 18)), (4, (1, 2, 3)), (2, (0, 1))])
def test_evit_blocks(depth: int, blocks: tuple[int, ...]) -> None:
    assert dataclasses.replace(TINY, depth=depth).evit_blocks == blocks


def test_registers_are_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = vision(num_registers=3, keep_rate=0.1)
    calls = []
    real = ops.add_reorganize_norm

    def recorder(tokens: Tensor, update: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        result = real(tokens, update, *args, **kwargs)
        calls.append((tokens + update, result[0]))
        return result

    monkeypatch.setattr(ops, "add_reorganize_norm", recorder)
    output = encoder.encode(torch.randn(2, 3, 32, 32))
    assert [after.shape[1] for _, after in calls] == [4 + 2 + 1, 4 + 1 + 1, 4 + 1 + 1]
    for before, after in calls:
        assert torch.equal(before[:, :4], after[:, :4])
    assert output.tokens.shape[1] == 6


def test_image_is_a_clip_of_one_frame() -> None:
    encoder = vision(num_frames=3, keep_rate=0.7)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images), encoder(images[:, :, None]))
    clips = torch.randn(2, 3, 3, 32, 32)
    assert encoder(clips[:, :, :2]).shape == (2, 32)
    assert not torch.allclose(encoder(clips), encoder(clips.flip(2)), atol=1e-3)
    with torch.no_grad():
        encoder.time_embed.zero_()
    torch.testing.assert_close(encoder(clips, 1.0), encoder(clips.flip(2), 1.0))


def test_keep_rate_one_is_the_dense_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = vision(keep_rate=0.5)
    dense = models.VisionTransformer(TINY)
    dense.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(encoder(images), dense(images))
    monkeypatch.setattr(ops, "attention_with_scores", None)
    monkeypatch.setattr(ops, "reorganize_tokens", None)
    output = encoder.encode(images, keep_rate=1.0)
    assert output.kept == []
    assert torch.equal(output.pooled, dense.encode(images).pooled)


@pytest.mark.parametrize(
    "changes",
    [{}, {"keep_rate": 0.5}, {"keep_rate": 0.5, "num_registers": 2, "depth": 2}, {"depth": 1, "keep_rate": 0.5}],
    ids=["dense", "evit", "evit in the last block", "one block"],
)
def test_class_token_alone_is_that_of_all_tokens(changes: dict[str, Any]) -> None:
    """`forward` gives `encode`'s pooled and its gradients, though its last block computes nothing else."""
    encoder = vision(**changes)
    images = torch.randn(3, 3, 32, 32)
    pooled = [encoder(images), encoder.encode(images).pooled]
    torch.testing.assert_close(*pooled, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), list(encoder.parameters())) for out in pooled]
    for name, few, many in zip(dict(encoder.named_parameters()), *gradients, strict=True):
        torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-5 * float(many.abs().max()), msg=name)


@pytest.mark.parametrize("module", ["attn.proj", "mlp.fc1", "norm2"])
def test_last_block_does_the_class_token_only(module: str) -> None:
    encoder, rows = vision(), []
    for block in encoder.blocks:
        block.get_submodule(module).register_forward_hook(lambda module, given, out: rows.append(given[0].shape[:2]))
    encoder(torch.randn(2, 3, 32, 32))
    assert rows == [(2, 17)] * 3 + [(2, 1)]


def test_encoder_takes_an_empty_batch() -> None:
    output = vision(keep_rate=0.7).encode(torch.randn(0, 3, 32, 32))
    assert output.pooled.shape == (0, 32)
    assert [tuple(indices.shape) for indices in output.kept] == [(0, 12), (0, 10), (0, 8)]


@pytest.mark.parametrize("keep_rate", [1.0, 0.7])
def test_encoder_under_autocast(keep_rate: float) -> None:
    encoder = vision(keep_rate=keep_rate)
    images = torch.randn(9, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(images)
    half.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in encoder.parameters())
    # The median, because rounding may swap the last kept with the first dropped token of a sample.
    assert F.cosine_similarity(half.float(), encoder(images)).median() > 0.999


def test_block_compiles_in_one_graph() -> None:
    torch.compiler.reset()  # a method that other tests compiled too often would run uncompiled
    encoder = vision(keep_rate=0.7)
    block = torch.compile(encoder.blocks[1], backend="aot_eager", fullgraph=True)
    tokens = torch.randn(2, 17, 32, requires_grad=True)
    ours, indices = block(tokens, num_keep=5)
    plain, plain_indices = encoder.blocks[1](tokens, num_keep=5)
    torch.testing.assert_close(ours, plain)
    assert torch.equal(indices, plain_indices)
    gradients = [torch.autograd.grad(out.square().sum(), tokens)[0] for out in (ours, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_seam_equals_the_plain_block(dtype: torch.dtype) -> None:
    """Residual add, reorganisation and LayerNorm in one op, as the block does, against the three of them."""
    block: Any = vision(keep_rate=0.5).blocks[1].to(dtype)
    nn.init.normal_(block.norm2.weight)
    nn.init.normal_(block.norm2.bias)
    tokens = torch.randn(2, 17, 32, dtype=dtype, requires_grad=True)

    def plain(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        update, scores = block.attn.forward_with_scores(block.norm1(tokens), 1)
        stream, indices = ops.reorganize_tokens(tokens + update, scores, 8)
        return stream + block.mlp(block.norm2(stream)), indices

    leaves = [tokens, *block.parameters()]
    found = [block(tokens, num_keep=8), plain(tokens)]
    assert torch.equal(found[0][1], found[1][1])
    # the plain block rounds residual + update to the dtype before it fuses the dropped tokens, the seam does not
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[0][0], found[1][0], rtol=bound, atol=bound)
    gradients = [torch.autograd.grad(out.float().square().mean(), leaves) for out, _ in found]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def test_kept_indices_lead_back_to_patches() -> None:
    encoder = vision(keep_rate=0.6)
    output = encoder.encode(torch.randn(2, 3, 32, 32))
    where = ops.token_map(output.kept, 16)
    assert where.patches.shape[1] + 1 == output.tokens.shape[1]
    for b in range(2):
        for token, patch in enumerate(where.patches[b].tolist()):
            if patch >= 0:
                assert where.tokens[b, patch] == token
    assert (where.patches[:, -1] == -1).all()


def test_positions() -> None:
    positions = sin_cos_positions(4, 34)
    assert positions.shape == (1, 16, 34)
    rows = positions[0]
    assert torch.unique(rows.round(decimals=4), dim=0).shape[0] == 16
    # The embedding of a neighbour is nearer than that of a far patch, and rows and columns are treated alike.
    distance = torch.cdist(rows, rows)
    assert distance[0, 1] < distance[0, 3] < distance[0, 15]
    torch.testing.assert_close(distance[0, 1], distance[0, 4])
    assert resize_positions(positions, 4) is positions
    constant = torch.full((1, 9, 2), 3.0)
    torch.testing.assert_close(resize_positions(constant, 5), torch.full((1, 25, 2), 3.0))
    line = torch.tensor([0.0, 3.0])[None, :, None]
    torch.testing.assert_close(resize_frame_positions(line, 4).flatten(), torch.tensor([0.0, 0.75, 2.25, 3.0]))
    torch.testing.assert_close(resize_frame_positions(line[:, 1:], 3).flatten(), torch.full((3,), 3.0))


def test_mae_masks_exactly_three_quarters_reproducibly() -> None:
    torch.manual_seed(0)
    model = models.MaskedAutoencoder(MAE)
    images = torch.randn(64, 3, 32, 32)
    output = model(images, torch.Generator().manual_seed(3))
    assert output.mask.dtype == torch.bool
    assert output.mask.sum(1).tolist() == [12] * 64
    again = model(images, torch.Generator().manual_seed(3))
    assert torch.equal(output.mask, again.mask)
    assert torch.equal(output.loss, again.loss)
    other = model.random_mask(64, torch.Generator().manual_seed(4))
    assert not torch.equal(output.mask, other)
    assert torch.unique(output.mask, dim=0).shape[0] > 55
    share = model.random_mask(4000, torch.Generator().manual_seed(5)).float().mean(0)
    assert (share - 0.75).abs().max() < 0.04  # five standard deviations


@pytest.mark.parametrize("registers", [0, 2])
def test_mae_prediction_equals_a_plainly_assembled_one(registers: int) -> None:
    torch.manual_seed(0)
    vision_config = dataclasses.replace(TINY, num_registers=registers, keep_rate=0.5)  # EViT stays off here
    model = models.MaskedAutoencoder(dataclasses.replace(MAE, vision=vision_config))
    images = torch.randn(3, 3, 32, 32)
    output = model(images, torch.Generator().manual_seed(1))
    prefix = 1 + registers
    losses = []
    for row in range(3):
        image, hidden = images[row : row + 1], output.mask[row]
        visible = [i for i in range(16) if not hidden[i]]
        seen = model.encoder.transform(model.encoder.embed(image)[:, visible], 1.0)
        assert seen.kept == []
        latent = model.decoder_embed(seen.tokens)[0]
        tokens = list(latent[:prefix])
        for patch in range(16):
            content = model.mask_token[0, 0] if hidden[patch] else latent[prefix + visible.index(patch)]
            tokens.append(content + model.decoder_pos_embed[0, patch])
        x = torch.stack(tokens)[None]
        for block in model.decoder_blocks:
            x, _ = block(x)
        prediction = model.decoder_pred(model.decoder_norm(x))[0, prefix:]
        torch.testing.assert_close(output.prediction[row], prediction, rtol=1e-4, atol=1e-5)
        for patch in range(16):
            top, left = (8 * i for i in divmod(patch, 4))
            target = image[0, :, top : top + 8, left : left + 8].flatten()
            target = (target - target.mean()) / torch.sqrt(target.var() + 1e-6)
            if hidden[patch]:
                losses.append((prediction[patch] - target).square().mean())
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_mae_loss_ignores_visible_patches_and_encoder_sees_no_hidden_ones() -> None:
    torch.manual_seed(0)
    model = models.MaskedAutoencoder(MAE)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    output = model(images, torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(output.loss, output.prediction, retain_graph=True)
    nonzero = gradient.abs().sum(-1) > 0
    assert torch.equal(nonzero, output.mask)
    (gradient,) = torch.autograd.grad(output.prediction.square().sum(), images)
    touched = patchify(gradient, 8).abs().sum(-1) > 0
    assert torch.equal(touched, ~output.mask)


def test_mae_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = models.MaskedAutoencoder(MAE)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(unpatchify(patchify(images, 8), 8), images)
    mask = model.random_mask(2, torch.Generator().manual_seed(1))
    picture = model.reconstruct(images[:, :, None], torch.Generator().manual_seed(1))
    assert picture.shape == (2, 3, 32, 32)
    assert not picture.requires_grad
    same = (patchify(picture, 8) == patchify(images, 8)).all(-1)
    assert torch.equal(same, ~mask)
    assert (patchify(model.hide(images, mask, 9.0), 8) == 9.0).all(-1).equal(mask)
    # A perfect prediction gives the picture back.
    patches = patchify(images, 8)
    perfect = (patches - patches.mean(-1, True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    monkeypatch.setattr(model, "_predict", lambda pixels, mask: perfect)
    torch.testing.assert_close(model.reconstruct(images), images, rtol=1e-4, atol=1e-4)


def test_mae_learns() -> None:
    torch.manual_seed(0)
    model = models.MaskedAutoencoder(MAE)
    ramp = torch.linspace(-1, 1, 32)
    images = torch.stack([ramp.expand(3, 32, 32), ramp[:, None].expand(3, 32, 32)]).repeat(8, 1, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        loss = model(images, generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_text_padding_does_not_change_the_features() -> None:
    torch.manual_seed(0)
    model = models.TextTransformer(TEXT)
    ids = torch.randint(0, 50, (3, 12))
    lengths = torch.tensor([5, 12, 1])
    features = model(ids, lengths)
    assert features.shape == (3, 32)
    repadded = torch.where(torch.arange(12) < lengths[:, None], ids, torch.randint(0, 50, (3, 12)))
    torch.testing.assert_close(model(repadded, lengths), features)
    for row, length in enumerate(lengths.tolist()):
        alone = model(ids[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone[0], features[row], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids.int(), lengths.int()), features)


def test_text_reads_every_token_in_order() -> None:
    torch.manual_seed(0)
    model = models.TextTransformer(TEXT)
    ids = torch.arange(10, 16)[None]
    lengths = torch.tensor([6])
    features = model(ids, lengths)
    for position in range(6):
        changed = ids.clone()
        changed[0, position] = 40
        assert not torch.allclose(model(changed, lengths), features, atol=1e-4)
    assert not torch.allclose(model(ids.flip(1), lengths), features, atol=1e-4)
    # Causal: the state of a token is the feature of the caption that ends there.
    tokens = model.token_embedding(ids) + model.position_embedding[:, :6]
    for block in model.blocks:
        tokens, _ = block(tokens, is_causal=True)
    for length in range(1, 7):
        prefix = model(ids, torch.tensor([length]))
        torch.testing.assert_close(prefix[0], model.norm(tokens[0, length - 1]), rtol=1e-5, atol=1e-5)


def test_text_gradients_are_those_of_whole_blocks() -> None:
    """The last block computes each caption's last token alone."""
    torch.manual_seed(0)
    model = models.TextTransformer(TEXT)
    ids, lengths = torch.randint(0, 50, (3, 12)), torch.tensor([5, 12, 1])
    tokens = model.token_embedding(ids) + model.position_embedding
    for block in model.blocks:
        tokens, _ = block(tokens, is_causal=True, key_lengths=lengths)
    features = [model(ids, lengths), model.norm(tokens[range(3), lengths - 1])]
    gradients = [torch.autograd.grad(out[:, ::2].square().sum(), list(model.parameters())) for out in features]
    for name, few, many in zip(dict(model.named_parameters()), *gradients, strict=True):
        torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-5 * float(many.abs().max()), msg=name)


def test_clip_features_have_norm_one() -> None:
    torch.manual_seed(0)
    model = models.Clip(dataclasses.replace(CLIP, vision=dataclasses.replace(TINY, num_frames=2)))
    clips, ids, lengths = (
        torch.randn(4, 3, 2, 32, 32),
        torch.randint(0, 50, (4, 8)),
        torch.tensor([8, 3, 1, 5]),
    )
    output = model(clips, ids, lengths, keep_rate=0.7)
    for features in output[:2]:
        assert features.shape == (4, 24)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))
    assert torch.equal(output.image_features, model.encode_image(clips, 0.7))
    assert not torch.allclose(output.image_features, model.encode_image(clips))
    assert torch.equal(output.text_features, model.encode_text(ids, lengths))
    assert model.logit_scale.shape == (1,)
    torch.testing.assert_close(output.logit_scale, torch.tensor([1 / 0.07]))
    (output.image_features @ output.text_features.T * output.logit_scale).diagonal().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_tag_classifier_is_a_linear_layer_on_the_encoder() -> None:
    torch.manual_seed(0)
    model = models.TagClassifier(models.TagConfig(dataclasses.replace(TINY, keep_rate=0.5), num_tags=9))
    images = torch.randn(2, 3, 32, 32)
    logits = model(images)
    torch.testing.assert_close(logits, model.encoder(images) @ model.head.weight.T + model.head.bias)
    assert logits.shape == (2, 9)
    assert not torch.allclose(logits, model(images, keep_rate=1.0))
