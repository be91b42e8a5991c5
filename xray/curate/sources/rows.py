"""Rows of CSV and JSONL files as a Daft source that streams: what is damaged becomes a row that says so."""

from __future__ import annotations

import asyncio
import csv
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
from daft.io.source import DataSource, DataSourceTask
from daft.recordbatch import RecordBatch
from daft.schema import Schema

from xray.curate.sources.files import File, opened
from xray.curate.sources.values import tags_of, text_of
from xray.data.errors import DataError

BATCH = 8192  # rows
# What is added to a table's columns, under names that no table has: the id of a row that cannot be a sample, why, the
# folder that holds the file, with a slash behind it, and where that is within the source's folder, likewise.
NOTES = ("\x1fplace", "\x1freason", "\x1fdetail", "\x1ffolder", "\x1fbelow")
PLACE, REASON, DETAIL, FOLDER, BELOW = NOTES
LISTS = pa.list_(pa.string())
UNREADABLE = "the file cannot be read"

Reader = Callable[[File, pa.Schema], Iterator[pa.Table]]


@dataclass(frozen=True)
class Rows(DataSource):
    """Files as a Daft source: a task each, streamed in batches.

    Attributes:
        files: to read.
        reader: `reader(file, columns)` gives Arrow tables of these columns.
        columns: their names and types.
    """

    files: Sequence[File]
    reader: Reader
    columns: pa.Schema

    @property
    def name(self) -> str:
        """Of the source, in Daft's plans."""
        return "rows"

    @property
    def schema(self) -> Schema:
        """The columns as Daft has them."""
        return Schema.from_pyarrow_schema(self.columns)

    async def get_tasks(self, pushdowns: Any) -> AsyncIterator[DataSourceTask]:
        """A task a file."""
        for file in self.files:
            yield _Task(file, self.reader, self.columns)


@dataclass(frozen=True)
class _Task(DataSourceTask):
    file: File
    reader: Reader
    columns: pa.Schema

    @property
    def schema(self) -> Schema:
        return Schema.from_pyarrow_schema(self.columns)

    async def read(self) -> AsyncIterator[RecordBatch]:
        batches = self.reader(self.file, self.columns)
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            yield RecordBatch.from_arrow_table(batch)


@dataclass(frozen=True)
class JsonLines:
    """Reader of JSONL: an object a line.

    Attributes:
        source: name, for the ids of lines that are none.
        retries: at opening the file.
    """

    source: str
    retries: int

    def __call__(self, file: File, columns: pa.Schema) -> Iterator[pa.Table]:
        """Columns of lists are made of anything that holds tags, others of texts and numbers."""
        takes = [(name, tags_of if pa.types.is_list(columns.field(name).type) else text_of) for name in columns.names]
        takes = [(name, take) for name, take in takes if name not in NOTES]
        lines = enumerate(_lines(file, self.retries), 1)
        while batch := list(islice(lines, BATCH)):
            table: dict[str, list[Any]] = {name: [] for name in columns.names}
            for number, line in batch:
                if isinstance(line, str) and not line.strip():
                    continue
                row = json_object(line) if isinstance(line, str) else None
                for name, take in takes:
                    value = None if row is None else row.get(name)
                    table[name].append(None if value is None else take(value))
                fault = None if row is not None else line if isinstance(line, Fault) else NO_OBJECT
                note(table, fault, file, f"{self.source}:{file.name}:{number}")
            yield pa.table(table, schema=columns)


@dataclass(frozen=True)
class Separated:
    """Reader of CSV with a header, separated by commas (tabs in *.tsv); attributes as `JsonLines`."""

    source: str
    retries: int

    def __call__(self, file: File, columns: pa.Schema) -> Iterator[pa.Table]:
        """All columns are texts; an empty field is null."""
        header: list[str] = []
        records = enumerate(_records(file, self.retries), 1)
        while batch := list(islice(records, BATCH)):
            table: dict[str, list[Any]] = {name: [] for name in columns.names}
            for number, record in batch:
                if not header and not isinstance(record, Fault):
                    header = record
                    places = {name: header.index(name) for name in columns.names if name in header}
                    continue
                if not record:
                    continue
                fields = record if isinstance(record, list) else []
                fault = record if isinstance(record, Fault) else None if len(fields) == len(header) else UNEVEN
                for name in columns.names[: -len(NOTES)]:
                    place = places.get(name) if fault is None else None
                    table[name].append(None if place is None else fields[place] or None)
                note(table, fault, file, f"{self.source}:{file.name}:{number}")
            yield pa.table(table, schema=columns)


@dataclass(frozen=True)
class Fault:
    """Why a line or the rest of a file gives no row."""

    reason: str
    detail: str | None = None


NO_OBJECT = Fault("the line is no JSON object")
UNEVEN = Fault("the line has more or fewer fields than the header")


def schema_of(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    """These columns and the notes."""
    return pa.schema([*columns.items(), *((name, pa.string()) for name in NOTES)])


def note(table: dict[str, list[Any]], fault: Fault | None, file: File, place: str) -> None:
    """Add a row's notes to a table that is being made; `place` is its id if it has a fault."""
    table[PLACE].append(None if fault is None else place)
    table[REASON].append(None if fault is None else fault.reason)
    table[DETAIL].append(None if fault is None else fault.detail)
    table[FOLDER].append(file.folder)
    table[BELOW].append(file.below)


def json_object(line: str) -> dict[str, Any] | None:
    """The object in a line, None if it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def header_of(file: File, retries: int) -> list[str]:
    """The columns that a CSV file's first line names.

    Raises:
        DataError: the file cannot be read.
    """
    first = next(_records(file, retries), [])
    if isinstance(first, Fault):
        raise DataError(f"{file.url} cannot be read ({first.detail})")
    return first


def keys_of(file: File, retries: int, lines: int = 1000) -> list[str]:
    """The keys of the objects in a JSONL file's first lines, in order.

    Raises:
        DataError: the file cannot be read.
    """
    keys: dict[str, None] = {}
    for line in islice(_lines(file, retries), lines):
        if isinstance(line, Fault):
            raise DataError(f"{file.url} cannot be read ({line.detail})")
        keys.update(dict.fromkeys(json_object(line) or {}))
    return list(keys)


def _lines(file: File, retries: int) -> Iterator[str | Fault]:
    """The lines of a text file; if it cannot be read on, its last is a fault."""
    try:
        with opened(file.url, retries, mode="rt", encoding="utf-8-sig", errors="replace", newline="\n") as text:
            yield from text
    except Exception as error:  # each file system has errors of its own
        yield Fault(UNREADABLE, " ".join(str(error).split())[:300])


def _records(file: File, retries: int) -> Iterator[list[str] | Fault]:
    """The records of a CSV file; if it cannot be read on, its last is a fault."""
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**63 - 1 else 2**62)
    separator = "\t" if ".tsv" in file.name else ","
    try:
        with opened(file.url, retries, mode="rt", encoding="utf-8-sig", errors="replace", newline="") as text:
            yield from csv.reader(text, delimiter=separator)
    except Exception as error:  # each file system has errors of its own
        yield Fault(UNREADABLE, " ".join(str(error).split())[:300])
