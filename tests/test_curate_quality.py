"""Dirt put into a clean set, and how much of it the whole pipeline finds, and how much else it takes for dirt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from curate_frames import daft
from dirt import CONSTANT_TAG, COPIES, KINDS, Found, Truth, found, shapes_folder, soil
from PIL import Image

from xray.curate import Settings, curate
from xray.data.folder import read_folder

SIZE = 600
LEAST = 0.95  # of recall and of precision
DUPLICATES = ("exact_duplicates", "near_duplicates", "text_duplicates")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean set, the same one dirty, and what curation makes of it."""
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def truth(folder: Path) -> Truth:
    shapes_folder(folder / "clean", SIZE)
    truth = soil(folder / "clean", folder / "dirty", seed=1)
    settings = Settings(wordnet="off", balance="none", max_side=96, progress=False)
    curate(folder / "dirty", folder / "out", settings)
    return truth


def table_of(folder: Path, step: str) -> dict[str, dict[str, Any]]:
    """The rows of a step's table by file name."""
    (found,) = (folder / "out" / "steps").glob(f"*-{step}-*")
    columns = ["id", "caption", "tags", "reason"]
    rows = daft.read_parquet(str(found / "rows" / "**")).select(*columns).to_pylist()
    return {row["id"].split(":", 1)[1]: row for row in rows}


def dropped(folder: Path, *steps: str) -> set[str]:
    """File names of what these steps dropped."""
    ledger = pq.read_table(folder / "out" / "ledger.parquet").to_pylist()
    return {row["id"].split(":", 1)[1] for row in ledger if row["step"] in steps}


def good(result: Found) -> bool:
    return result.count > 0 and result.recall >= LEAST and result.precision >= LEAST


def test_truncated_files_are_found(folder: Path, truth: Truth) -> None:
    result = found(truth.of("truncated"), dropped(folder, "decode"))
    assert good(result), result


def test_boilerplate_captions_are_found(folder: Path, truth: Truth) -> None:
    """A sample counts as named if it is dropped, or if its caption gives way to another."""
    before, after = table_of(folder, "read"), table_of(folder, "clean_text")
    named = {name for name, row in after.items() if row["reason"] or row["caption"] != before[name]["caption"]}
    result = found(truth.of("boilerplate") & after.keys(), named)
    assert good(result), result


def test_constant_tags_are_found(folder: Path, truth: Truth) -> None:
    """Named is every tag that is taken from a sample."""
    before, after = table_of(folder, "read"), table_of(folder, "stop_tags")
    named = {(name, tag) for name, row in after.items() for tag in {*before[name]["tags"]} - {*row["tags"]}}
    wanted = {(name, CONSTANT_TAG) for name in truth.of("constant tag") & after.keys()}
    result = found(wanted, named)
    assert good(result), result


def test_near_duplicates_are_found(folder: Path, truth: Truth) -> None:
    """Of a picture and its copy one is to go; any other that goes was none."""
    gone = dropped(folder, *DUPLICATES)
    named = {truth.original.get(name, name) for name in gone}
    result = found(set(truth.original.values()), named)
    missed = [truth.change[copy] for copy, original in truth.original.items() if original not in named]
    assert good(result), (result, missed)
    assert not any({copy, original} <= gone for copy, original in truth.original.items()), "a pair went whole"


def test_the_dirt_is_as_it_says(folder: Path, truth: Truth) -> None:
    """Each kind has its share, no sample two, and all the rest is as it was."""
    assert [len(truth.of(kind)) for kind in KINDS] == [SIZE // 10] * len(KINDS)
    clean, dirty = (
        {record.path.name: record for record in read_folder(folder / name).records} for name in ("clean", "dirty")
    )
    assert dirty.keys() - clean.keys() == truth.original.keys()
    for name, record in clean.items():
        same_words = (record.caption, record.tags) == (dirty[name].caption, dirty[name].tags)
        same_bytes = record.path.read_bytes() == dirty[name].path.read_bytes()
        kind = truth.kind.get(name)
        assert same_words == (kind not in ("swapped", "boilerplate", "constant tag")), name
        assert same_bytes == (kind != "truncated"), name
    assert set(truth.change.values()) == set(COPIES)
    for copy, original in truth.original.items():
        with Image.open(dirty[copy].path) as one, Image.open(dirty[original].path) as other:
            assert one.tobytes() != other.convert("RGB").tobytes(), copy


def test_another_seed_soils_others(folder: Path, truth: Truth) -> None:
    again = soil(folder / "clean", folder / "again", seed=1)
    other = soil(folder / "clean", folder / "other", seed=2)
    assert again == truth
    assert other.of("truncated") != truth.of("truncated")
