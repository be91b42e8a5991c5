"""Checkpoint files of the models: round trip, hand-off between stages, and every way a file can be bad."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import small_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from xray import models
from xray.models.layers import resize_frame_positions, resize_positions

TINY = models.SIZES["tiny"]
EVIT = dataclasses.replace(TINY, num_frames=2, num_registers=1, keep_rate=0.5, reorganize_blocks=(1, 3))
TEXT = models.TextConfig(vocab_size=50, context_length=12, width=32, depth=2, heads=2)


def build(kind: str, vision: models.VisionConfig = TINY, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = {
        "vision": lambda: models.VisionTransformer(vision),
        "text": lambda: models.TextTransformer(TEXT),
        "clip": lambda: models.Clip(models.ClipConfig(vision, TEXT, 24)),
        "mae": lambda: models.MaskedAutoencoder(models.MaeConfig(vision, 32, 1, 2)),
        "tags": lambda: models.TagClassifier(models.TagConfig(vision, 5)),
    }[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


KINDS = ["vision", "text", "clip", "mae", "tags"]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    model, path = build(kind, EVIT), tmp_path / "model.safetensors"
    models.save(model, path, tags=json.dumps(["a", "ü"]), recipe="demo")
    assert os.listdir(tmp_path) == ["model.safetensors"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    random_state = torch.get_rng_state()
    loaded: Any
    loaded, metadata = models.load(path, kind=kind)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert metadata["kind"] == kind == models.kind_of(model)
    assert json.loads(metadata["tags"]) == ["a", "ü"]
    assert metadata["recipe"] == "demo"
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert parameter.requires_grad
        assert not parameter.is_meta


def test_loaded_models_share_no_memory_with_the_file(tmp_path: Path) -> None:
    model, path = build("vision").bfloat16(), tmp_path / "model.safetensors"
    models.save(model, path)
    loaded: Any
    loaded, _ = models.load(path)
    with path.open("r+b") as file:  # in place, as a copy over the file would
        file.write(bytes(path.stat().st_size))
    assert loaded.pos_embed.dtype == torch.bfloat16
    assert all(torch.equal(ours, saved) for ours, saved in zip(loaded.parameters(), model.parameters(), strict=True))


def test_save_takes_gathered_weights(tmp_path: Path) -> None:
    model, path = build("tags"), tmp_path / "model.safetensors"
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    models.save(model, path, state_dict=gathered)
    loaded: Any = models.load(path)[0]
    assert torch.equal(loaded.head.bias, model.head.bias + 1)


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    models.save(build("tags"), path)
    before = path.read_bytes()
    message = r"cannot write checkpoint .*model\.safetensors: .*too large"
    with small_files(4096), pytest.raises(models.CheckpointError, match=message):
        models.save(build("tags", seed=1), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_save_into_no_folder(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(models.CheckpointError, match="cannot write checkpoint") as caught:
        models.save(build("tags"), tmp_path / folder / "model.safetensors")
    assert "\n" not in str(caught.value)


def test_save_refuses_what_it_cannot_describe(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(TypeError, match=r"model must be one of .*Clip.*got Linear"):
        models.save(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match="metadata 'tags' must be a string, got list"):
        models.save(build("tags"), path, tags=["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reserved name 'kind'"):
        models.save(build("tags"), path, kind="clip")
    assert os.listdir(tmp_path) == []


def rewrite(
    path: Path, metadata: dict[str, str] | None = None, tensors: dict[str, torch.Tensor | None] | None = None
) -> None:
    """Change a checkpoint's header strings or tensors (None removes one), behind the library's back."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    changed = {**weights, **(tensors or {})}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, path, {**header, **(metadata or {})})


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _truncate_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def _torch_save(path: Path) -> None:
    torch.save(build("tags").state_dict(), path)


def _old_torch_save(path: Path) -> None:
    torch.save(build("tags").state_dict(), path, _use_new_zipfile_serialization=False)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


