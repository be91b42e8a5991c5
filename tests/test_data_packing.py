"""Packing folders into datasets, and reading them back."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_files import encoded, make_folder, picture, pictures_folder, png_claiming, video
from PIL import Image

from xray import data
from xray.data import packing, shards
from xray.data.clean import Cleaner, Looks, looks, split_of
from xray.data.dataset import Dataset
from xray.data.folder import clean_tags, read_folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated set: 240 samples of 16 pixels."""
    return data.generated(tmp_path_factory.mktemp("shapes") / "set", 240, 3, image_size=16)


def ledger(root: Path) -> dict[str, tuple[str, str]]:
    return {row["id"]: (row["step"], row["reason"]) for row in shards.read_ledger(root).to_pylist()}


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


def pack(source: Path, out: Path, **options: Any) -> packing.Packed:
    return data.pack(source, out, **{"num_workers": 0, "progress": False, "max_side": 24, **options})


def test_generated_set_is_deterministic_and_as_described(shapes: Path, tmp_path: Path) -> None:
    again = data.generated(tmp_path / "again", 240, 3, image_size=16)
    other = data.generated(tmp_path / "other", 240, 4, image_size=16)
    assert contents(again) == contents(shapes)
    assert contents(other) != contents(shapes)
    everything = Dataset(shapes, None)
    assert len(everything) == len(set(everything.column("caption"))) == 240
    assert len(set(everything.column("label"))) >= 10
    assert Counter(everything.column("media")) == {"image": 160, "clip": 80}
    for found in (everything[position] for position in range(240)):
        assert found.label in found.caption
        assert found.label in found.tags
        assert found.image.shape == ((4, 16, 16, 3) if found.media == "clip" else (16, 16, 3))
        assert found.media == "image" or not np.array_equal(found.image[0], found.image[-1])
    for split in ("train", "test"):
        assert {"image", "clip"} == set(Dataset(shapes, split).column("media"))


def test_webdataset_reads_the_shards(shapes: Path) -> None:
    import webdataset

    everything = Dataset(shapes, None)
    urls = [str(path) for path in sorted(shapes.glob("*.tar"))]
    rows = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(rows) == len(everything)
    for position, row in enumerate(rows[:40]):
        facts, found = json.loads(row["json"]), everything[position]
        assert (facts["id"], facts["caption"], facts["tags"]) == (found.id, found.caption, found.tags)
        pixels = np.asarray(Image.open(io.BytesIO(row[facts["extension"]])).convert("RGB"))
        assert np.array_equal(pixels, found.image.reshape(pixels.shape))


def test_dataset_selects(shapes: Path) -> None:
    everything, test = Dataset(shapes, None), Dataset(shapes, "test")
    assert len(Dataset(shapes, "train")) + len(test) == len(everything)
    assert set(Dataset(shapes, None, "clip").column("media")) == {"clip"}
    assert len(Dataset(shapes, None, min_tags=6)) == 0
    assert len(Dataset(shapes, None, source="elsewhere")) == 0
    assert test[-1].id == test[len(test) - 1].id
    with pytest.raises(IndexError):
        test[len(test)]
    with pytest.raises(data.DataError, match="split is 'dev'; one of train, test or None"):
        Dataset(shapes, "dev")


