"""Curation's last step: the shards, their index, and how they do not depend on who writes them."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from curate_frames import context_for, frame_of, rows_of
from curate_steps import finish, in_parts
from daft import DataFrame
from limits import small_files
from media_files import picture

from xray import data
from xray.curate import shards
from xray.curate.frame import keeping, kept
from xray.curate.step import ROWS, Context, stored
from xray.data.dataset import Dataset
from xray.data.shards import encode, read_facts, read_index, read_ledger


def samples(count: int) -> list[dict[str, Any]]:
    """Rows as `decode` leaves them; every third is a clip."""
    rows = []
    for number in range(count):
        shown = [picture(number), picture(number + 1000)] if number % 3 == 0 else [picture(number)]
        frames = np.stack([np.asarray(image) for image in shown])
        media = "clip" if len(frames) > 1 else "image"
        content, extension = encode(frames, media)
        row: dict[str, Any] = {"id": f"{number:03d}", "media": media, "extension": extension, "width": 24, "height": 24}
        row |= {"frames": len(frames), "data": content, "data_size": len(content), "tags": ["a", f"tag {number}"]}
        row |= {
            "caption": f"picture {number}",
            "identity": f"i{number}",
            "split": "test" if number % 5 == 0 else "train",
        }
        rows.append({**row, "copies": 1, "probability": 1.0})
    return rows


def before_shards(
    folder: Path, rows: list[dict[str, Any]], *, partitions: int = 1, has_media: bool = True, **settings: Any
) -> tuple[DataFrame, Context]:
    """What the step is given: samples that are left, and their media in the table of `decode`."""
    frame = keeping(frame_of(rows))
    decoded = finish(in_parts(frame, folder / "made", partitions), folder / "decode")
    read = finish(frame.select("id", "reason"), folder / "read", has_media=has_media)
    context = context_for(folder / "shards", **{"shard_bytes": 40_000, **settings})
    context = dataclasses.replace(context, earlier={"read": read, "decode": decoded})
    return in_parts(kept(stored(decoded / ROWS)), folder / "parts", partitions), context


def written(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    """The step's folder, its shards written."""
    frame, context = before_shards(folder, rows, **options)
    assert all(row["reason"] is None for row in shards.write_shards(frame, context).to_pylist())
    return context.folder


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir()) if path.is_file()}


def test_partitions_change_no_byte_and_the_seed_does(tmp_path: Path) -> None:
    rows = samples(60)
    one = contents(written(tmp_path / "one", rows))
    assert sorted(one) == ["index.parquet", *(f"shard-{number:05d}.tar" for number in range(len(one) - 1))]
    assert len(one) > 4
    assert contents(written(tmp_path / "five", rows, partitions=5)) == one
    assert contents(written(tmp_path / "other", rows, seed=1))["shard-00000.tar"] != one["shard-00000.tar"]


def test_every_sample_is_read_back(tmp_path: Path) -> None:
    rows = samples(30)
    root = written(tmp_path, rows)
    everything = Dataset(root, None)
    assert sorted(everything.column("id")) == [row["id"] for row in rows]
    assert everything.column("id") != sorted(everything.column("id"))
    for sample in (everything[position] for position in range(30)):
        number = int(sample.id)
        row = rows[number]
        assert (sample.media, sample.caption, sample.tags) == (row["media"], row["caption"], row["tags"])
        assert np.array_equal(sample.image[0] if number % 3 == 0 else sample.image, np.asarray(picture(number)))
    index = read_index(root)
    assert index["split"].to_pylist().count("test") == 6
    assert index["shard"].to_pylist() == sorted(index["shard"].to_pylist())
    facts = read_facts(root)
    assert (facts["max_side"], facts["seed"]) == ("256", "0")
    assert json.loads(facts["curated"])["shard_bytes"] == 40_000
    assert "num_workers" not in json.loads(facts["curated"])


def test_members_are_those_of_the_package(tmp_path: Path) -> None:
    root = written(tmp_path, samples(20))
    keys = []
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for media, facts in zip(members[::2], members[1::2], strict=True):
                entry = json.load(tar.extractfile(facts) or io.BytesIO())
                assert (media.name, facts.name) == (f"{media.name[:8]}.{entry['extension']}", f"{media.name[:8]}.json")
                assert (media.mtime, media.uid, media.uname, media.mode) == (0, 0, "", 0o644)
                keys.append(media.name[:8])
    assert keys == [f"{number:08d}" for number in range(20)]
    stream = data.Stream(str(root), split=None)
    assert len(list(stream.texts(100))) == 20


def test_shards_are_closed_when_they_are_full(tmp_path: Path) -> None:
    rows = samples(60)
    for size in (1, 40_000, 10**9):
        root = written(tmp_path / str(size), rows, shard_bytes=size)
        held = Counter(read_index(root)["shard"].to_pylist())
        assert sum(held.values()) == 60
        if size == 1:
            assert max(held.values()) <= 2
        elif size == 10**9:
            assert len(held) == 1
        else:
            sizes = [path.stat().st_size for path in sorted(root.glob("*.tar"))]
            assert all(0.7 * size < found < 1.5 * size for found in sizes[:-1])


