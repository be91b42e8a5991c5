"""From bytes to model input: safe decoding, transforms, tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import encoded, picture, png_claiming, video
from PIL import Image

from xray import data
from xray.data.dataset import Sample
from xray.data.decoding import decode, spread


def test_transparency_is_composed_onto_white() -> None:
    half = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    grey = Image.new("LA", (4, 4), (0, 0))
    assert np.abs(decode(encoded(half, "PNG")).frames[0, 0, 0].astype(int) - [227, 127, 127]).max() <= 1
    assert decode(encoded(palette, "PNG", transparency=1)).frames[0, 0, 0].tolist() == [255, 255, 255]
    assert decode(encoded(palette, "PNG")).frames[0, 0, 0].tolist() == [10, 20, 30]
    assert decode(encoded(grey, "PNG")).frames[0, 0, 0].tolist() == [255, 255, 255]


def test_modes_become_rgb() -> None:
    deep = Image.fromarray(np.full((4, 4), 0x8080, np.uint16))
    assert decode(encoded(deep, "PNG")).frames[0, 0, 0].tolist() == [128] * 3
    assert decode(encoded(Image.new("1", (4, 4), 1), "PNG")).frames[0, 0, 0].tolist() == [255] * 3
    cmyk = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).frames[0, 8, 8]
    assert cmyk[0] > 200
    assert cmyk[1] < 60


def test_orientation_is_applied() -> None:
    wide = Image.new("RGB", (8, 4), "white")
    wide.paste((255, 0, 0), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the left half goes up
    media = decode(encoded(wide, "PNG", exif=exif))
    assert media.frames.shape == (1, 8, 4, 3)
    assert (media.width, media.height) == (4, 8)
    assert media.frames[0, 0, 0].tolist() == [255, 0, 0]
    assert media.frames[0, 7, 0].tolist() == [255, 255, 255]


def test_shrinking_keeps_the_aspect_and_never_enlarges() -> None:
    wide = encoded(picture(0, 60).resize((60, 30)), "PNG")
    assert decode(wide, max_side=20).frames.shape == (1, 10, 20, 3)
    assert decode(wide, max_side=100).frames.shape == (1, 30, 60, 3)


def test_trimming_cuts_transparent_margins_only() -> None:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (10, 20, 30, 25))
    assert decode(encoded(image, "PNG"), trim=True).frames.shape == (1, 5, 20, 3)
    assert decode(encoded(image, "PNG")).frames.shape == (1, 40, 40, 3)
    assert decode(encoded(image.convert("RGB"), "PNG"), trim=True).frames.shape == (1, 40, 40, 3)


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_animations_are_clips(format: str) -> None:
    frames = [Image.new("RGB", (12, 8), (20 * index, 0, 0)) for index in range(12)]
    animated = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **_lossless(format))
    media = decode(animated, max_frames=4)
    assert media.kind == "clip"
    assert media.frames.shape == (4, 8, 12, 3)
    expected = [20 * index for index in spread(12, 4)]
    assert np.abs(media.frames[:, 0, 0, 0].astype(int) - expected).max() <= 3
    assert decode(animated, still=True).kind == "image"
    assert decode(encoded(frames[3], format, **_lossless(format))).kind == "image"


def _lossless(format: str) -> dict[str, object]:
    return {"lossless": True} if format == "WEBP" else {}


@pytest.mark.parametrize("container", ["mp4", "webm", "avi", "matroska"])
def test_videos_are_clips_of_evenly_spread_frames(container: str) -> None:
    media = decode(video(40, container), max_frames=5, max_side=16)
    assert media.kind == "clip"
    assert media.frames.shape == (5, 16, 16, 3)
    assert (media.width, media.height) == (32, 32)
    reds = media.frames[:, 8, 8, 0].astype(int)
    assert (np.diff(reds) > 25).all()
    assert len(decode(video(3, container), max_frames=5).frames) == 3


@given(count=st.integers(1, 300), wanted=st.integers(1, 40))
def test_spread_is_even(count: int, wanted: int) -> None:
    indices = spread(count, wanted)
    assert len(indices) == min(count, wanted)
    gaps = np.diff([-1, *indices, count])
    assert indices == sorted(set(indices))
    assert gaps[1:-1].max(initial=0) <= -(-count // len(indices)) + 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png_claiming(20_990, 29_700), "623403000 pixels is above the cap"),
        (png_claiming(9_000, 9_000), "9000 x 9000 pixels is above the cap"),
        (encoded(picture(0), "PNG")[:-60], "cannot be decoded"),
        (encoded(picture(0), "JPEG")[:-200], "cannot be decoded"),
        (b"#EXTM3U\nfile.ts\n", "no image or video"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image or video"),
        (b"", "no image or video"),
        (video(30)[:-400], r"truncated: \d+ of 30 frames"),
        (video(50, "webm")[: len(video(50, "webm")) // 2], r"truncated: [0-3]\.\d of 5.0 seconds"),
        (video(30, "avi")[: len(video(30, "avi")) // 2], "cannot be decoded"),
    ],
    ids=[
        "bomb",
        "large",
        "cut png",
        "cut jpeg",
        "playlist",
        "postscript",
        "empty",
        "cut mp4",
        "cut webm",
        "cut avi",
    ],
)
def test_bad_files_are_refused_in_one_sentence(content: bytes, words: str) -> None:
    with pytest.raises(data.DecodeError, match=words) as caught:
        decode(content)
    assert "\n" not in str(caught.value)


def test_a_clip_longer_than_the_cap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xray.data.decoding.MAX_CLIP_FRAMES", 10)
    for content in (video(20), video(20, "webm")):
        with pytest.raises(data.DecodeError, match="above the cap of 10"):
            decode(content, max_frames=2)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_bytes_decode_or_raise_decode_error(draws: st.DataObject) -> None:
    format = draws.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
    content = bytearray(encoded(picture(1, 12), format))
    for _ in range(draws.draw(st.integers(1, 6))):
        content[draws.draw(st.integers(0, len(content) - 1))] = draws.draw(st.integers(0, 255))
    try:
        media = decode(bytes(content), max_side=64)
    except data.DecodeError:
        return
    assert media.frames.dtype == np.uint8
    assert media.frames.ndim == 4


def sample(image: np.ndarray, caption: str = "a thing", tags: tuple[str, ...] = ()) -> Sample:
    return Sample("s", "clip" if image.ndim == 4 else "image", caption, list(tags), "", image)


def test_evaluation_takes_the_centred_square_and_normalises() -> None:
    image = np.zeros((6, 12, 3), np.uint8)
    image[:, 3:9] = 255  # the centred square, white
    pixels = data.transforms.evaluate(6)(sample(image), None)
    assert pixels.shape == (3, 6, 6)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.ones(3, 6, 6))
    random = np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)
    back = data.transforms.denormalize(data.transforms.evaluate(5)(sample(random), None))
    assert np.array_equal(back.permute(1, 2, 0).numpy(), random)


def test_clips_keep_their_order_and_repeat_when_short() -> None:
    clip = np.zeros((10, 4, 4, 3), np.uint8) + (np.arange(10) * 20).astype(np.uint8)[:, None, None, None]

    def levels(pixels: torch.Tensor) -> list[int]:
        assert pixels.shape[0] == 3
        return [round(value) for value in ((pixels[0, :, 0, 0] + 1) * 127.5 / 20).tolist()]

    assert levels(data.transforms.evaluate(4, 5)(sample(clip), None)) == [1, 3, 5, 7, 9]
    assert levels(data.transforms.evaluate(4, 4)(sample(clip[:2]), None)) == [0, 0, 1, 1]
    drawn = [
        levels(data.transforms.train(4, 5)(sample(clip), torch.Generator().manual_seed(seed))) for seed in range(30)
    ]
    assert all(value // 2 == part for row in drawn for part, value in enumerate(row))
    assert len({tuple(row) for row in drawn}) > 10


def test_training_augments_by_the_generator_alone() -> None:
    image = sample(np.asarray(picture(4)))
    transform = data.transforms.train(16)
    torch.manual_seed(0)
    first = transform(image, torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    assert torch.equal(first, transform(image, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, transform(image, torch.Generator().manual_seed(6)))
    assert first.min() >= -1
    assert first.max() <= 1


@pytest.mark.parametrize(
    ("caption", "tags", "mirrored"),
    [("a cat", (), True), ("an arrow to the left", (), False), ("an arrow", ("right-turn",), False)],
)
def test_mirror_images_only_where_no_side_is_named(caption: str, tags: tuple[str, ...], mirrored: bool) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = 255
    transform = data.transforms.train(8, scale=(1, 1), ratio=(1, 1))
    seen = {
        bool(transform(sample(image, caption, tags), torch.Generator().manual_seed(seed))[0, 0, 0] > 0)
        for seed in range(20)
    }
    assert seen == ({True, False} if mirrored else {True})


def test_thin_images_and_bad_arguments() -> None:
    thin = sample(np.full((1, 90, 3), 255, np.uint8))
    assert torch.equal(data.transforms.train(8)(thin, torch.Generator()), torch.ones(3, 8, 8))
    for make, words in (
        (lambda: data.transforms.train(0), "image_size is 0"),
        (lambda: data.transforms.train(8, scale=(0.0, 1.0)), "scale is"),
        (lambda: data.transforms.evaluate(8, 0), "num_frames 0"),
    ):
        with pytest.raises(data.DataError, match=words):
            make()


CAPTIONS = ["a large red circle", "a small blue square moving left", "Größe 🙂 naïve", "a red square"] * 3


def test_rows_are_start_text_end_padding() -> None:
    tokenizer = data.Tokenizer.train(CAPTIONS, 300)
    ids, lengths = tokenizer(["a red circle", "", "red " * 2_500], 12)
    assert ids.shape == (3, 12)
    assert ids.dtype == lengths.dtype == torch.int64
    assert (ids[:, 0] == tokenizer.start_id).all()
    for row, length in zip(ids, lengths, strict=True):
        assert row[length - 1] == tokenizer.end_id
        assert (row[length:] == tokenizer.pad_id).all()
        assert not torch.isin(row[1 : length - 1], torch.tensor([0, 1, 2])).any()
    assert lengths[1:].tolist() == [2, 12]
    assert ids.max() < tokenizer.vocab_size <= 300
    assert tokenizer.decode(ids[0]) == "a red circle"


def test_any_text_survives_and_special_tokens_cannot_be_typed() -> None:
    tokenizer = data.Tokenizer.train(CAPTIONS, 300)
    for text in ("größe 🙂", "日本語", "<end> <script>alert(1)</script>"):
        ids, lengths = tokenizer([text], 100)
        assert tokenizer.decode(ids[0]) == text
        assert (ids[0, 1 : lengths[0] - 1] > 2).all()


def test_tokenizers_round_trip_and_train_alike(tmp_path: Path) -> None:
    tokenizer = data.Tokenizer.train(CAPTIONS, 300)
    assert data.Tokenizer.train(CAPTIONS, 300).to_json() == tokenizer.to_json()
    (tmp_path / "t.json").write_text(tokenizer.to_json(), encoding="utf-8")
    for source in (tokenizer.to_json(), tmp_path / "t.json"):
        again = data.Tokenizer.load(source)
        assert torch.equal(again(CAPTIONS, 20)[0], tokenizer(CAPTIONS, 20)[0])


def test_tokenizer_errors(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="vocab_size is 10; at least 259"):
        data.Tokenizer.train(CAPTIONS, 10)
    with pytest.raises(data.DataError, match="cannot be read"):
        data.Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(data.DataError, match="not a tokenizer's JSON"):
        data.Tokenizer.load("{}")
    tokenizer = data.Tokenizer.train(CAPTIONS, 300)
    with pytest.raises(data.DataError, match="context_length is 2"):
        tokenizer(CAPTIONS, 2)
    with pytest.raises(TypeError, match="captions is one str"):
        tokenizer("a red circle", 8)