@pytest.mark.parametrize("names", ["csv", "jsonl", "sidecar"])
def test_captions_and_tags_come_from_metadata_or_text_files(names: str, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    (source / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "deep/b.png", "c.gif")):
        frames = [picture(10 * number + index) for index in range(3)]
        extra = {"save_all": True, "append_images": frames[1:]} if name.endswith("gif") else {}
        (source / name).write_bytes(encoded(frames[0], name[-3:].upper(), **extra))
    if names == "csv":
        with open(source / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "caption", "tags", "label"])
            writer.writerow(["a.png", 'a "quoted", caption', "#Red; cat ;red", "animal"])
            writer.writerow(["deep/b.png", "two\nlines", "", ""])
            writer.writerow(["c.gif", "x" * 10_000, "run", ""])
    elif names == "jsonl":
        rows = [
            {"file_name": "a.png", "text": 'a "quoted", caption', "tags": ["Red", "cat"], "label": "animal"},
            {"file_name": "c.gif", "caption": "x" * 10_000, "tags": ["run"]},
        ]
        make_folder(source, rows, {})
        (source / "deep" / "metadata.jsonl").write_text('{"file_name": "b.png", "caption": "two lines"}\n')
    else:
        for stem, text in (("a", 'a "quoted", caption'), ("deep/b", "two\nlines"), ("c", "x" * 10_000)):
            (source / f"{stem}.txt").write_text(text)
    packed = pack(source, tmp_path / "out")
    everything = Dataset(tmp_path / "out", None)
    assert sum(packed.kept.values()) == 3
    found = {sample.id: sample for sample in (everything[position] for position in range(3))}
    assert found["mine:a.png"].caption == 'a "quoted", caption'
    assert found["mine:deep/b.png"].caption == "two lines"
    assert found["mine:c.gif"].caption == "x" * 10_000
    assert found["mine:c.gif"].media == "clip"
    assert found["mine:c.gif"].image.shape == (3, 24, 24, 3)
    if names != "sidecar":
        assert found["mine:a.png"].tags == ["red", "cat"]
        assert found["mine:a.png"].label == "animal"


def test_everything_dropped_is_in_the_ledger(tmp_path: Path) -> None:
    good = encoded(picture(1), "PNG")
    brighter = Image.fromarray(np.clip(np.asarray(picture(1)).astype(int) + 1, 0, 255).astype(np.uint8))
    files = {
        "good.png": good,
        "same.png": encoded(picture(1), "BMP"),
        "near.png": encoded(brighter, "PNG"),
        "bomb.png": png_claiming(20_990, 29_700),
        "cut.png": good[:-80],
        "white.png": encoded(Image.new("RGB", (24, 24), "white"), "PNG"),
        "silent.png": encoded(picture(2), "PNG"),
        "tagged.png": encoded(picture(3), "PNG"),
        "oddtags.png": encoded(picture(4), "PNG"),
        "clip.mp4": video(12),
        "notes.md": b"not a picture",
    }
    rows: list[dict[str, Any]] = [
        {"file_name": name, "caption": name}
        for name in files
        if name not in ("silent.png", "tagged.png", "oddtags.png", "notes.md")
    ]
    rows += [{"file_name": "tagged.png", "tags": "x;y"}, {"file_name": "oddtags.png", "tags": 3}]
    rows += [
        {"file_name": "gone.png", "caption": "c"},
        {"file_name": "../up.png", "caption": "c"},
        {"caption": "c"},
    ]
    source = make_folder(tmp_path / "s", rows, files)
    (tmp_path / "up.png").write_bytes(good)
    packed = pack(source, tmp_path / "out")
    everything = Dataset(tmp_path / "out", None)
    assert sorted(everything.column("id")) == ["s:clip.mp4", "s:good.png", "s:tagged.png"]
    assert everything.column("caption")[everything.column("id").index("s:tagged.png")] == "x, y"
    reasons = ledger(tmp_path / "out")
    assert {id: step for id, (step, _) in reasons.items()} == {
        "s:same.png": "exact_duplicate",
        "s:near.png": "near_duplicate",
        "s:bomb.png": "decode",
        "s:cut.png": "decode",
        "s:white.png": "blank",
        "s:silent.png": "caption",
        "s:gone.png": "read",
        "s:../up.png": "read",
        "s:oddtags.png": "read",
        f"s:metadata.jsonl:{len(rows)}": "read",
    }
    assert "s:good.png" in reasons["s:same.png"][1]
    assert "623403000 pixels" in reasons["s:bomb.png"][1]
    assert "outside the folder" in reasons["s:../up.png"][1]
    assert packed.dropped == Counter(step for step, _ in reasons.values())
    assert "2 decode" in str(packed)


def test_packing_depends_on_the_input_only(tmp_path: Path) -> None:
    source = pictures_folder(tmp_path / "s", 40)
    pack(source, tmp_path / "one", shard_bytes=40_000)
    pack(source, tmp_path / "two", shard_bytes=40_000, num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("shard-*.tar"))) > 2
    everything = Dataset(tmp_path / "one", None)
    for position in (0, 17, 39):
        number = int(everything[position].id[-7:-4])
        assert np.array_equal(everything[position].image, np.asarray(picture(number)))


