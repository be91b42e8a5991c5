"""Tar shards as frames: where each sample's media is, and what stands beside it; media bytes are passed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
from daft import DataFrame, col, lit
from daft.functions import when

from xray.curate.sources.columns import Columns, shaped
from xray.curate.sources.files import File
from xray.curate.sources.kinds import Source
from xray.curate.sources.rows import BATCH, LISTS, NOTES, Fault, Rows, note, schema_of
from xray.curate.sources.tables import parquet
from xray.data.errors import DataError, DecodeError
from xray.data.records import read_record
from xray.data.shard_files import Group, ShardError, ShardFile, groups
from xray.data.shards import index_schema

TEXTS = ("json", "txt", "cls")  # members that are read
TIMEOUT = 60.0  # seconds without a byte after which a shard is given up
UNREADABLE = "the shard cannot be read"
NO_MEDIA = Fault("there is no image or clip among its members")

_TEXT = ("id", "name", "shard", "media", "caption", "label", "source", "identity")
_SCHEMA = schema_of(
    {
        **dict.fromkeys(_TEXT, pa.string()),
        **dict.fromkeys(("offset", "size", "strip"), pa.int64()),
        "tags": LISTS,
    }
)
_NAMES = {"url": "name", **{name: name for name in _SCHEMA.names[: -len(NOTES)] if name != "name"}}


@dataclass(frozen=True)
class Members:
    """Reader of a tar shard.

    Attributes:
        source: name, for the ids of samples that have none.
        retries: at opening and reading the shard, without any progress between them.
    """

    source: str
    retries: int

    def __call__(self, file: File, columns: pa.Schema) -> Iterator[pa.Table]:
        """What was read before a fault counts."""
        rows = self._rows(file)
        while batch := list(islice(rows, BATCH)):
            table: dict[str, list[Any]] = {name: [] for name in columns.names}
            for row, fault, place in batch:
                for name in columns.names[: -len(NOTES)]:
                    table[name].append(row.get(name))
                note(table, fault, file, place)
            yield pa.table(table, schema=columns)

    def _rows(self, file: File) -> Iterator[tuple[dict[str, Any], Fault | None, str]]:
        """A sample's columns, why it is none, and an id for that case."""
        shard = ShardFile(file.url, 0, TIMEOUT, self.retries + 1)
        try:
            for group in groups(shard, TEXTS):
                place = f"{self.source}:{file.name}/{group.key}"
                try:
                    row = _sample(group, file)
                except DecodeError as error:
                    yield {}, Fault("its text or JSON is damaged", str(error)), place
                    continue
                yield row, None if row else NO_MEDIA, place
        except ShardError as error:
            yield {}, Fault(UNREADABLE, str(error)), file.url
        finally:
            shard.close()


def _sample(group: Group, file: File) -> dict[str, Any]:
    """The columns of a sample, none if there is no media."""
    record = read_record(group)
    if record is None:
        return {}
    offset, size = group.places[record.extension]
    shard = file.url.rsplit("/", 1)[-1]
    return {
        "id": record.id if record.id != group.key else None,
        "name": f"{shard}/{group.key}.{record.extension}",
        "shard": shard,
        "offset": offset,
        "size": size,
        "strip": record.frames if record.is_strip else None,
        "media": "clip" if record.media == "clip" else None,  # other files may still turn out to move
        "caption": record.caption,
        "tags": record.tags,
        "label": record.label,
        "source": record.source,
        "identity": record.identity,
    }


def shards(source: Source, retries: int) -> list[tuple[DataFrame, Columns]]:
    """The frame of `frame.COLUMNS`, less `key`, of tar shards."""
    frame = Rows(source.files, Members(source.name, retries), _SCHEMA).read()
    columns = Columns(_NAMES)
    return [(shaped(frame, columns, source.name), columns)]


def dataset(source: Source) -> list[tuple[DataFrame, Columns]]:
    """The same of a dataset that this package made, from its index."""
    frame = parquet(source.files, source)
    missing = [name for name in index_schema().names if name not in frame.column_names]
    if missing:
        raise DataError(f"{source.files[0].url} lacks the columns {', '.join(missing)}; pack or curate the set again")
    is_strip = (col("media") == lit("clip")) & (col("frames") > lit(1))
    frame = frame.with_column("strip", when(is_strip, col("frames")).otherwise(lit(None)))
    frame = frame.with_column("media", when(col("media") == lit("clip"), col("media")).otherwise(lit(None)))
    columns = Columns({name: name for name in _NAMES if name != "url"})
    return [(shaped(frame, columns, source.name), columns)]
