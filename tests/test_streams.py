"""Streams of tar shards: the same batches on any ranks and workers, from any state, through every fault."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from media_files import encoded, picture, video

from xray import data
from xray.data import batches, readers, shard_files
from xray.data.readers import Reader
from xray.data.shards import Entry, ShardWriter, encode
from xray.train import recipes
from xray.train.distributed import World
from xray.train.sources import open_source

AUGMENT = data.transforms.train(8, 2)


@pytest.fixture(autouse=True)
def nothing_skipped_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_skipped", {})
    monkeypatch.setattr(shard_files, "FIRST_PAUSE", 0.001)


def write_set(root: Path, name: str, count: int, clip_every: int = 0, shard_bytes: int = 12_000) -> Path:
    """A packed set of pictures of 8 pixels, with 2 to 5 in a shard; every so many is a clip."""
    random = np.random.default_rng(sum(name.encode()))
    with ShardWriter(root / name, shard_bytes=shard_bytes) as writer:
        for number in range(count):
            kind = "clip" if clip_every and number % clip_every == 0 else "image"
            frames = random.integers(0, 256, (3 if kind == "clip" else 1, 8, 8, 3), np.uint8)
            content, extension = encode(frames, kind)
            id = f"{name}-{number:03d}"
            entry = Entry(id, kind, extension, f"caption of {id}", [name, str(number)], frames=len(frames), source=name)
            writer.add(entry, content)
    return root / name


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sets: 60 pictures, 20 of them clips, and 30 pictures, 6 of them clips."""
    root = tmp_path_factory.mktemp("sets")
    return write_set(root, "large", 60, 3), write_set(root, "small", 30, 5)


def joined(parts: list[data.Batch]) -> data.Batch:
    """The global batch of its ranks' parts."""
    whole = data.Batch(torch.cat([part.pixels for part in parts]), [], [], [], [], parts[0].media)
    for part in parts:
        whole.ids += part.ids
        whole.captions += part.captions
        whole.state |= part.state
    return whole