def test_identities_never_straddle_the_split(tmp_path: Path) -> None:
    source = tmp_path / "s"
    rows, files = [], {}
    for number in range(60):
        shown = np.asarray(picture(number)) // 2
        for kind, pixels in (("plain", shown), ("bright", shown + 90)):  # one shape in two colours
            name = f"{number}-{kind}.png"
            files[name] = encoded(Image.fromarray(pixels), "PNG")
            rows.append({"file_name": name, "caption": name})
    make_folder(source, rows, files)
    pack(source, tmp_path / "out")
    everything = Dataset(tmp_path / "out", None)
    sides: dict[str, set[str]] = {}
    for id, split in zip(everything.column("id"), everything.column("split"), strict=True):
        sides.setdefault(id.split("-")[0], set()).add(split)
    assert len(everything) == 120
    assert all(len(side) == 1 for side in sides.values())
    assert {"train"} in sides.values()
    assert {"test"} in sides.values()


def test_given_identities_split_and_only_their_own_near_duplicates_drop() -> None:
    cleaner = Cleaner()
    shown = np.asarray(picture(1)) // 2
    assert cleaner.judge("a", "cat", looks(shown[None])).identity == "cat"
    assert cleaner.judge("b", "dog", looks(shown[None] + 1)).identity == "dog"
    assert cleaner.judge("c", "", looks(shown[None] + 90)).identity == "cat"
    assert cleaner.judge("d", "cat", looks(shown[None] + 2)).step == "near_duplicate"
    shares = [split_of(f"identity {number}", seed=1) for number in range(4_000)]
    assert 300 < shares.count("test") < 500
    assert shares != [split_of(f"identity {number}", seed=2) for number in range(4_000)]


@given(shape=st.integers(0, 2**64 - 1), flipped=st.sets(st.integers(0, 63), max_size=8))
def test_looks_within_three_bits_share_an_identity(shape: int, flipped: set[int]) -> None:
    cleaner = Cleaner()
    black, white = (np.full((1, 16, 16, 3), level, np.uint8) for level in (0, 255))
    other = shape ^ sum(1 << bit for bit in flipped)
    first = cleaner.judge("a", "", Looks("1", shape, black)).identity
    assert (cleaner.judge("b", "", Looks("2", other, white)).identity == first) is (len(flipped) <= 3)


def test_a_clip_in_which_nothing_moves_is_an_image(tmp_path: Path) -> None:
    frames = [picture(1), picture(2)] * 2
    clip = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    rows = [{"file_name": "a.gif", "caption": "a"}]
    source = make_folder(tmp_path / "s", rows, {"a.gif": clip})
    pack(source, tmp_path / "moving", max_frames=3)
    pack(source, tmp_path / "still", max_frames=2)  # the second and the fourth frame, which are alike
    assert Dataset(tmp_path / "moving", None)[0].image.shape == (3, 24, 24, 3)
    assert Dataset(tmp_path / "still", None)[0].image.shape == (24, 24, 3)