def _config(**changes: Any) -> dict[str, str]:
    config = build("tags").config.to_dict()
    return {"config": json.dumps({**config, "vision": {**config["vision"], **changes}})}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.unlink(), "does not exist"),
        (lambda p: (p.unlink(), p.mkdir()), "cannot read checkpoint .*directory"),
        (lambda p: p.write_bytes(b""), "truncated or corrupt"),
        (lambda p: p.write_text("hello, this is no checkpoint"), "truncated or corrupt"),
        (_truncate, "truncated or corrupt"),
        (_truncate_header, "truncated or corrupt"),
        (_torch_save, "is a pickle .*only safetensors"),
        (_old_torch_save, "is a pickle"),
        (lambda p: p.write_bytes(pickle.dumps(_Bomb())), "is a pickle"),
        (lambda p: save_file({"a": torch.zeros(1)}, p), "not written by xray"),
        (
            lambda p: rewrite(p, {"kind": "gan"}),
            "unknown kind 'gan'; known kinds are vision, text, clip, mae, tags",
        ),
        (lambda p: rewrite(p, {"kind": "clip"}), "unusable config: ClipConfig has no field 'num_tags'"),
        (lambda p: rewrite(p, {"config": "{"}), "unusable config"),
        (lambda p: rewrite(p, {"config": "[1]"}), "unusable config: TagConfig needs a mapping"),
        (lambda p: rewrite(p, _config(heads=3)), "unusable config: .*divisible by heads 3"),
        (lambda p: rewrite(p, _config(width="32")), "unusable config: .*width must be an int"),
        (
            lambda p: rewrite(p, _config(width=64)),
            r"'encoder.cls_token' of shape \(1, 1, 32\).*needs \(1, 1, 64\)",
        ),
        (lambda p: rewrite(p, _config(depth=5)), "lacks 12 weights.*encoder.blocks.4"),
        (
            lambda p: rewrite(p, tensors={"head.bias": torch.zeros(4)}),
            r"'head.bias' of shape \(4,\) .*needs \(5,\)",
        ),
        (lambda p: rewrite(p, tensors={"head.bias": None}), "lacks 1 weights.*'head.bias'"),
        (
            lambda p: rewrite(p, tensors={"extra": torch.zeros(4)}),
            "has 1 weights unknown to the model.*'extra'",
        ),
    ],
)
def test_bad_files_are_one_sentence(spoil: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    models.save(build("tags"), path)
    spoil(path)
    with pytest.raises(models.CheckpointError, match=message) as caught:
        models.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(Path.unlink, "does not exist"), (_truncate, "truncated or corrupt"), (_torch_save, "is a pickle")],
)
def test_hand_off_from_a_bad_file(spoil: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    models.save(build("tags"), path)
    spoil(path)
    with pytest.raises(models.CheckpointError, match=message):
        models.load_encoder(build("mae"), path)


def test_wrong_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    models.save(build("tags"), path)
    with pytest.raises(models.CheckpointError, match="holds a 'tags' model where a 'clip' model is needed"):
        models.load(path, kind="clip")


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", build("tags")
    firsts = set()
    for padding in range(0, 256, 8):  # header lengths are multiples of 8, so these meet every first byte
        models.save(model, path, note="x" * padding)
        firsts.add(path.read_bytes()[0])
        models.load(path)
    assert 0x80 in firsts


@pytest.mark.parametrize("source", ["vision", "clip", "mae", "tags"])
@pytest.mark.parametrize("target", ["vision", "clip", "mae", "tags"])
def test_encoder_is_handed_from_stage_to_stage(source: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    before, after = build(source, seed=1), build(target, seed=2)
    untouched = {name: tensor.clone() for name, tensor in after.state_dict().items()}
    models.save(before, path)
    names = models.load_encoder(after, path)
    old = before if source == "vision" else getattr(before, "vision" if source == "clip" else "encoder")
    new = after if target == "vision" else getattr(after, "vision" if target == "clip" else "encoder")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(old(images), new(images))
    assert len(names) == len(old.state_dict())
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, untouched[name]) == (name not in names), name


def test_hand_off_interpolates_position_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    before = build("mae", dataclasses.replace(TINY, num_frames=2), seed=1)
    models.save(before, path)
    larger = dataclasses.replace(TINY, image_size=56, num_frames=5, keep_rate=0.7, reorganize_blocks=(2,))
    after = build("tags", larger, seed=2)
    names = models.load_encoder(after, path)
    assert {"encoder.pos_embed", "encoder.time_embed", "encoder.blocks.0.attn.qkv.weight"} <= set(names)
    assert after.encoder.pos_embed.shape == (1, 49, 32)
    assert torch.equal(after.encoder.pos_embed, resize_positions(before.encoder.pos_embed, 7))
    assert torch.equal(after.encoder.time_embed, resize_frame_positions(before.encoder.time_embed, 5))
    assert torch.equal(after.encoder.norm.weight, before.encoder.norm.weight)
    assert after(torch.randn(1, 3, 5, 56, 56)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 4}, "an image encoder with heads 2 where the model has 4"),
        ({"depth": 3}, "depth 4 where the model has 3"),
        ({"num_registers": 2}, "num_registers 0 where the model has 2"),
        ({"patch_size": 16}, "patch_size 8 where the model has 16"),
    ],
)
def test_hand_off_refuses_another_encoder(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    models.save(build("mae", seed=1), path)
    model = build("tags", dataclasses.replace(TINY, **changes), seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(models.CheckpointError, match=message):
        models.load_encoder(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hand_off_refuses_a_damaged_encoder_before_changing_the_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    models.save(build("mae", seed=1), path)
    rewrite(path, tensors={"encoder.norm.weight": torch.zeros(31)})
    model = build("tags", seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        models.CheckpointError, match=r"'encoder.norm.weight' of shape \(31,\) where the model needs \(32,\)"
    ):
        models.load_encoder(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hand_off_needs_an_image_encoder_on_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    models.save(build("text"), path)
    with pytest.raises(models.CheckpointError, match="holds a 'text' model, which has no image encoder"):
        models.load_encoder(build("tags"), path)
    with pytest.raises(TypeError, match="must have an image encoder, got TextTransformer"):
        models.load_encoder(build("text"), path)


@pytest.mark.parametrize("shape", [(1, 15, 32), (1, 16, 31), (16, 32), (1, 0, 32)], ids=str)
def test_hand_off_refuses_positions_of_no_grid(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    models.save(build("tags", seed=1), path)
    rewrite(path, tensors={"encoder.pos_embed": torch.zeros(shape)})
    with pytest.raises(models.CheckpointError, match=r"'encoder.pos_embed' of shape .* needs \(1, 16, 32\)"):
        models.load_encoder(build("tags", seed=2), path)


@pytest.mark.parametrize("kind", ["clip", "mae", "tags"])
def test_encoder_and_rest_make_the_whole(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    before, after = build(kind, seed=1), build(kind, seed=2).bfloat16()
    models.save(before, path)
    names = models.load_rest(after, path)
    expected = {name: tensor.bfloat16() for name, tensor in before.state_dict().items()}
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, expected[name]) == (name in names), name
    names += models.load_encoder(after, path)
    assert sorted(names) == sorted(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.state_dict().items())
    assert {parameter.dtype for parameter in after.parameters()} == {torch.bfloat16}


def test_rest_of_a_masked_autoencoder_of_another_size_is_interpolated(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    before, after = build("mae", seed=1), build("mae", dataclasses.replace(TINY, image_size=48), seed=2)
    models.save(before, path)
    models.load_rest(after, path)
    assert torch.equal(after.decoder_pos_embed, resize_positions(before.decoder_pos_embed, 6))


@pytest.mark.parametrize(
    ("stored", "model", "message"),
    [
        ("tags", lambda: build("clip"), "holds a 'tags' model where a 'clip' model is needed"),
        (
            "clip",
            lambda: models.Clip(models.ClipConfig(TINY, dataclasses.replace(TEXT, depth=3), 24)),
            "has a 'clip' model with text.depth 2 where the model has 3",
        ),
        ("clip", lambda: models.Clip(models.ClipConfig(TINY, TEXT, 25)), "with embed_dim 24 where the model has 25"),
        ("tags", lambda: models.TagClassifier(models.TagConfig(TINY, 6)), "with num_tags 5 where the model has 6"),
        ("mae", lambda: models.MaskedAutoencoder(models.MaeConfig(TINY, 16, 1, 2)), "decoder_width 32 .* has 16"),
        (
            "tags",
            lambda: build("tags", dataclasses.replace(TINY, width=64)),
            r"'head.weight' of shape \(5, 32\) where the model needs \(5, 64\)",
        ),
    ],
)
def test_another_rest_is_refused_by_its_first_difference(stored: str, model: Any, message: str, tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", model()
    models.save(build(stored, seed=1), path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(models.CheckpointError, match=message) as caught:
        models.load_rest(model, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hand_off_reads_one_tensor_at_a_time_and_hands_it_over_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    models.save(build("clip", seed=1).bfloat16(), path)
    with torch.device("meta"):
        model = models.Clip(models.ClipConfig(dataclasses.replace(TINY, image_size=48, num_frames=3), TEXT, 24))
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    given: dict[int, torch.Tensor] = {}

    def assign(parameter: nn.Parameter, value: torch.Tensor) -> None:
        assert (value.shape, value.dtype, value.is_cpu) == (parameter.shape, torch.float32, True)
        assert not alive
        alive.add(value)
        given[id(parameter)] = value.clone()

    names = models.load_encoder(model, path, assign=assign) + models.load_rest(model, path, assign=assign)
    parameters = dict(model.named_parameters())
    assert sorted(names) == sorted(parameters)
    whole: Any = build("clip", dataclasses.replace(TINY, image_size=48, num_frames=3), seed=3)
    models.load_encoder(whole, path)
    models.load_rest(whole, path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(given[id(parameters[name])], tensor), name
    with pytest.raises(ValueError, match=r"meta device: call model.to_empty"):
        models.load_encoder(model, path)


def test_header_tells_what_a_file_holds(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", build("mae")
    models.save(model, path, recipe="demo")
    header = models.read_header(path)
    assert (header.kind, header.config, header.metadata["recipe"]) == ("mae", model.config, "demo")
    _truncate(path)
    with pytest.raises(models.CheckpointError, match="truncated or corrupt"):
        models.read_header(path)
