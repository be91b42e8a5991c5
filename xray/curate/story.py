"""What the steps did to one sample."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import dataset

from xray.curate.frame import HEAVY
from xray.curate.ledger import WIDTH
from xray.curate.matching import ENTRIES
from xray.curate.step import ROWS, load, step_folders
from xray.data.errors import DataError
from xray.data.shards import INDEX

QUIET = ("id", "key", "pixels", "phash", "reason", "detail", *HEAVY)  # columns that tell a reader nothing
LONGEST = 300  # characters of a text that are shown
INDENT = 20
SEARCHED = 20_000  # ids that are compared letter by letter with one that does not exist

Row = Mapping[str, Any]


def explain(id: str, out: str | Path) -> str:
    """The story of one sample: what each step changed, and where and why it left.

    Args:
        id: of the sample.
        out: the folder of a curation, finished or not.

    Returns:
        Lines of text; characters that cannot be seen are written as escapes, such as ``\\u200b``.

    Raises:
        DataError: there is no such sample, or `out` holds no curation.
    """
    folders = step_folders(out)
    lines = [visible(id)]
    before: Row = {}
    for number, (name, folder) in enumerate(folders.items()):
        row = _row_of(id, folder)
        if row is None:
            raise DataError(f"no sample of {out} has the id {visible(id)!r}{_hint(id, folder)}")
        news = list(_changes(before, row, folder))
        if row["reason"] is not None:
            reason = _reason(row, list(folders.values())[number:])
            return "\n".join([*lines, *_paragraph(name, [*news, f"left: {reason}"])])
        if row["detail"]:
            news.append(visible(row["detail"]))
        lines += _paragraph(name, news or ["unchanged"])
        before = row
    done = (Path(out) / INDEX).is_file()
    return "\n".join([*lines, *_paragraph("", ["kept" if done else "kept so far: the curation is not finished"])])


def visible(text: str) -> str:
    """Text for a terminal: one line, shortened, what cannot be seen as an escape."""
    shown = text if len(text) <= LONGEST else text[:LONGEST] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _row_of(id: str, folder: Path) -> Row | None:
    """A sample's row in a step's table; of all other rows only the ids are read."""
    for path in sorted((folder / ROWS).rglob("*.parquet")):
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name not in HEAVY]
            for group in range(file.num_row_groups):
                place = pc.index(file.read_row_group(group, columns=["id"])["id"], id).as_py()
                if place >= 0:
                    row: Row = file.read_row_group(group, columns=names).slice(place, 1).to_pylist()[0]
                    return row
    return None


def _changes(before: Row, row: Row, folder: Path) -> Iterator[str]:
    """What a step made of a sample: a phrase for each column that is new or another, one for all new numbers."""
    measures = []
    noise = load(folder).facts.get("stop_tags", [])
    stopped = {found["tag"]: found for found in noise if found.get("source", row["source"]) == row["source"]}
    for name, value in row.items():
        old = before.get(name)
        if name in QUIET or value == old or not (_told(old) or _told(value)):
            continue
        if name == "entries":
            yield f"{name}: {_said(_entries(value, folder))}"
        elif isinstance(value, list) and isinstance(old, list):
            yield f"{name}: {_exchanged(old, value, stopped)}"
        elif _told(old):
            yield f"{name}: {_said(old)} -> {_said(value)}"
        elif isinstance(value, int | float):
            measures.append(f"{name} {_said(value)}")
        else:
            yield f"{name}: {_said(value)}"
    if measures:
        yield ", ".join(measures)


def _entries(numbers: list[int], folder: Path) -> list[Any]:
    """The metadata's entries of these numbers, where the step tells them."""
    path = folder / ENTRIES
    return pq.read_table(path, columns=["entry"])["entry"].take(numbers).to_pylist() if path.is_file() else numbers


def _told(value: Any) -> bool:
    """Whether there is anything to say."""
    return value is not None and value != "" and value != []


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(visible(str(item)) for item in value) or "none"
    if isinstance(value, str):
        return f'"{visible(value)}"'
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _exchanged(old: Sequence[Any], new: Sequence[Any], stopped: Mapping[str, Any]) -> str:
    """Which items of a list went and came."""
    gone, come = [item for item in old if item not in new], [item for item in new if item not in old]
    if not gone and not come:
        return f"in another order or number: {_said(list(new))}"
    parts = [f"without {', '.join(visible(str(item)) + _noise(stopped.get(item)) for item in gone)}"] if gone else []
    return "; ".join([*parts, f"with {_said(come)}"] if come else parts)


def _noise(found: Mapping[str, Any] | None) -> str:
    """Why a tag says nothing, if a step found so."""
    if found is None:
        return ""
    share = f", {found['share']:.1%} of {visible(found['source'])}" if "share" in found else ""
    return f" (says nothing: on {found.get('count', 0):,} samples{share})"


def _reason(row: Row, folders: Sequence[Path]) -> str:
    """Why a sample left, and what became of the other one that it is said to resemble."""
    reason, detail = row["reason"], row["detail"]
    if not detail:
        return str(reason)
    other = _row_of(detail, folders[0]) if detail != row["id"] else None
    if other is None:
        return f"{reason}: {visible(detail)}"
    for folder in folders:
        other = _row_of(detail, folder)
        if other is not None and other["reason"] is not None:
            return f"{reason}: {visible(detail)}, which left at {load(folder).name}: {other['reason']}"
    return f"{reason}: {visible(detail)}, which stays"


def _paragraph(name: str, phrases: Sequence[str]) -> list[str]:
    """A step's name, and beside it what is to be said."""
    lines: list[str] = []
    for phrase in phrases:
        start = f"  {name if not lines else '':{INDENT - 2}}"
        lines += textwrap.wrap(phrase, WIDTH, initial_indent=start, subsequent_indent=" " * (INDENT + 2))
    return lines


def _hint(id: str, folder: Path) -> str:
    """Ids much like one that does not exist."""
    ids = dataset.dataset(sorted((folder / ROWS).rglob("*.parquet"))).scanner(columns=["id"])
    holding: list[str] = []
    first: list[str] = []
    for batch in ids.to_batches():
        column = batch.column("id")
        if len(holding) < 3:
            holding += column.filter(pc.match_substring(column, id, ignore_case=True)).slice(0, 3).to_pylist()
        if len(first) < SEARCHED:
            first += column.slice(0, SEARCHED - len(first)).to_pylist()
    near = holding[:3] or difflib.get_close_matches(id, first, n=3)
    return f"; did you mean {' or '.join(visible(other) for other in near)}?" if near else ""