def test_waves_hold_a_part_of_the_media_each_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = samples(60)
    monkeypatch.setattr(shards, "WAVE_BYTES", 60_000)
    frame, context = before_shards(tmp_path / "one", rows)
    sizes = []
    for entries, media in shards._waves(shards._entries(frame, 0), context):
        sizes.append((entries.count_rows(), media.count_rows()))
    assert len(sizes) > 3
    assert sum(entries for entries, _ in sizes) == 60
    assert all(entries == media < 40 for entries, media in sizes)
    one = contents(written(tmp_path / "two", rows))
    assert contents(written(tmp_path / "three", rows, partitions=5)) == one
    keys = []
    for path in sorted((tmp_path / "two" / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            keys += [name[:8] for name in tar.getnames()[::2]]
    assert keys == [f"{number:08d}" for number in range(60)]
    everything = Dataset(tmp_path / "two" / "shards", None)
    assert sorted(everything.column("id")) == [row["id"] for row in rows]
    for sample in (everything[position] for position in range(60)):
        number = int(sample.id)
        assert np.array_equal(sample.image[0] if number % 3 == 0 else sample.image, np.asarray(picture(number)))


def test_copies_are_written_in_random_places_of_the_training_split(tmp_path: Path) -> None:
    rows = samples(40)
    rows[1] |= {"copies": 7, "probability": 6.5}
    rows[2] |= {"copies": 2}
    rows[5] |= {"copies": 4}  # of the test split
    frame, context = before_shards(tmp_path, rows)
    returned = rows_of(shards.write_shards(frame, context))
    everything = Dataset(context.folder, None)
    ids = everything.column("id")
    assert len(ids) == 40 + 6 + 1
    copies = ["001", *(f"001~{number}" for number in range(2, 8))]
    assert {id for id in ids if id.startswith("001")} == set(copies)
    assert [id for id in ids if id.startswith(("002", "005"))] != []
    assert {id for id in ids if id.startswith(("002", "005"))} == {"002", "002~2", "005"}
    places = sorted(ids.index(id) for id in copies)
    assert places[-1] - places[0] > 10
    for id in copies:
        row = everything.index.slice(ids.index(id), 1).to_pylist()[0]
        assert (row["identity"], row["probability"], row["split"]) == ("i1", 6.5, "train")
        assert np.array_equal(everything[ids.index(id)].image, np.asarray(picture(1)))
    index = {row["id"]: row["shard"] for row in everything.index.to_pylist()}
    assert {id: row["shard"] for id, row in returned.items()} == {row["id"]: index[row["id"]] for row in rows}


def test_columns_of_steps_that_were_not_run_have_defaults(tmp_path: Path) -> None:
    rows = samples(5)
    for row in rows:
        for name in ("split", "copies", "probability"):
            del row[name]
    rows[0] |= {"caption": "", "tags": [], "identity": None, "label": None}
    index = read_index(written(tmp_path, rows)).to_pylist()
    assert {(row["split"], row["probability"]) for row in index} == {("train", 1.0)}
    assert [(row["identity"], row["label"], row["tags"]) for row in index if row["id"] == "000"] == [("", "", [])]


def test_a_source_without_media_gives_an_index_that_no_dataset_takes(tmp_path: Path) -> None:
    rows = [
        {"id": f"{number}", "caption": "c", "tags": ["t"], "split": "train", "copies": number} for number in range(4)
    ]
    frame, context = before_shards(tmp_path, rows, has_media=False)
    returned = rows_of(shards.write_shards(frame, context))
    assert {row["shard"] for row in returned.values()} == {""}
    index = read_index(context.folder)
    assert set(zip(index["shard"].to_pylist(), index["size"].to_pylist(), strict=True)) == {("", 0)}
    assert Counter(id[0] for id in index["id"].to_pylist()) == {"0": 1, "1": 1, "2": 2, "3": 3}
    assert not list(context.folder.glob("*.tar"))
    with pytest.raises(data.DataError, match="holds no media, only what is said of it"):
        Dataset(context.folder)


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path) -> None:
    rows = samples(40)
    frame, context = before_shards(tmp_path, rows, shard_bytes=10**9)
    with (
        small_files(60_000),
        pytest.raises(data.DataError, match=r"no space is left to write .*shard-00000\.tar; free"),
    ):
        shards.write_shards(frame, context)
    assert not list(context.folder.glob("*.tar*"))
    assert not list(context.folder.glob(".*"))


def test_row_groups_do_not_depend_on_how_rows_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "INDEX_ROWS", 16)
    root = written(tmp_path, samples(40))
    metadata = pq.ParquetFile(root / "index.parquet").metadata
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [16, 16, 8]


def test_an_index_from_before_balancing_is_still_read(tmp_path: Path) -> None:
    root = data.generated(tmp_path / "set", 20, image_size=16)
    table = pq.read_table(root / "index.parquet")
    pq.write_table(table.drop_columns(["probability"]), root / "index.parquet")
    assert Dataset(root, None).column("probability") == [1.0] * 20
    assert len(read_ledger(root)) == 0