def run(stream: data.Stream, steps: int, batch: int = 8, world: int = 1, **options: Any) -> list[data.Batch]:
    """The global batches of some steps."""
    transform = options.pop("transform", AUGMENT)
    ranks = [
        list(
            islice(data.stream_loader(stream, batch // world, transform, rank=rank, world_size=world, **options), steps)
        )
        for rank in range(world)
    ]
    return [joined(list(parts)) for parts in zip(*ranks, strict=True)]


def assert_same(first: list[data.Batch], second: list[data.Batch]) -> None:
    assert [batch.ids for batch in first] == [batch.ids for batch in second]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert (one.captions, one.media, one.state) == (other.captions, other.media, other.state)


def mixed(sets: tuple[Path, ...], **options: Any) -> data.Stream:
    defaults = {"weights": (3, 1), "seed": 7, "readers": 4, "shuffle_buffer": 7}
    return data.Stream([str(path) for path in sets], **{**defaults, **options})


def test_batches_depend_neither_on_ranks_nor_on_workers(sets: tuple[Path, Path]) -> None:
    stream = mixed(sets)
    alone = run(stream, 12, clip_fraction=0.25)
    assert {batch.media for batch in alone} == {"image", "clip"}
    for world, workers in ((2, 0), (4, 0), (1, 3), (2, 5)):
        assert_same(alone, run(stream, 12, world=world, num_workers=workers, clip_fraction=0.25))
    assert run(mixed(sets, seed=8), 1)[0].ids != alone[0].ids


def test_going_on_from_any_step_is_bit_equal(sets: tuple[Path, Path]) -> None:
    stream = mixed(sets)
    straight = run(stream, 50, clip_fraction=0.3)  # some ten epochs of each reader
    draws = random.Random(0)
    for start in [1, 49, *draws.sample(range(2, 49), 12)]:
        steps = min(5, 50 - start)
        more = run(stream, steps, world=draws.choice([1, 2, 4]), **going_on(straight, start), clip_fraction=0.3)
        assert_same(straight[start : start + steps], more)


def going_on(made: list[data.Batch], step: int) -> dict[str, Any]:
    return {"start_step": step, "state": made[step - 1].state}


def test_workers_that_read_ahead_and_go_on_give_the_state_of_the_batch_that_came(sets: tuple[Path, Path]) -> None:
    stream = mixed(sets)
    straight = run(stream, 14, clip_fraction=0.3)
    ahead = run(stream, 5, num_workers=2, clip_fraction=0.3)
    more = run(stream, 5, world=2, num_workers=2, **going_on(ahead, 5), clip_fraction=0.3)
    again = run(stream, 4, num_workers=3, start_step=10, state=more[-1].state, clip_fraction=0.3)
    assert_same(straight, ahead + more + again)


def test_an_epoch_reads_every_shard_once_and_no_two_alike(tmp_path: Path) -> None:
    root = write_set(tmp_path, "even", 60, shard_bytes=10_000)
    shards = sorted(root.glob("*.tar"))
    assert len({path.stat().st_size for path in shards}) == 1
    stream = data.Stream(str(root), readers=3, shuffle_buffer=1, seed=1)
    ids = [batch.ids for batch in run(stream, 20, 6)]
    epochs = [[id for batch in ids[start : start + 10] for id in batch] for start in (0, 10)]
    assert all(len(set(epoch)) == 60 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert len(stream.shards[0]) == stream.num_shards == len(shards)


def test_the_buffer_shuffles_over_shards(tmp_path: Path) -> None:
    root = write_set(tmp_path, "long", 60)
    stream = data.Stream(str(root), shuffle_buffer=30)
    in_order = [batch.ids for batch in run(data.Stream(str(root), shuffle_buffer=1), 15, 4)]
    shuffled = [batch.ids for batch in run(stream, 15, 4)]
    place = {id: number for number, id in enumerate(id for batch in in_order for id in batch)}
    steps = np.diff([place[id] for batch in shuffled for id in batch])
    assert np.mean(steps == 1) < 0.2
    assert np.abs(steps).mean() > 10


def test_sources_are_mixed_by_weight(sets: tuple[Path, Path]) -> None:
    for weights, low, high in (((3, 1), 0.66, 0.84), (None, 0.4, 0.6), ((0, 2), 0.0, 0.0), ((1, 0), 1.0, 1.0)):
        made = run(mixed(sets, weights=weights), 25)
        share = np.mean([id.startswith("large") for batch in made for id in batch.ids])
        assert low <= share <= high
    assert mixed(sets, weights=(3, 1)).weights == (0.75, 0.25)
    made = run(mixed(sets, shuffle_buffer=1), 10)
    drawn = [[batch.ids[slot].split("-")[0] for batch in made] for slot in (0, 2, 4, 6)]  # of four readers
    assert drawn[0] != drawn[1] != drawn[2] != drawn[3]


def test_samples_are_those_of_the_packed_dataset(sets: tuple[Path, Path]) -> None:
    dataset = data.Dataset(sets[0])
    stored = {sample.id: sample for sample in (dataset[place] for place in range(len(dataset)))}
    for media in ("image", "clip"):
        reader = Reader(data.Stream(str(sets[0]), shuffle_buffer=5), 0)
        drawn = {sample.id: sample for sample in (reader.sample(media) for _ in range(60))}
        assert len(drawn) > 10
        for id, sample in drawn.items():
            assert np.array_equal(sample.image, stored[id].image)
            assert (sample.caption, sample.tags, sample.source, sample.media) == (
                stored[id].caption,
                stored[id].tags,
                stored[id].source,
                media,
            )


def test_webdataset_reads_our_shards_and_we_read_its_own(sets: tuple[Path, Path], tmp_path: Path) -> None:
    for path in sets[0].glob("*.tar"):
        theirs = webdataset.WebDataset(str(path), shardshuffle=False)
        facts = [json.loads(sample["json"]) for sample in theirs]
        ours = list(data.Stream(str(path), split=None).texts(99))
        assert ours == [(fact["caption"], fact["tags"]) for fact in facts]
        assert facts
    clip = video(12)
    with webdataset.TarWriter(str(tmp_path / "foreign.tar")) as writer:
        png, jpg = encoded(picture(0), "PNG"), encoded(picture(1), "JPEG")
        writer.write({"__key__": "0", "jpg": jpg, "txt": "zero", "json": {"caption": "zero", "key": "0", "url": "u"}})
        writer.write({"__key__": "a.b/1", "png": png, "txt": "one ", "cls": 4})
        writer.write({"__key__": "2", "seg.png": png, "JPG": jpg, "json": {"tags": "red, blue,", "id": 12}})
        writer.write({"__key__": "3", "json": {"caption": "no media"}})
        writer.write({"__key__": "4" * 120, "mp4": clip, "json": {"caption": None}, "txt": "a clip"})
        writer.write({"__key__": "5", "jpg": jpg, "json": {"split": "test"}})
        writer.write({"__key__": "__notes__/5", "jpg": jpg})
        writer.write({"__key__": "6", "jpg": jpg, "json": b"[1]", "txt": b"\xff"})
        writer.write({"__key__": "7", "jpg": jpg, "json": b'{"caption": "half \\ud83d", "media": 3, "tags": [true]}'})
    stream = data.Stream(str(tmp_path), shuffle_buffer=1)
    assert list(stream.texts(9)) == [("zero", []), ("one", []), ("", ["red", "blue"]), ("a clip", []), ("half ?", [])]
    assert list(data.skipped()) == [f"{tmp_path}/foreign.tar#6"]
    reader = Reader(stream, 0)
    drawn = [reader.sample("image") for _ in range(3)]
    assert [(sample.id, sample.label) for sample in drawn] == [("0", ""), ("a.b/1", "4"), ("12", "")]
    assert np.array_equal(drawn[1].image, np.asarray(picture(0)))
    sample = reader.sample("clip")
    assert (sample.id, sample.image.shape) == ("4" * 120, (12, 32, 32, 3))
    small = Reader(data.Stream(str(tmp_path), shuffle_buffer=1, max_side=16, max_frames=5), 0)
    assert small.sample("clip").image.shape == (5, 16, 16, 3)
    assert small.sample("image").image.shape == (16, 16, 3)


def test_split_media_and_tags_choose_samples(sets: tuple[Path, Path], tmp_path: Path) -> None:
    def count(**options: Any) -> int:
        return len(list(data.Stream(str(sets[0]), **options).texts(1000)))

    assert [count(), count(media="clip"), count(split="test"), count(min_tags=3)] == [60, 20, 0, 0]
    assert {batch.media for batch in run(data.Stream(str(sets[0]), media="clip"), 3)} == {"clip"}
    assert {batch.media for batch in run(data.Stream(str(sets[0]), media="image"), 3, clip_fraction=0.9)} == {"image"}
    with pytest.raises(data.DataError, match=r"reader 0 finds no image in .*large; choose other sources"):
        run(data.Stream(str(sets[0]), min_tags=3), 1)


def test_samples_without_a_caption_stay_away_where_captions_are_wanted(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", shard_bytes=8_000) as writer:
        for number in range(12):
            frames = np.random.default_rng(number).integers(0, 256, (1, 8, 8, 3), np.uint8)
            content, extension = encode(frames, "image")
            writer.add(Entry(f"{number}", "image", extension, ("", " ", "a dog")[number % 3]), content)
    plain, captioned = (data.Stream(str(tmp_path / "set"), captioned=wanted) for wanted in (False, True))
    assert {caption for batch in run(plain, 6, 4) for caption in batch.captions} == {"", " ", "a dog"}
    assert {caption for batch in run(captioned, 6, 4) for caption in batch.captions} == {"a dog"}
    assert plain.fingerprint != captioned.fingerprint
    assert [len(list(stream.texts(100))) for stream in (plain, captioned)] == [12, 4]
    assert data.Dataset(tmp_path / "set").column("id") == [str(number) for number in range(12)]
    assert data.Dataset(tmp_path / "set", captioned=True).column("id") == ["2", "5", "8", "11"]
    place = World(0, 1, torch.device("cpu"))
    for recipe, count in ((recipes.mae_tiny(), 12), (recipes.clip_tiny(), 4)):
        for stream in (False, True):
            recipe = dataclasses.replace(recipe, data=str(tmp_path / "set"), stream=stream)
            assert len(list(open_source(recipe, tmp_path, place).texts())) == count


def test_texts_come_from_all_sources_in_turn(sets: tuple[Path, Path]) -> None:
    texts = [caption for caption, _ in mixed(sets).texts(70)]
    assert texts[:4] == [f"caption of {name}" for name in ("large-000", "small-000", "large-001", "small-001")]
    assert Counter(text.split()[-1].split("-")[0] for text in texts) == {"large": 40, "small": 30}
    assert len(list(mixed(sets).texts(3))) == 3


@pytest.mark.parametrize("protocol", ["memory://", "file://"])
def test_shards_come_from_any_file_system(sets: tuple[Path, Path], tmp_path: Path, protocol: str) -> None:
    local = mixed(sets[:1], weights=None)
    root = f"{protocol}{tmp_path}/copied"
    for shard in local.shards[0]:
        with fsspec.open(f"{root}/{os.path.basename(shard)}", "wb", auto_mkdir=True) as file:
            file.write(Path(shard).read_bytes())
    last = len(local.shards[0]) - 1
    made = run(local, 6)
    for source in (root, f"{root}/shard-{{00000..{last:05d}}}.tar", f"{root}/*.tar"):
        stream = data.Stream(source, seed=7, readers=4, shuffle_buffer=7)
        assert stream.fingerprint == local.fingerprint
        assert_same(made, run(stream, 3) + run(stream, 3, start_step=3, state=made[2].state, num_workers=2))


class Faulty(fsspec.AbstractFileSystem):
    """Files in memory whose reads do as a test says."""

    protocol = "faulty"
    cachable = False
    files: dict[str, bytes] = {}  # noqa: RUF012 -- one for all instances
    read: Callable[[str, io.BytesIO, int], bytes] = staticmethod(lambda path, file, size: file.read(size))
    seeks = True

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        class File(io.BytesIO):
            def read(file, size: int | None = -1) -> bytes:
                return Faulty.read(path, super(), size)  # type: ignore[arg-type]

            def seek(file, *place: int) -> int:
                if not Faulty.seeks:
                    raise ValueError("Cannot seek streaming file")
                return super().seek(*place)

        return File(Faulty.files[path])


@pytest.fixture
def faulty(sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the larger set on a file system that fails as `Faulty.read` says."""
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    shards = sorted(sets[0].glob("*.tar"))
    monkeypatch.setattr(Faulty, "files", {path.name: path.read_bytes() for path in shards})
    monkeypatch.setattr(Faulty, "read", Faulty.read)
    return f"faulty://shard-{{00000..{len(shards) - 1:05d}}}.tar"


def of_shard(sets: tuple[Path, Path], number: int) -> set[str]:
    """The ids of the samples in a shard of the larger set."""
    index = data.Dataset(sets[0]).index.to_pylist()
    return {row["id"] for row in index if row["shard"] == f"shard-{number:05d}.tar"}


def test_a_stalled_shard_is_given_up_and_counted(
    faulty: str, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def read(path: str, file: io.BytesIO, size: int) -> bytes:
        if path == "shard-00002.tar" and file.tell() >= 4096:
            released.wait(30)
        return file.read(min(size, 2048))

    monkeypatch.setattr(Faulty, "read", read)
    stream = data.Stream(faulty, readers=2, shuffle_buffer=4, read_timeout=0.3)
    try:
        made = run(stream, 12)
    finally:
        released.set()
    assert data.skipped() == {
        "faulty://shard-00002.tar": "the reader stalled: no byte came for 0.3 seconds",
    }
    ids = {id for batch in made for id in batch.ids}
    assert len(of_shard(sets, 2) & ids) < len(of_shard(sets, 2))
    assert of_shard(sets, 3) & ids


def test_errors_of_a_moment_are_tried_again_where_they_came(
    faulty: str, sets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Counter[str]()

    def read(path: str, file: io.BytesIO, size: int) -> bytes:
        calls[path] += 1
        if calls[path] % 3:
            raise OSError("connection reset")
        return file.read(min(size, 2048))

    expected = run(data.Stream(faulty, shuffle_buffer=4), 6)
    monkeypatch.setattr(Faulty, "read", read)
    assert_same(expected, run(data.Stream(faulty, shuffle_buffer=4), 6))
    assert len(calls) > 8
    assert not data.skipped()


def test_a_stream_without_seeking_goes_on_too(faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = data.Stream(faulty, readers=2, shuffle_buffer=9)
    straight = run(stream, 12)
    monkeypatch.setattr(Faulty, "seeks", False)
    assert_same(straight[7:], run(stream, 5, **going_on(straight, 7)))


def whole_groups(content: bytes, size: int) -> int:
    """How many samples of a shard stand before a cut, by tarfile's own listing: up to the next one's header."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
        ends = [member.offset for member in members[2::2]] + [tar.offset]
    return sum(end + tarfile.BLOCKSIZE <= size for end in ends)


def test_what_stands_before_a_cut_counts(sets: tuple[Path, Path], tmp_path: Path) -> None:
    content = (sets[0] / "shard-00000.tar").read_bytes()
    path = tmp_path / "cut.tar"
    last = len(content.rstrip(b"\0"))
    cuts = [0, 1, 511, 512, 513, 1024, last, len(content), *random.Random(1).sample(range(last), 40)]
    counts = set()
    for cut in [*cuts, *(block * 512 for block in range(0, last // 512, 3))]:
        batches._skipped.clear()
        path.write_bytes(content[:cut])
        texts = list(data.Stream(str(path)).texts(99))
        assert len(texts) == whole_groups(content, cut)
        assert (str(path) in data.skipped()) == (cut <= last)
        counts.add(len(texts))
    assert len(counts) > 4
    path.write_bytes(content[:last][:-600] + b"\1" * 600)
    list(data.Stream(str(path)).texts(99))
    assert str(path) in data.skipped()


def test_hostile_bytes_end_a_shard_and_nothing_else(sets: tuple[Path, Path], tmp_path: Path) -> None:
    content = (sets[0] / "shard-00000.tar").read_bytes()
    path = tmp_path / "hostile.tar"
    stream = data.Stream(str(path))
    draws = random.Random(2)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(draws.randint(1, 20)):
            header = 512 * draws.randrange(len(content) // 512)
            damaged[header + draws.choice([0, 124, 130, 148, 156, draws.randrange(512)])] = draws.randrange(256)
        path.write_bytes(damaged)
        assert len(list(stream.texts(99))) <= whole_groups(content, len(content))
    for claim in (2**40, -512, -(2**40)):
        member = tarfile.TarInfo("a.jpg")
        member.size = claim
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + content)
        batches._skipped.clear()
        assert not list(stream.texts(99))
        assert "damaged" in data.skipped()[str(path)]


def copied(sets: tuple[Path, Path], tmp_path: Path) -> Path:
    root = tmp_path / "damaged"
    root.mkdir()
    for path in sets[0].glob("*.tar"):
        (root / path.name).write_bytes(path.read_bytes())
    return root


def test_damaged_and_missing_shards_are_survived_and_named_once(
    sets: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = copied(sets, tmp_path)
    content = (root / "shard-00001.tar").read_bytes()
    (root / "shard-00001.tar").write_bytes(content[: len(content) // 2])
    (root / "shard-00003.tar").write_bytes(b"not a tar file, but a page that says so" * 50)
    stream = data.Stream(str(root), readers=2, shuffle_buffer=3)
    (root / "shard-00005.tar").unlink()
    for workers in (0, 2):
        made = run(stream, 40, num_workers=workers)
        reasons = {os.path.basename(name): reason for name, reason in data.skipped().items()}
        assert sorted(reasons) == ["shard-00001.tar", "shard-00003.tar", "shard-00005.tar"]
        assert "cut off" in reasons["shard-00001.tar"]
        assert "No such file" in reasons["shard-00005.tar"]
    named = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped")]
    assert len(named) == 3
    images = {id for batch in made for id in batch.ids}
    assert images & of_shard(sets, 1)
    assert len(images) > 25
    assert_same(made[20:24], run(stream, 4, **going_on(made, 20)))
    cut = data.Stream(str(root / "shard-00001.tar"), shuffle_buffer=2)
    assert len({id for batch in run(cut, 4) for id in batch.ids}) > 1


def test_a_corrupt_picture_is_replaced_by_the_next_of_the_stream(sets: tuple[Path, Path], tmp_path: Path) -> None:
    root = copied(sets, tmp_path)
    row = next(row for row in data.Dataset(sets[0], media="image").index.to_pylist() if row["shard"].endswith("2.tar"))
    with open(root / row["shard"], "r+b") as file:
        file.seek(row["offset"])
        file.write(b"\0" * 20)
    stream, sound = (data.Stream(str(path), shuffle_buffer=5) for path in (root, sets[0]))
    notes = [note for batch in islice(data.stream_loader(stream, 8, AUGMENT), 10) for note in batch.skipped]
    assert 1 <= len(notes) <= 3  # 80 draws of 40 pictures
    made = [id for batch in run(stream, 10) for id in batch.ids]
    assert data.skipped() == {row["id"]: "the file is no image or video of a known format"}
    undamaged = [id for batch in run(sound, 15) for id in batch.ids]
    assert made == [id for id in undamaged if id != row["id"]][: len(made)]


def test_nothing_readable_ends_the_run_with_the_cause(sets: tuple[Path, Path], tmp_path: Path) -> None:
    missing = data.Stream(f"{tmp_path}/none-{{0..40}}.tar", readers=2)
    with pytest.raises(data.DataError, match=r"none-.* cannot be read: 16 shards failed .* No such file"):
        run(missing, 1)
    one = data.Stream([str(sets[0]), f"{tmp_path}/none-{{0..1}}.tar"], readers=2, weights=(9, 1))
    with pytest.raises(data.DataError, match=r"none-.* cannot be read: 2 shards failed"):
        run(one, 30, num_workers=2)
    root = copied(sets, tmp_path)
    stream = data.Stream(str(root), shuffle_buffer=1)
    made = run(stream, 2)
    for path in root.glob("*.tar"):
        path.unlink()
    with pytest.raises(data.DataError, match="cannot be read"):
        run(stream, 20, **going_on(made, 2))


def test_missing_shards_between_others_do_not_end_the_run(sets: tuple[Path, Path], tmp_path: Path) -> None:
    images = write_set(tmp_path, "images", 150)
    clips = write_set(tmp_path, "clips", 2, 1)
    numbers = range(len(list(images.glob("*.tar"))))
    assert len(numbers) > 22
    os.replace(clips / "shard-00000.tar", images / "shard-00006.tar")
    for number in (*numbers[1:6], *numbers[7:19]):  # more than may fail one after the other
        (images / f"shard-{number:05d}.tar").unlink()
    source = f"{images}/shard-{{{numbers[0]:05d}..{numbers[-1]:05d}}}.tar"
    stream = data.Stream(source, shuffle_buffer=2)
    run(stream, 2 * len(numbers))
    assert len(data.skipped()) == 17
    start = data.Stream(f"{images}/shard-{{00000..00006}}.tar", shuffle_buffer=2)
    made = run(start, 2, clip_fraction=1.0)
    assert {id for batch in made for id in batch.ids} == {"clips-000", "clips-001"}
    few = data.Stream([f"{images}/shard-{{00000..00001}}.tar", str(sets[1])], shuffle_buffer=2)
    assert run(few, 3, clip_fraction=1.0)[-1].ids[0].startswith("small")


def test_pictures_that_all_are_corrupt_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CORRUPT", 7)
    with webdataset.TarWriter(str(tmp_path / "bad.tar")) as writer:
        writer.write({"__key__": "0", "jpg": b"nothing", "txt": "zero"})
    with pytest.raises(data.DataError, match="7 images in a row cannot be decoded, the last, 0, because the file is"):
        run(data.Stream(str(tmp_path), shuffle_buffer=2), 1)


def test_a_kind_in_few_shards_is_found_by_every_reader(sets: tuple[Path, Path], tmp_path: Path) -> None:
    images = write_set(tmp_path, "images", 90)
    clips = write_set(tmp_path, "clips", 6, 1, shard_bytes=10**6)
    (images / "shard-99999.tar").write_bytes((clips / "shard-00000.tar").read_bytes())
    stream = data.Stream(str(images), readers=4, shuffle_buffer=3)
    assert stream.num_shards > readers.LOOK + 4
    made = run(stream, 9, clip_fraction=1.0)
    assert {id for batch in made for id in batch.ids} == {f"clips-{number:03d}" for number in range(6)}
    assert_same(made[5:], run(stream, 4, **going_on(made, 5), clip_fraction=1.0))


def test_a_source_without_the_kind_weighs_nothing(sets: tuple[Path, Path], tmp_path: Path) -> None:
    images = write_set(tmp_path, "images", 60)
    both = data.Stream([str(images), str(sets[1])], readers=2, shuffle_buffer=3, weights=(50, 1))
    made = run(both, 8, clip_fraction=0.5)
    assert all(id.startswith("small") for batch in made if batch.media == "clip" for id in batch.ids)
    assert any(id.startswith("images") for batch in made for id in batch.ids)
    assert_same(made[5:], run(both, 3, **going_on(made, 5), clip_fraction=0.5))
    count = len(both.shards[0])
    assert data.skipped() == {str(images): f"no clip is in 8 of its {count} shards, so none is looked for"}
    with pytest.raises(data.DataError, match=r"reader 0 finds no clip in .*images; .*clip_fraction"):
        run(data.Stream(str(images), readers=2), 8, clip_fraction=0.5)
    one_lacks = data.Stream([str(images), str(sets[1])], readers=2, weights=(1, 0))
    with pytest.raises(data.DataError, match="reader 0 finds no clip"):
        run(one_lacks, 1, clip_fraction=1.0)


def test_a_worker_that_dies_is_named_and_none_is_left(sets: tuple[Path, Path]) -> None:
    def die(sample: data.Sample, generator: torch.Generator | None) -> torch.Tensor:
        info = torch.utils.data.get_worker_info()
        if info is not None and info.id == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return AUGMENT(sample, generator)

    with pytest.raises(data.DataError, match=r"a process that reads the stream died \(.*pid"):
        next(data.stream_loader(mixed(sets), 8, die, num_workers=2))
    gc.collect()  # the traceback holds the loader
    assert not multiprocessing.active_children()
    made = data.stream_loader(mixed(sets), 8, AUGMENT, num_workers=2)
    next(made)
    assert len(multiprocessing.active_children()) == 2
    del made
    assert not multiprocessing.active_children()


def test_samples_are_augmented_as_by_the_loader(sets: tuple[Path, Path]) -> None:
    def seed_of(sample: data.Sample, generator: torch.Generator | None) -> torch.Tensor:
        assert generator is not None
        return torch.tensor([generator.initial_seed()])

    stream = mixed(sets)
    made = run(stream, 3, world=2, transform=seed_of, clip_fraction=0.5)
    datasets = [data.Dataset(path) for path in sets]
    expected = islice(data.loader(datasets, 8, seed_of, seed=stream.seed, clip_fraction=0.5), 3)
    for batch, other in zip(made, expected, strict=True):
        assert torch.equal(batch.pixels, other.pixels)
        assert batch.media == other.media
        assert len(batch.pixels.unique()) == 8


def test_random_numbers_of_the_process_are_left_alone(sets: tuple[Path, Path]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(mixed(sets), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_sources_are_split_at_commas_outside_of_braces() -> None:
    assert data.parse_sources(" a, s3://b/{x,y}-{0..2}.tar ,,c") == ["a", "s3://b/{x,y}-{0..2}.tar", "c"]
    assert data.Stream("a-{x,y}.tar, b-{0..2}.tar").shards == [
        ["a-x.tar", "a-y.tar"],
        ["b-0.tar", "b-1.tar", "b-2.tar"],
    ]


@pytest.mark.parametrize(
    ("sources", "options", "words"),
    [
        ("", {}, "sources is empty"),
        ("a.tar", {"weights": (1, 2)}, r"weights are \(1, 2\) for 1 sources"),
        ("a.tar", {"weights": (-1,)}, "from 0 up"),
        ("a.tar", {"weights": (float("nan"),)}, "from 0 up"),
        ("a.tar", {"readers": 0}, "readers is 0; at least 1"),
        ("a-{0..2}.tar", {"readers": 4}, r"a-\{0..2\}.tar has 3 shards for 4 readers; set readers to at most 3"),
        ("a.tar", {"split": "val"}, "split is 'val'"),
        ("a.tar", {"media": "sound"}, "media is 'sound'"),
        ("a.tar", {"read_timeout": 0}, "read_timeout is 0"),
        ("a.tar", {"shuffle_buffer": 0}, "shuffle_buffer is 0"),
        ("nothing-here", {}, "nothing-here cannot be listed"),
        ("*nothing.tar", {}, r"\*nothing.tar holds no shards"),
        ("odd://a.tar", {}, "odd://a.tar cannot be listed: Protocol not known"),
    ],
)
def test_bad_arguments_of_a_stream(sources: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(data.DataError, match=words) as caught:
        data.Stream(sources, **options)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_holds_no_shards(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="holds no shards; a folder with"):
        data.Stream(str(tmp_path))


def test_bad_arguments_and_states_of_the_loader(sets: tuple[Path, Path]) -> None:
    stream = mixed(sets)
    made = run(stream, 3)
    state = made[2].state

    def start(stream: data.Stream = stream, **options: Any) -> None:
        next(data.stream_loader(stream, **{"batch_size": 8, "transform": AUGMENT, **options}))

    for options, words in (
        ({"batch_size": 6}, "batch_size is 6 over 1 ranks for 4 readers; the number of readers must divide"),
        ({"world_size": 3, "batch_size": 4}, "batch_size is 12 over 3 ranks for 4 readers"),
        ({"batch_size": 0}, "batch_size, start_step"),
        ({"rank": 1}, "rank is 1 of world_size 1"),
        ({"clip_fraction": 2}, "clip_fraction is 2"),
        ({"start_step": 3}, "state of reader 0 after step 3 is missing"),
        ({"start_step": 3, "state": {0: state[0]}}, "state of reader 1 after step 3 is missing"),
        ({"start_step": 2, "state": state}, "state is of reader 0 after step 3; that of reader 0 after step 2"),
        ({"state": state}, "after step 0 is needed"),
        ({"start_step": 3, "state": {**state, 0: state[1]}}, "state is of reader 1"),
        ({"start_step": 3, "state": {**state, 0: state[0][:-3]}}, "state of reader 0 is damaged"),
        ({"start_step": 3, "state": {**state, 0: state[0][:-14]}}, "state of reader 0 is damaged"),
        ({"start_step": 3, "state": {**state, 0: b"\x80\x04"}}, "state of reader 0 is damaged"),
        ({"start_step": 3, "state": {**state, 0: b"[]"}}, "state of reader 0 is damaged"),
        ({"start_step": 3, "state": state, "stream": mixed(sets, readers=2)}, "of 4 readers and this one has 2"),
        ({"start_step": 3, "state": state, "stream": mixed(sets, seed=1)}, "of another stream: to go on"),
        ({"start_step": 3, "state": state, "stream": mixed(sets[::-1])}, "of another stream: to go on"),
    ):
        with pytest.raises(data.DataError, match=words):
            start(**options)


def test_a_state_is_small_and_holds_no_media(sets: tuple[Path, Path]) -> None:
    few, many = (len(run(mixed(sets, shuffle_buffer=size), 1)[0].state[0]) for size in (10, 510))
    assert many - few < 500 * 14 + 100
    assert few < 1000


def test_an_animation_is_a_clip_where_its_json_says_so(tmp_path: Path) -> None:
    frames = [picture(number) for number in range(4)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for media in ("clip", "image"):
        with webdataset.TarWriter(str(tmp_path / f"{media}.tar")) as writer:
            writer.write({"__key__": media, "gif": gif, **({"json": {"media": "clip"}} if media == "clip" else {})})
    reader = Reader(data.Stream(str(tmp_path), shuffle_buffer=1), 0)
    assert reader.sample("clip").image.shape == (4, 24, 24, 3)
    assert reader.sample("image").image.shape == (24, 24, 3)
