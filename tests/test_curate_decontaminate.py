"""Decontamination: what resembles an evaluation sample goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import daft
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_frames import context_for, frame_of, reasons_of, rows_of
from daft import col
from media_files import encoded, make_folder, picture

from xray.curate.decontaminate import REASON, STEP, decontaminate, evaluation_files
from xray.curate.neighbours import nearest
from xray.curate.settings import Settings
from xray.data.clean import looks
from xray.data.errors import DataError
from xray.data.shards import Entry, ShardWriter, encode

WORDS = "a small red fox runs over the old wooden bridge near our village in winter"


def table(path: Path, **columns: Any) -> Path:
    arrays = {name: pa.array(values, pa.uint64() if name == "phash" else None) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)
    return path


def details(rows: list[dict[str, Any]], folder: Path, against: object, **settings: Any) -> dict[str, str | None]:
    context = context_for(folder, against=str(against), **settings)
    done = rows_of(decontaminate(frame_of(rows), context))
    assert {row["reason"] for row in done.values() if row["detail"]} <= {REASON}
    return {id: row["detail"] for id, row in done.items()}


def test_without_evaluation_sets_all_pass(tmp_path: Path) -> None:
    frame = frame_of([{"caption": WORDS, "phash": 1}])
    assert reasons_of(decontaminate(frame, context_for(tmp_path, against=" , "))) == {"000": None}
    assert evaluation_files("", Settings()) == []


def test_pictures_and_long_captions_that_resemble_leave(tmp_path: Path) -> None:
    path = table(
        tmp_path / "eval.parquet",
        id=["a", "b", "c", "d"],
        phash=[0b1000, None, 0b1011, 2**63 + 1],
        caption=["a fox", WORDS, None, WORDS + " once"],
    )
    rows: list[dict[str, Any]] = [
        {"phash": 0b1000},
        {"phash": 0b1010},  # a bit away from a and from c: the smaller hash
        {"phash": 0b1000 ^ 0b1111 << 30},
        {"phash": None},
        {"phash": 0x0F0F_0000_FFFF_3333, "caption": WORDS.title() + "."},
        {"phash": 0b111 << 40, "caption": "a fox"},
        {"phash": 2**63 - 1},
        {"caption": WORDS[: len(WORDS) // 2]},
    ]
    found = details(rows, tmp_path / "run", path)
    assert {id: other for id, other in found.items() if other} == {"000": "a", "001": "a", "004": "b"}
    context = context_for(tmp_path / "again", against=f"{path},{path}")
    reasons = reasons_of(decontaminate(frame_of(rows), context))
    assert [id for id in sorted(reasons) if reasons[id]] == ["000", "001", "004"]
    assert context.facts["evaluation"] == [{"set": path.as_posix(), "samples": 8, "hashes": 6, "long_captions": 4}]


def test_the_nearest_hash_is_found_as_comparing_all_finds_it() -> None:
    rng = np.random.default_rng(0)
    known = np.unique(rng.integers(0, 2**12, 100, dtype=np.uint64) << np.uint64(30))
    wanted = rng.integers(0, 2**12, 500, dtype=np.uint64) << np.uint64(30)
    for near_bits in range(4):
        bits = np.bitwise_count(known[None] ^ wanted[:, None]).astype(int)
        best = np.lexsort((np.broadcast_to(known, bits.shape), bits))[:, 0]
        expected = [int(known[at]) if bits[row, at] <= near_bits else None for row, at in enumerate(best)]
        frame = daft.from_arrow(pa.table({"phash": pa.array([*wanted, None], pa.uint64())}))
        found = frame.select(nearest(col("phash"), known, near_bits)).to_pydict()["phash"]
        assert found == [*expected, None]


@pytest.mark.parametrize("name", ["eval.csv", "eval.jsonl"])
def test_tables_of_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(f"caption,split\n{WORDS},x\n" if name.endswith("csv") else json.dumps({"caption": WORDS}) + "\n")
    assert details([{"caption": WORDS}, {}], tmp_path / "run", path) == {"000": WORDS, "001": None}


def test_an_image_folder_and_a_damaged_file(tmp_path: Path) -> None:
    files = {"one.png": encoded(picture(1, 64), "PNG"), "two.png": encoded(picture(2, 64), "PNG"), "bad.png": b"no"}
    folder = make_folder(tmp_path / "eval", [], files)
    hashes = [looks(np.asarray(picture(seed, 64).convert("RGB"))[None]).shape for seed in (2, 3)]
    rows = [{"phash": hash >> 1 << 1} for hash in hashes]  # a bit may differ
    context = context_for(tmp_path / "run", against=str(folder))
    done = rows_of(decontaminate(frame_of(rows), context))
    assert done["000"]["detail"].endswith("two.png")
    assert done["001"]["detail"] is None
    told = context.facts["evaluation"][0]
    assert (told["samples"], told["hashes"]) == (3, 2)


def test_of_a_dataset_the_test_split_counts(tmp_path: Path) -> None:
    for name, splits in (("both", ("train", "test")), ("train", ("train", "train"))):
        with ShardWriter(tmp_path / name) as writer:
            for number, split in enumerate(splits):
                frames = np.asarray(picture(number, 64).convert("RGB"))[None]
                content, extension = encode(frames, "image")
                writer.add(Entry(f"{name}-{number}", "image", extension, WORDS if number else "", split=split), content)
    rows = [{"phash": looks(np.asarray(picture(number, 64).convert("RGB"))[None]).shape} for number in range(2)]
    rows = [{"phash": row["phash"] >> 1 << 1} for row in rows]
    assert details(rows, tmp_path / "a", tmp_path / "both") == {"000": None, "001": "both-1"}
    assert details(rows, tmp_path / "b", tmp_path / "train") == {"000": "train-0", "001": "train-1"}
    assert details([{"caption": WORDS}], tmp_path / "c", tmp_path / "both") == {"000": "both-1"}


def test_what_is_no_evaluation_set_is_said(tmp_path: Path) -> None:
    other = table(tmp_path / "other.parquet", id=["a"], text=["b"])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    for against, said in (
        (tmp_path / "none", "none, where nothing is"),
        (other, "columns id, text; phash or caption is needed"),
        (tmp_path / "notes.txt", "a table"),
        (tmp_path / "broken.parquet", "cannot be read"),
    ):
        with pytest.raises(DataError, match=said):
            details([{}], tmp_path / "run", against)


def test_the_files_content_decides(tmp_path: Path) -> None:
    path = table(tmp_path / "eval.parquet", caption=["x"])
    assert STEP.inputs is not None
    before = STEP.inputs("", Settings(against=str(path)))
    assert before == STEP.inputs("", Settings(against=str(tmp_path / "eval.parquet")))
    table(path, caption=["y"])
    assert STEP.inputs("", Settings(against=str(path))) != before
    with pytest.raises(DataError, match="where nothing is"):
        STEP.inputs("", Settings(against=str(tmp_path / "none")))
