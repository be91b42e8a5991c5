"""The ledger of a curation, the table that is printed, and the story of one sample."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import daft
import pyarrow.parquet as pq
import pytest
from curate_finished import EVIL, WHY, finished_run
from curate_frames import frame_of
from daft import col, lit

from xray.curate import Curated, explain, ledger
from xray.curate.frame import drop, keeping
from xray.curate.step import DONE, FOLDER, ROWS, Finished, load, step_folders
from xray.data import DataError
from xray.data.shards import LEDGER


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Curated:
    with pytest.MonkeyPatch.context() as patch:
        return finished_run(tmp_path_factory.mktemp("run") / "out", patch)


def test_every_sample_that_left_or_was_copied_is_noted_in_order(done: Curated) -> None:
    table = pq.read_table(done.out / LEDGER)
    assert table.schema.equals(ledger.SCHEMA)
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("011", "decode", "not an image", f"cannot identify {EVIL}"),
        ("009", "exact_duplicates", "the same pixels as another", "003"),
        ("010", "exact_duplicates", "the same pixels as another", "009"),
        ("008", "near_duplicates", "nearly the same picture as another", "004"),
        ("003", "balance", "copied", WHY),
        ("004", "balance", "in no rare entry", None),
        ("006", "balance", "copied", "2 copies"),
    ]


def test_the_ledger_accounts_for_every_row(done: Curated) -> None:
    account = ledger.account(done.out)
    assert account == ledger.Account(rows=12, kept=7, dropped=5, copied=2)
    assert str(account) == "12 rows: 7 kept, 2 of them more than once; 5 dropped"
    assert str(ledger.Account(6899, 4800, 2099, 0)) == "6,899 rows: 4,800 kept; 2,099 dropped"
    counted = Counter(pq.read_table(done.out / LEDGER)["step"].to_pylist())
    for step in done.steps:
        assert counted[step.name] == step.rows_in - step.rows_out + 2 * (step.name == "balance")


def test_a_ledger_that_misses_a_row_is_refused(done: Curated, tmp_path: Path) -> None:
    (tmp_path / FOLDER).symlink_to(done.out / FOLDER)
    with pytest.raises(DataError, match=r"ledger.parquet cannot be read .*; finish the curation"):
        ledger.account(tmp_path)
    pq.write_table(pq.read_table(done.out / LEDGER).slice(1), tmp_path / LEDGER)
    with pytest.raises(DataError, match=r"does not account for every row \(12 rows: 7 kept.* 4 dropped\)"):
        ledger.account(tmp_path)


def many(count: int, batches: int, reverse: bool) -> daft.DataFrame:
    ids = [f"{number:06d}" for number in range(count)]
    parts = [frame_of({"id": id} for id in ids[start::batches]) for start in range(batches)]
    frame = parts[0]
    for part in parts[1:]:
        frame = part.concat(frame) if reverse else frame.concat(part)
    return drop(keeping(frame), col("id") != lit("000007"), "any", col("caption"))


def test_the_same_rows_in_other_files_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "ROW_GROUP", 64)
    for number, (batches, reverse) in enumerate([(1, False), (3, True), (7, False)]):
        folder = tmp_path / f"step{number}"
        many(300, batches, reverse).write_parquet(str(folder / ROWS))
        ledger.write(tmp_path / f"{number}.parquet", {"first": folder, "second": folder})
    written = {(tmp_path / f"{number}.parquet").read_bytes() for number in range(3)}
    assert len(written) == 1
    file = pq.ParquetFile(tmp_path / "0.parquet")
    groups = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    assert groups == [64] * 9 + [22], "memory does not grow with the rows"
    assert file.read()["step"].to_pylist() == ["first"] * 299 + ["second"] * 299
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.parquet" for n in range(3)} | {
        f"step{n}" for n in range(3)
    }


def test_nothing_that_left_gives_an_empty_ledger(tmp_path: Path) -> None:
    for count in (0, 2):
        keeping(frame_of([{}] * count)).write_parquet(str(tmp_path / str(count) / ROWS))
    ledger.write(tmp_path / "ledger.parquet", {"empty": tmp_path / "0", "full": tmp_path / "2"})
    table = pq.read_table(tmp_path / "ledger.parquet")
    assert (table.num_rows, table.schema) == (0, ledger.SCHEMA)


def steps() -> list[Finished]:
    reasons = {"the same pixels as another": 1200, "a reason that goes on " + "and on " * 12: 3, "x": 1}
    first = Finished("read", "", 6899, 6899, {}, 2.04, {})
    return [first, replace(first, name="exact_duplicates", rows_out=5695, reasons=reasons, seconds=61.5)]


def test_the_table_is_aligned_and_fits_a_terminal() -> None:
    text = ledger.table(steps(), ["exact_duplicates"])
    assert text == "\n".join(
        [
            "step                 in    out  seconds  dropped",
            "read              6,899  6,899    (2.0)",
            "exact_duplicates  6,899  5,695    61.5   1,200 the same pixels as another",
            "                                         3 a reason that goes on and on and on and on and on and on",
            "                                           and on and on and on and on and on and on and on",
            "                                         1 x",
            "in all            6,899  5,695    61.5",
            "(seconds in brackets: computed before)",
        ]
    )
    assert max(map(len, text.splitlines())) <= 100
    assert "brackets" not in ledger.table(steps(), ["read", "exact_duplicates"])


def test_the_story_of_a_sample_that_stays(done: Curated) -> None:
    assert explain("001", done.out).splitlines() == [
        "001",
        '  read              source: "other"',
        '                    media: "image"',
        '                    caption: "see www.example.com a dog\\u200b"',
        "                    tags: hash, Dogs",
        '  decode            extension: "png"',
        "                    width 40, height 30, frames 1",
        '  clean_text        caption: "see www.example.com a dog\\u200b" -> "a dog"',
        "  canonical_tags    tags: without Dogs; with dog",
        "  stop_tags         tags: without hash",
        "  exact_duplicates  unchanged",
        "  near_duplicates   unchanged",
        "  text_duplicates   unchanged",
        "  decontaminate     unchanged",
        "  agreement         unchanged",
        "  match             entries: 0, 1",
        "  balance           probability 1, copies 1",
        '  split             split: "train"',
        "  shards            unchanged",
        "                    kept",
    ]


@pytest.mark.parametrize(
    ("id", "ending"),
    [
        ("009", "exact_duplicates  left: the same pixels as another: 003, which stays"),
        ("010", "the same pixels as another: 009, which left at exact_duplicates: the same pixels as another"),
        ("008", "nearly the same picture as another: 004, which left at balance: in no rare entry"),
        ("004", "stop_tags tags: without hash (says nothing: on 11 samples, 100.0% of set) exact"),
        ("004", "probability 0, copies 0 left: in no rare entry"),
        ("011", "decode            left: not an image: cannot identify <script>alert('caption')</script> "),
    ],
)
def test_the_story_of_a_sample_that_left(done: Curated, id: str, ending: str) -> None:
    story = explain(id, done.out)
    assert " ".join(ending.split()) in " ".join(story.split())
    assert "kept" not in story
    assert max(map(len, story.splitlines())) <= 100


def test_the_story_of_a_copied_sample_says_why(done: Curated) -> None:
    assert f"                    {WHY}\n" in explain("003", done.out)


@pytest.mark.parametrize(
    ("id", "hint"),
    [("3", "; did you mean 003?"), ("0O5", "; did you mean 0"), ("zzz", "$"), ("a\nb\x1b[2J", "$")],
)
def test_an_unknown_id_is_answered_with_those_like_it(done: Curated, id: str, hint: str) -> None:
    with pytest.raises(DataError, match=r"has the id '[\w\\\[]+'" + hint.replace("?", r"\?")) as caught:
        explain(id, done.out)
    assert str(caught.value).isprintable()


def test_hostile_text_stays_on_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / FOLDER / "00-read-1"
    row = {"id": "a", "caption": "\x1b[2J\u202eabc\r\n" + "x" * 10**6, "tags": ["\x07", "\u200d"]}
    keeping(frame_of([row])).write_parquet(str(folder / ROWS))
    (folder / DONE).write_text(
        '{"name": "read", "fingerprint": "", "rows_in": 1, "rows_out": 1, "reasons": {}, "seconds": 1, "facts": {}}'
    )
    story = explain("a", tmp_path)
    assert all(line.isprintable() for line in story.splitlines())
    assert "\\x1b[2J\\u202eabc\\r\\n" in story
    assert "\\x07, \\u200d" in story
    assert len(story) < 800
    assert story.endswith("kept so far: the curation is not finished")


def test_folders_that_are_no_curation_are_named(done: Curated, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no curation; name a folder"):
        explain("001", tmp_path / "nothing")
    folders = step_folders(done.out)
    assert list(folders) == [step.name for step in done.steps]
    assert all(load(folder).name == name for name, folder in folders.items())
    (tmp_path / FOLDER).mkdir()
    for number, folder in enumerate([folders["read"], folders["read"]]):
        (tmp_path / FOLDER / f"00-read-{number}").symlink_to(folder)
    (tmp_path / FOLDER / "01-damaged-1").mkdir()
    with pytest.raises(DataError, match="stopped on its way to other settings"):
        explain("001", tmp_path)
    (tmp_path / FOLDER / "00-read-1").unlink()
    assert list(step_folders(tmp_path)) == ["read"]


def test_a_ledger_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many(300, 1, False).write_parquet(str(tmp_path / "step" / ROWS))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        ledger.write(tmp_path / "ledger.parquet", {"step": tmp_path / "step"})
    assert not (tmp_path / "ledger.parquet").exists()
