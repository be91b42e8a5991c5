"""The first step of curation: tables, shards and folders as one frame, damaged and odd ones too."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_frames import context_for, rows_of
from fsspec.implementations.memory import MemoryFileSystem
from media_files import encoded, make_folder, picture

from xray import data
from xray.curate import read
from xray.curate.frame import COLUMNS
from xray.curate.settings import Settings
from xray.curate.sources import files
from xray.curate.step import Context
from xray.data.errors import DataError
from xray.data.shards import Entry, ShardWriter, encode

Row = dict[str, Any]
PNG = encoded(picture(0, 8), "PNG")


def context_of(source: str | Path, folder: Path, **settings: Any) -> Context:
    made = context_for(folder, **settings)
    return Context(str(source), made.settings, folder, {})


def rows_from(source: str | Path, folder: Path, **settings: Any) -> dict[str, Row]:
    """What the step makes of a source, by id."""
    frame = read.read(None, context_of(source, folder / "step", **settings))
    assert [name for name in frame.column_names if name not in ("bytes", "reason", "detail")] == list(COLUMNS)
    assert [field.dtype for field in frame.schema()][: len(COLUMNS)] == list(COLUMNS.values())
    return rows_of(frame)


def lines(path: Path, rows: Sequence[Any], **options: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), **options)
    return path


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


TABLE: list[Row] = [
    {"key": "a", "TEXT": "A cat", "url": "pictures/one_black_cat-02.png", "hashtags": ["cat", " pet "], "class": 3},
    {"key": "b", "TEXT": "Ein Hund", "url": "http://host/Big%20dog.jpg?w=1", "hashtags": [], "class": 4},
    {"key": "c", "TEXT": None, "url": "/else/where.gif", "hashtags": None, "class": None},
]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "jsonl.gz"])
def test_tables_of_every_kind_give_the_same_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "in" / f"pets.{kind}"
    path.parent.mkdir()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(TABLE), path)
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, TABLE[0])
            writer.writeheader()
            writer.writerows({**row, "hashtags": ";".join(row["hashtags"] or [])} for row in TABLE)
    else:
        text = "".join(json.dumps(row) + "\n" for row in TABLE).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    rows = rows_from(path, tmp_path)
    assert {id: row["caption"] for id, row in rows.items()} == {"a": "A cat", "b": "Ein Hund", "c": ""}
    assert rows["a"]["url"] == str(tmp_path / "in/pictures/one_black_cat-02.png")
    assert [rows[id]["url"] for id in "bc"] == [TABLE[1]["url"], TABLE[2]["url"]]
    assert [rows[id]["tags"] for id in "abc"] == [["cat", "pet"], [], []]
    assert [rows[id]["label"] for id in "abc"] == ["3", "4", ""]
    assert [rows[id]["alternatives"] for id in "abc"] == [["one black cat"], ["big dog"], ["where"]]
    assert {row["source"] for row in rows.values()} == {"pets"}
    assert {row["reason"] for row in rows.values()} == {None}
    assert len({row["key"] for row in rows.values()}) == 3


def test_columns_are_named_by_the_user(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", text=["no"], words=["yes"], link=["a.png"], extra=[1], title=["other"])
    context = context_of(path, tmp_path / "step", columns="caption=words, url = link")
    row = next(iter(rows_of(read.read(None, context)).values()))
    assert (row["caption"], row["alternatives"]) == ("yes", ["no", "other"])
    assert row["id"] == "t:a.png"
    assert context.facts == {
        "kind": "table",
        "files": 1,
        "columns": {"caption": "words", "url": "link"},
        "has_media": True,
        "unused_columns": ["extra"],
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("caption=words", r"t\.parquet has no column words \(for caption\); it has a, b$"),
        ("", r"t\.parquet has no column of captions, tags, .* it has a, b: name one, as in columns=caption=NAME"),
        ("words", "columns holds 'words'; PART=NAME is needed, PART one of id, caption"),
        ("colour=a", "columns holds 'colour=a'"),
        ("caption=", "columns holds 'caption='"),
    ],
)
def test_missing_columns_are_named_with_what_was_there(columns: str, message: str, tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", a=[1], b=["x"])
    with pytest.raises(DataError, match=message):
        rows_from(path, tmp_path, columns=columns)


def test_mixed_types_in_lines_are_read_or_counted(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"id": 1, "caption": "one", "tags": ["a", 2, None, "  ", {"x": 1}]},
        {"id": "two", "caption": 2.5, "tags": "c, d"},
        {"id": "3", "caption": ["first", "second"], "tags": 7},
        {"id": "4", "caption": {"a": 1}, "tags": {"b": 2}},
        {"id": "5", "caption": True, "tags": ["half \ud83d"]},
        {"id": "6", "caption": "x" * 1_000_000 + "\n\u200b\ufeff"},
        {"id": float("nan"), "caption": "no id", "tags": []},
        "",
        "[1, 2]",
        "{damaged",
        '"text"',
        "[" * 100_000,
        "\ufeff{}",
    ]
    path = lines(tmp_path / "t.jsonl", rows)
    path.write_bytes(path.read_bytes() + b'{"id": "8", "caption": "caf\xe9"}\n')
    found = rows_from(path, tmp_path)
    told = {id: (row["caption"], row["tags"]) for id, row in found.items() if row["reason"] is None}
    without_id = next(id for id, (caption, _) in told.items() if caption == "no id")
    assert without_id.startswith("t#")
    assert told.pop("6")[0] == rows[5]["caption"]
    assert told == {
        "1": ("one", ["a", "2"]),
        "two": ("2.5", ["c", "d"]),
        "3": ("first", ["7"]),
        "5": ("", ["half ?"]),
        "8": ("caf\ufffd", []),
        without_id: ("no id", []),
    }
    assert {id: row["reason"] for id, row in found.items() if row["reason"]} == {
        "4": "the row is empty",
        **{f"t:t.jsonl:{number}": "the line is no JSON object" for number in (9, 10, 11, 12, 13)},
    }


def test_csv_with_quotes_newlines_and_damage(tmp_path: Path) -> None:
    long = "many words " * 100_000 + "\nend"
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "caption", "tags"], ["1", long, 'a, "b, c" ,d'], ["2", "two\nlines", '["x;y", "z"]']])
        writer.writerows([["3", "short"], [], ["4", "", ""], ["5", "six", "s", "extra"], ["6", "ok", "#big cat #dog"]])
        file.write('7,unclosed,"q\n8,swallowed,x\n')
    with open(tmp_path / "t.csv", "ab") as binary:
        binary.write(b'"\n9,caf\xe9 \x00,t\n')
    rows = rows_from(tmp_path / "t.csv", tmp_path)
    told = {id: (row["caption"], row["tags"]) for id, row in rows.items() if row["reason"] is None}
    assert told == {
        "1": (long, ["a", "b, c", "d"]),
        "2": ("two\nlines", ["x;y", "z"]),
        "6": ("ok", ["big cat", "dog"]),
        "7": ("unclosed", ["q\n8", "swallowed", "x"]),
        "9": ("caf\ufffd \x00", ["t"]),
    }
    uneven = "the line has more or fewer fields than the header"
    dropped = {"t:t.csv:4": uneven, "4": "the row is empty", "t:t.csv:7": uneven}
    assert {id: row["reason"] for id, row in rows.items() if row["reason"]} == dropped


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("a;b, c; ;", ["a", "b, c"]),
        ("a, b,,c", ["a", "b", "c"]),
        ('["a, b", "c"]', ["a, b", "c"]),
        ("['a', \"it's\"]", ["a", "it's"]),
        ("[not a list, b]", ["[not a list", "b]"]),
        ('"a, b", c', ["a, b", "c"]),
        ('say "hi"; x', ['say "hi"', "x"]),
        ("#one #two words#three", ["one", "two words", "three"]),
        ("#1, #2", ["#1", "#2"]),
        ("one two", ["one two"]),
        ("", []),
        (None, []),
        ("[" * 10_000, ["[" * 10_000]),
    ],
)
def test_tags_in_one_string(text: str | None, tags: list[str], tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", id=["x"], caption=["c"], tags=pa.array([text], pa.string()))
    assert rows_from(path, tmp_path)["x"]["tags"] == tags


@pytest.mark.parametrize(
    "hashes",
    [
        pa.array([2**64 - 1, 1, None], pa.uint64()),
        pa.array([-1, 1, None], pa.int64()),
        pa.array(["ffffffffffffffff", "0000000000000001", None]),
        pa.array(["-1", "1", "no hash"]),
        pa.array([str(2**64 - 1), " 1 ", str(2**64)]),
    ],
)
def test_perceptual_hashes_of_every_spelling(hashes: pa.Array, tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", id=["a", "b", "c"], caption=["x"] * 3, phash=hashes)
    assert [rows_from(path, tmp_path)[id]["phash"] for id in "abc"] == [2**64 - 1, 1, None]


def test_odd_parquet_types_and_nulls_everywhere(tmp_path: Path) -> None:
    nothing = pa.nulls(2)
    path = parquet(
        tmp_path / "t.parquet",
        id=pa.array([1.5, None]),
        caption=pa.array(["x", None]).dictionary_encode(),
        tags=pa.array([[1, None], None], pa.large_list(pa.int16())),
        label=pa.array([None, None], pa.bool_()),
        identity=nothing,
        source=pa.array(["", "own"], pa.large_string()),
        phash=nothing,
        url=nothing,
        alternatives=nothing,
        title=pa.array([["t"], None], pa.list_(pa.string())),
    )
    rows = rows_from(path, tmp_path)
    assert [(row["id"], row["caption"], row["tags"], row["source"]) for row in rows.values() if row["id"] == "1.5"] == [
        ("1.5", "x", ["1"], "t")
    ]
    assert rows["1.5"]["alternatives"] == ["t"]
    assert sorted(row["reason"] for row in rows.values()) == ["it names no image or clip", "the row is empty"]


def test_embedded_media(tmp_path: Path) -> None:
    image = pa.array(
        [{"bytes": PNG, "path": "cat_one.png"}, {"bytes": None, "path": None}, {"bytes": b"", "path": "d.png"}]
    )
    rows = rows_from(parquet(tmp_path / "hf.parquet", image=image, text=["a", "b", "c"]), tmp_path)
    assert rows["hf:cat_one.png"]["bytes"] == PNG
    assert rows["hf:cat_one.png"]["alternatives"] == ["cat one"]
    assert rows["hf:d.png"]["bytes"] is None
    assert rows["hf:d.png"]["url"] == str(tmp_path / "d.png")
    assert {row["caption"]: row["reason"] for row in rows.values()} == {
        "a": None,
        "b": "it names no image or clip",
        "c": None,
    }

    plain = parquet(tmp_path / "plain.parquet", jpg=[PNG, PNG + b"x", PNG], caption=["a", "a", "a"])
    rows = rows_from(plain, tmp_path / "second")
    kept = [row for row in rows.values() if row["reason"] is None]
    assert sorted(row["bytes"] for row in kept) == sorted([PNG, PNG + b"x"])  # the third repeats the first wholly


def test_ids_are_unique_whatever_the_order(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"id": "a", "caption": "short"},
        {"id": "a", "caption": "the longest"},
        {"id": "a", "caption": "also long"},
    ]
    rows += [{"id": "b", "caption": "same"}] * 3 + [{"id": "c", "caption": None, "tags": ["x"]}]
    rows += [{"id": None, "caption": "no id"}, {"id": "", "caption": "no id"}, {"id": None, "caption": "no id, other"}]
    rows += [{"id": "d", "caption": caption, "tags": [tag]} for caption, tag in ("xy", "yx", "yy")]
    results = []
    for turn in range(3):
        random.Random(turn).shuffle(rows)
        folder = tmp_path / str(turn)
        folder.mkdir()
        found = rows_from(lines(folder / "t.jsonl", rows), folder)
        assert len(found) == len(rows) == len({row["key"] for row in found.values()})
        results.append({id: (row["caption"], row["reason"], row["detail"], row["key"]) for id, row in found.items()})
        assert found["a"]["caption"] == "the longest"
        used = {f"{id}#{number}": id for id in "abd" for number in (2, 3)}
        dropped = {id: row["detail"] for id, row in found.items() if row["reason"] == "the id is used already"}
        (repeated,) = set(dropped) - set(used)
        assert repeated.startswith("t#")
        assert {id: dropped[id] for id in used} == used
    assert results[0] == results[1] == results[2]


def test_an_empty_table_has_no_rows(tmp_path: Path) -> None:
    empty = pa.table({"caption": pa.array([], pa.string()), "tags": pa.array([], pa.list_(pa.string()))})
    pq.write_table(empty, tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("id,caption\n")
    for name in ("t.parquet", "t.csv"):
        assert rows_from(tmp_path / name, tmp_path / name.replace(".", "_")) == {}


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl", "t.tar", "t.jsonl.gz"])
def test_what_is_not_there_or_no_table_is_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name} cannot be read \\(no such file\\)$"):
        rows_from(tmp_path / name, tmp_path)
    (tmp_path / name).write_bytes(b"")
    if name != "t.tar":
        with pytest.raises(DataError, match=f"{name}"):
            rows_from(tmp_path / name, tmp_path)


def test_several_tables_damaged_and_unlike_ones(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    parquet(folder / "a.parquet", id=[1, 2], caption=["a1", "a2"], file_name=["x.png", "./y.png"])
    parquet(folder / "more" / "b.parquet", uid=["b1"], text=["bee"], file_name=["x.png"])
    lines(folder / "c.jsonl", [{"id": "c", "caption": "sea"}])
    (folder / "d.parquet").write_bytes(b"PAR1 and no more")
    rows = rows_from(folder, tmp_path)
    assert {id: row["caption"] for id, row in rows.items() if not row["reason"]} == {
        "1": "a1",
        "2": "a2",
        "b1": "bee",
        "c": "sea",
    }
    assert [rows[id]["url"] for id in ("2", "b1")] == [str(folder / "y.png"), str(folder / "more" / "x.png")]
    damaged = rows[str(folder / "d.parquet")]
    assert damaged["reason"] == "the file cannot be read"
    assert damaged["detail"]
    assert len(rows_from(f"{folder}/**/*.parquet", tmp_path / "again")) == 4
    assert len(rows_from(f"{folder}/{{a,c,missing}}.*", tmp_path / "braces")) == 3


def test_pages_of_a_table_that_are_damaged_are_one_sentence(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", id=[str(n) for n in range(1000)], caption=[os.urandom(20).hex()] * 1000)
    whole = bytearray(path.read_bytes())
    whole[100:2000] = bytes(1900)
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"t\.parquet cannot be read \(.*CorruptFile"):
        rows_from(path, tmp_path)


def test_the_rest_of_a_packed_file_that_is_cut_off_is_one_row(tmp_path: Path) -> None:
    text = "".join(json.dumps({"id": n, "caption": os.urandom(30).hex()}) + "\n" for n in range(3000)).encode()
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(text)[:-40_000])
    rows = rows_from(tmp_path / "t.jsonl.gz", tmp_path)
    faults = [row for row in rows.values() if row["reason"]]
    assert [row["reason"] for row in faults] == ["the file cannot be read"]
    assert 1000 < len(rows) < 3000


SHARD = {
    "000.jpg": PNG,
    "000.json": json.dumps({"caption": "first", "tags": "a,b", "id": "own", "identity": "i"}).encode(),
    "cats/black_cat.webp": PNG + b"1",
    "cats/black_cat.txt": "二番目\n".encode(),
    "cats/black_cat.cls": b"3",
    "clip.mp4": b"no video",
    "clip.json": b'{"caption": "half \\ud83d", "tags": ["x", "x"]}',
    "text.txt": b"alone",
    "bad.png": PNG,
    "bad.json": b"{",
}


def test_shards_say_where_their_media_is(tmp_path: Path) -> None:
    path = tar(tmp_path / "pairs-000.tar", SHARD)
    tar(tmp_path / "pairs-001.tar", {"000.png": PNG})
    cut = tar(tmp_path / "pairs-002.tar", {"a.png": PNG, "b.png": PNG, "c.png": PNG})
    cut.write_bytes(cut.read_bytes()[:2500])
    rows = rows_from(f"{tmp_path}/pairs-{{000..003}}.tar", tmp_path)
    second = "pairs:pairs-000.tar/cats/black_cat.webp"
    assert {id for id, row in rows.items() if not row["reason"]} == {
        "own",
        second,
        "pairs:pairs-000.tar/clip.mp4",
        "pairs:pairs-001.tar/000.png",
        "pairs:pairs-002.tar/a.png",
    }
    for id, member in (("own", "000.jpg"), (second, "cats/black_cat.webp")):
        assert rows[id]["url"] == str(path)
        part = path.read_bytes()[rows[id]["offset"] :][: rows[id]["size"]]
        assert part == SHARD[member]
    own, other, clip = rows["own"], rows[second], rows["pairs:pairs-000.tar/clip.mp4"]
    assert (own["caption"], own["tags"], own["identity"], own["media"]) == ("first", ["a", "b"], "i", "")
    assert (other["caption"], other["label"], other["alternatives"]) == ("二番目", "3", ["black cat"])
    assert (clip["caption"], clip["media"], clip["strip"], clip["source"]) == ("half ?", "clip", None, "pairs")
    assert {id: row["reason"] for id, row in rows.items() if row["reason"]} == {
        "pairs:pairs-000.tar/text": "there is no image or clip among its members",
        "pairs:pairs-000.tar/bad": "its text or JSON is damaged",
        str(cut): "the shard cannot be read",
        str(tmp_path / "pairs-003.tar"): "the shard cannot be read",
    }
    assert "bytes" not in own


def test_a_dataset_of_this_package_is_a_source(tmp_path: Path) -> None:
    out = tmp_path / "packed"
    frames = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)
    clip, extension = encode(frames, "clip")
    with ShardWriter(out, shard_bytes=1) as writer:
        writer.add(Entry("one", "image", "png", "a caption", ["t"], "l", identity="i", source="set"), PNG)
        writer.add(Entry("two", "clip", extension, "", [], source="set", frames=4), clip)
    by_index = rows_from(out, tmp_path / "first")
    (tmp_path / "copy").mkdir()
    for shard in out.glob("*.tar"):
        os.link(shard, tmp_path / "copy" / shard.name)
    by_shards = rows_from(tmp_path / "copy", tmp_path / "second")
    for rows in (by_index, by_shards):
        one, two = rows["one"], rows["two"]
        content = Path(two["url"]).read_bytes()[two["offset"] :][: two["size"]]
        assert (data.shards.decode_stored(content, two["strip"]) == frames).all()
        assert [one[name] for name in ("caption", "tags", "label", "identity", "source", "strip")] == [
            *("a caption", ["t"], "l", "i", "set"),
            None,
        ]
        assert (one["media"], two["media"], two["reason"]) == ("", "clip", None)
    damaged = pq.read_table(out / "index.parquet").drop_columns(["offset", "size"])
    pq.write_table(damaged, out / "index.parquet")
    with pytest.raises(DataError, match=r"index\.parquet lacks the columns offset, size"):
        rows_from(out, tmp_path / "third")


def test_a_folder_of_images_with_metadata_and_texts(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"file_name": "a.png", "caption": "A", "tags": "x;y", "label": 5, "identity": "same", "source": "own"},
        {"file_name": "./b b#.png", "text": "never", "caption": "B"},
        {"file_name": "gone.png", "caption": "C"},
        {"file_name": "../out.png"},
        {"file_name": "/out.png", "caption": "D"},
        {"caption": "no file"},
    ]
    files = {
        "a.png": PNG,
        "b b#.png": PNG,
        "more/deep/some_big_dog.PNG": PNG,
        "more/deep/some_big_dog.txt": b"\xffdog\n",
    }
    files |= {"more/own.gif": PNG, ".hidden/x.png": PNG, "more/.h.png": PNG, "sub/z.png": PNG}
    root = make_folder(tmp_path / "my.set", rows, files)
    (root / "sub" / "metadata.csv").write_text("file_name,caption\nz.png,Z\nz.png,Z again\n")
    found = rows_from(root, tmp_path)
    told = {id: row["caption"] for id, row in found.items() if not row["reason"]}
    assert told == {
        "own:a.png": "A",
        "my.set:b b#.png": "B",
        "my.set:more/deep/some_big_dog.PNG": "\ufffddog\n",
        "my.set:more/own.gif": "",
        "my.set:sub/z.png": "Z again",
    }
    assert found["my.set:more/deep/some_big_dog.PNG"]["alternatives"] == ["some big dog"]
    assert found["own:a.png"]["size"] == len(PNG)
    for id in told:
        assert Path(found[id]["url"]).read_bytes() == PNG
    reasons = {id: row["reason"] for id, row in found.items() if row["reason"]}
    nameless = next(id for id in reasons if id.startswith("my.set#"))
    assert reasons == {
        "my.set:gone.png": "it names a file that is not there",
        "my.set:../out.png": "it names a file outside the folder",
        "my.set:/out.png": "it names a file outside the folder",
        nameless: "it names no image or clip",
        "my.set:sub/z.png#2": "the id is used already",
    }


def test_a_folder_without_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "a.png").write_bytes(PNG)
    (folder / "a.txt").write_text("a text", encoding="utf-8-sig")
    assert rows_from(folder, tmp_path)["plain:a.png"]["caption"] == "a text"
    lines(folder / "metadata.jsonl", [{"caption": "no column of names"}])
    with pytest.raises(DataError, match="plain names no files; a column file_name is needed"):
        rows_from(folder, tmp_path)


def test_several_sources_keep_their_names(tmp_path: Path) -> None:
    first = lines(tmp_path / "first.jsonl", [{"id": 1, "caption": "x"}, {"id": 2, "caption": "y", "source": "own"}])
    second = parquet(tmp_path / "second.parquet", id=["1"], image=[PNG], caption=["z"])
    folder = make_folder(tmp_path / "third", [], {"a.png": PNG})
    rows = rows_from(f"{first}, {second},{folder}", tmp_path)
    assert {id: row["source"] for id, row in rows.items()} == {
        "first:1": "first",
        "first:2": "own",
        "second:1": "second",
        "third:a.png": "third",
    }
    assert {id for id, row in rows.items() if row["bytes"]} == {"second:1"}
    twin = lines(tmp_path / "third" / "first.jsonl", [{"id": 1, "caption": "x"}])
    assert set(rows_from(f"{first},{twin}", tmp_path / "twins")) == {f"{first}:1", f"{first}:2", f"{twin}:1"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", "is of no kind that can be told by a.txt; a Parquet, CSV or JSONL table"),
        ("mixed/*", "is of no kind that can be told by b.tar"),
        ("empty", r"holds nothing that can be read \(0 files\); a Parquet"),
        ("none/*.csv", r"cannot be read \(no such file\)"),
        ("nothing://here/t.csv", "cannot be read"),
        (" , ", "the source is empty; a Parquet"),
    ],
)
def test_what_is_no_source_is_told_what_can_be_given(name: str, message: str, tmp_path: Path) -> None:
    for made in ("a.txt", "mixed/a.csv", "mixed/b.tar"):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        (tmp_path / made).write_text("id,caption\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        rows_from(name if ":" in name or "," in name else f"{tmp_path}/{name}", tmp_path)
    assert "\n" not in str(caught.value)


def test_sources_behind_other_protocols(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    table = pa.table({"caption": ["one"], "file_name": ["a.png"], "tags": [["t"]]})
    with memory.open("/read/tables/t.parquet", "wb") as file:
        pq.write_table(table, file)
    memory.pipe("/read/tables/u.csv", b"id,caption\n7,seven\n")
    memory.pipe("/read/images/metadata.jsonl", b'{"file_name": "b.png", "caption": "bee"}\n')
    memory.pipe("/read/images/b.png", PNG)
    shard = tar(tmp_path / "s.tar", {"k.png": PNG, "k.txt": b"kay"})
    memory.pipe("/read/shards/s-0.tar", shard.read_bytes())
    try:
        told = {}
        for number, name in enumerate(("tables", "images", "shards", "shards/s-{0..0}.tar", "tables/*.csv")):
            rows = rows_from(f"memory://read/{name}", tmp_path / str(number))
            told[name] = {(row["caption"], row["url"], row["reason"]) for row in rows.values()}
        context = context_of("memory://read/tables", tmp_path)
        before = read.inputs(context.source, context.settings)
        memory.pipe("/read/tables/u.csv", b"id,caption\n7,other\n,,\n")
        assert read.inputs(context.source, context.settings) != before
    finally:
        memory.rm("/read", recursive=True)
    shards = {("kay", "memory:///read/shards/s-0.tar", None)}
    assert told["tables"] == {
        ("one", "memory:///read/tables/a.png", None),
        ("seven", "", None),
    }
    assert told["images"] == {("bee", "memory:///read/images/b.png", None)}
    assert told["shards"] == told["shards/s-{0..0}.tar"] == shards
    assert told["tables/*.csv"] == {("seven", "", None)}


def test_what_fails_is_tried_again_with_growing_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    failures = iter([OSError("reset"), TimeoutError("late"), OSError("again")])

    def action() -> str:
        if error := next(failures, None):
            raise error
        return "read"

    assert files.attempt(action, "it", retries=3) == "read"
    assert pauses == [0.25, 0.5, 1.0]
    failures = iter([OSError("reset"), OSError("a\nlast one")])
    with pytest.raises(DataError, match=r"^it cannot be read \(a last one\)$"):
        files.attempt(action, "it", retries=1)
    failures = iter([FileNotFoundError("gone")])
    with pytest.raises(DataError, match=r"it cannot be read \(gone\)"):
        files.attempt(action, "it", retries=5)
    assert len(pauses) == 4


class Flaky(MemoryFileSystem):
    """A store whose next answers fail."""

    protocol = "flaky"
    cachable = False
    failures = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def _answer(self) -> None:
        if Flaky.failures > 0:
            Flaky.failures -= 1
            raise ConnectionError("connection reset")

    def info(self, path: str, **options: Any) -> Any:
        self._answer()
        return super().info(path, **options)

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        self._answer()
        return super()._open(path, *arguments, **options)


@pytest.mark.parametrize(("name", "failures"), [("t.csv", 2), ("t.csv", 3), ("t.parquet", 3), ("t.tar", 3)])
def test_an_unreachable_address_is_tried_again(
    name: str, failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(files, "FIRST_PAUSE", 0)
    store = Flaky()
    store.pipe("/flaky/t.csv", b"id,caption\n1,one\n")
    monkeypatch.setattr(Flaky, "failures", failures)
    url = f"flaky://flaky/{name}"
    if failures == 2:
        assert rows_from(url, tmp_path, retries=2)["1"]["caption"] == "one"
    else:
        with pytest.raises(DataError, match=f"{name} cannot be read \\(connection reset\\)$"):
            rows_from(url, tmp_path, retries=2)
    assert Flaky.failures == 0


def test_inputs_change_with_the_source(tmp_path: Path) -> None:
    settings = Settings()
    folder = make_folder(tmp_path / "set", [{"file_name": "a.png", "caption": "A"}], {"a.png": PNG, "b.png": PNG})
    table = lines(tmp_path / "t.csv", ["id,caption", "1,x"])
    shard = tar(tmp_path / "s.tar", {"k.png": PNG})
    for source, changed, content in (
        (folder, folder / "metadata.jsonl", b'{"file_name": "a.png", "caption": "B"}\n'),
        (folder, folder / "b.png", PNG + b"more"),
        (folder, folder / "c.png", PNG),
        (folder, folder / "a.txt", b"text"),
        (table, table, table.read_bytes().replace(b"x", b"y")),
        (shard, shard, shard.read_bytes() + bytes(512)),
    ):
        before = read.inputs(str(source), settings)
        assert read.inputs(str(source), settings) == before
        times = changed.stat() if changed.exists() else None
        changed.write_bytes(content)
        if times:
            os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert read.inputs(str(source), settings) != before
    again = make_folder(tmp_path / "moved" / "set", [{"file_name": "a.png", "caption": "A"}], {})
    assert read.inputs(str(again), settings) != read.inputs(str(folder), settings)
