"""Frames, settings and contexts for the tests of curation's steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("daft", reason="curation needs Daft")

import daft
from daft import DataFrame, col

from xray.curate import engine
from xray.curate.frame import BALANCED, COLUMNS, HEAVY, MATCHED, MEASURES, SPLIT, key_of
from xray.curate.settings import Settings
from xray.curate.step import Context

engine.start("native")
PLAIN: dict[str, Any] = {"source": "set", "url": "", "media": "image", "caption": "", "label": "", "identity": ""}


def frame_of(rows: Iterable[Mapping[str, Any]], *, partitions: int = 1) -> DataFrame:
    """A frame of samples; ids count up, and what a row does not say is empty.

    Columns of later steps are there when a row names them.
    """
    rows = list(rows)
    types: dict[str, Any] = {**COLUMNS, **MEASURES, **MATCHED, **BALANCED, **SPLIT}
    named = {name for row in rows for name in row}
    columns = [name for name in (*types, *HEAVY) if name in COLUMNS or name in named]
    table: dict[str, list[Any]] = {name: [] for name in columns if name != "key"}
    for number, row in enumerate(rows):
        filled: dict[str, Any] = {"id": f"{number:03d}", "alternatives": [], "tags": [], **PLAIN, **row}
        for name in table:
            table[name].append(filled.get(name))
    frame = daft.from_pydict({**table})
    frame = frame.with_columns({name: col(name).cast(types[name]) for name in table if name in types})
    frame = frame.with_column("key", key_of(col("id")))
    return frame.into_partitions(partitions) if partitions > 1 else frame


def context_for(folder: Path, **settings: Any) -> Context:
    """What a step is given, with `folder` as its own."""
    folder.mkdir(parents=True, exist_ok=True)
    return Context("source", Settings(**{"progress": False, **settings}), folder, {})


def rows_of(frame: DataFrame) -> dict[str, dict[str, Any]]:
    """The rows of a frame by id."""
    rows = frame.to_pylist()
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows), "an id came twice"
    return by_id


def reasons_of(frame: DataFrame) -> dict[str, str | None]:
    """The reason of every id, None where it stays."""
    return {id: row["reason"] for id, row in rows_of(frame).items()}
