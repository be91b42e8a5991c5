"""Finished steps as they lie on disk, for the tests of the steps that read them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from curate_frames import context_for, frame_of
from daft import DataFrame

from xray.curate.frame import keeping, kept
from xray.curate.step import DONE, ROWS, Context, Finished, stored, written


def finish(frame: DataFrame, folder: Path, **facts: Any) -> Path:
    """Write a step's table and its record."""
    folder.mkdir(parents=True)
    written(frame, folder / ROWS)
    done = Finished(folder.name, "", 0, 0, {}, 0.0, facts)
    (folder / DONE).write_text(json.dumps(dataclasses.asdict(done)))
    return folder


def after_read(
    folder: Path, rows: Iterable[Mapping[str, Any]], *, partitions: int = 1, has_media: bool = True, **settings: Any
) -> tuple[DataFrame, Context]:
    """What `decode` is given: samples that `read` has found, and its own folder."""
    read = finish(keeping(frame_of(rows)), folder / "read", has_media=has_media)
    context = dataclasses.replace(context_for(folder / "decode", **settings), earlier={"read": read})
    return in_parts(kept(stored(read / ROWS)), folder / "parts", partitions), context


def in_parts(frame: DataFrame, folder: Path, count: int) -> DataFrame:
    """The same rows in several files, the last ones first."""
    if count == 1:
        return frame
    rows = frame.count_rows()
    size = -(-rows // count)
    for number in range(count):
        written(frame.sort("id", desc=True).offset(number * size).limit(size), folder / f"{number}")
    return stored(folder)