def test_transparent_margins_are_cut(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste(picture(1), (8, 8))
    rows = [{"file_name": "a.png", "caption": "a"}]
    pack(make_folder(tmp_path / "s", rows, {"a.png": encoded(image, "PNG")}), tmp_path / "out")
    assert np.array_equal(Dataset(tmp_path / "out", None)[0].image, np.asarray(picture(1)))


def test_large_frames_are_stored_lossy_and_close(tmp_path: Path) -> None:
    smooth = [picture(number, 200) for number in (1, 2)]
    clip = encoded(smooth[0], "WEBP", save_all=True, append_images=smooth[1:], lossless=True)
    rows = [{"file_name": "a.webp", "caption": "a"}]
    pack(make_folder(tmp_path / "s", rows, {"a.webp": clip}), tmp_path / "out", max_side=160)
    everything = Dataset(tmp_path / "out", None)
    assert everything.column("extension") == ["jpg"]
    expected = np.stack([np.asarray(image.resize((160, 160), Image.Resampling.BICUBIC)) for image in smooth])
    assert np.abs(everything[0].image.astype(int) - expected).mean() < 3


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pictures_folder(tmp_path / "s", 8)
    real = tarfile.TarFile.addfile
    written = []

    def full(self: tarfile.TarFile, *arguments: Any) -> None:
        written.append(arguments)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, *arguments)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(data.DataError, match=r"no space is left to write .*out; free some"):
        pack(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]
    monkeypatch.undo()
    pack(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(data.DataError, match="holds files already"):
        pack(source, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_out_that_cannot_be_written(tmp_path: Path) -> None:
    source = pictures_folder(tmp_path / "s", 2)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises(data.DataError, match="cannot be written"):
            pack(source, out)


def test_a_killed_decoding_process_is_an_error_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_prepare", lambda record, limits: os._exit(9))
    with pytest.raises(data.DataError, match="a decoding process was killed"):
        pack(pictures_folder(tmp_path / "s", 3), tmp_path / "out", num_workers=2)


def _text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: None, "holds no images or clips"),
        (lambda folder: folder.rmdir(), "is no folder"),
        (_text("metadata.csv", "name,caption\na.png,b\n"), "has no column file_name"),
        (
            _text("metadata.jsonl", '{"file_name": "a", "caption": ""}\n' * 2),
            "line 2, and metadata.jsonl line 1",
        ),
        (lambda folder: (folder / "metadata.csv").write_bytes(b"file_name\n\xff\xfe\n"), "UTF-8"),
        (_text("metadata.jsonl", '{"file_name": "a.png"}\n'), "nothing of .* can be packed; 1 dropped"),
    ],
    ids=["empty", "missing", "no column", "repeated", "not text", "nothing left"],
)
def test_bad_folders(spoil: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    spoil(source)
    with pytest.raises(data.DataError, match=words) as caught:
        pack(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_arguments_of_pack(tmp_path: Path) -> None:
    source = pictures_folder(tmp_path / "s", 2)
    with pytest.raises(data.DataError, match="max_side and max_frames are 4 and 1"):
        pack(source, tmp_path / "out", max_side=4, max_frames=1)
    with pytest.raises(data.DataError, match=r"two folders both hold s:p000\.png"):
        data.pack([source, source], tmp_path / "out", progress=False)


def test_tags_are_cleaned() -> None:
    assert clean_tags(" #Sun ;sun;; two_words") == ["sun", "two words"]
    assert clean_tags('["A", "b;c"]') == ["a", "b;c"]
    assert clean_tags(None) == clean_tags("") == []
    with pytest.raises(data.DataError, match="a list of strings or one string"):
        clean_tags([1])


def test_hidden_files_and_links_out_are_left_alone(tmp_path: Path) -> None:
    source = pictures_folder(tmp_path / "s", 2)
    (source / ".hidden").mkdir()
    (source / ".hidden" / "x.png").write_bytes(encoded(picture(7), "PNG"))
    assert len(read_folder(source).records) == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: shutil.rmtree(root), "is no folder; a packed dataset is needed"),
        (lambda root: (root / "index.parquet").unlink(), "holds no index.parquet"),
        (lambda root: (root / "index.parquet").write_bytes(b"PAR1 no"), "cannot be read as Parquet"),
        (lambda root: _rewrite_index(root, drop="caption"), "lacks the columns caption"),
        (lambda root: _rewrite_index(root, shard="../shard-00000.tar"), "outside its folder"),
    ],
    ids=["no folder", "no index", "damaged", "no column", "outside"],
)
def test_bad_datasets(spoil: Callable[[Path], object], words: str, shapes: Path, tmp_path: Path) -> None:
    root = shutil.copytree(shapes, tmp_path / "set")
    spoil(root)
    with pytest.raises(data.DataError, match=words):
        Dataset(root)


def _rewrite_index(root: Path, drop: str = "", shard: str = "") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = shards.read_index(root)
    if drop:
        table = table.drop_columns([drop])
    if shard:
        place = table.column_names.index("shard")
        table = table.set_column(place, "shard", pa.array([shard] * len(table)))
    pq.write_table(table, root / "index.parquet")
