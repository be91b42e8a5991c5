"""The last step: tar shards and their index.

Samples are ordered by a seeded hash of their id, so that every shard holds a random part of the set, and the order is
cut into shards by the samples' sizes alone, before any is written. Each shard is then written by a task of its own:
how many run at a time, and where, changes no byte.

The media of a large set are not held at a time. They are dealt out to waves by the hash of the id, once, and the
waves are written one after the other; a wave holds about `WAVE_BYTES`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import daft
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from daft import DataFrame, DataType, Expression, Series, col, lit
from daft.functions import concat, length_bytes, list_join, shift_right, when
from daft.functions import hash as hashed

from xray.curate.frame import NUMBER, TEXT, keeping
from xray.curate.settings import Settings
from xray.curate.step import SCRATCH, Context, Step, stored
from xray.data.shards import INDEX, Entry, Shard, folder_errors, index_schema, shard_name

WAVE_BYTES = 2**30
MOST_WAVES = 256  # on a cluster these are as large as they have to be
ORDER = 2**32  # added to the seed: keys are the same hash of the id, with seed 0
BUCKET_BITS = 16  # a plan holds the sizes of this many parts of the order, not of every sample
OVERHEAD = 2000  # bytes that a sample takes in a tar file beside its media and texts
INDEX_ROWS = 2**16  # of a row group
WITHOUT_EFFECT = ("engine", "address", "num_workers", "progress")  # settings of the run, not of the set

DEFAULTS: dict[str, tuple[DataType, object]] = {
    "media": (TEXT, ""),
    "extension": (TEXT, ""),
    "caption": (TEXT, ""),
    "label": (TEXT, ""),
    "split": (TEXT, "train"),
    "source": (TEXT, ""),
    "identity": (TEXT, ""),
    "width": (NUMBER, 0),
    "height": (NUMBER, 0),
    "frames": (NUMBER, 0),
    "probability": (DataType.float64(), 1.0),
    "copies": (NUMBER, 1),
    "data_size": (DataType.int64(), 0),
}
NAMES = tuple(field.name for field in fields(Entry))
COLUMNS = ("number", "first", "order", "sample", "data", *NAMES)  # that a shard is written from
PLACED = pa.struct([*index_schema(), ("sample", pa.string())])


def write_shards(frame: DataFrame | None, context: Context) -> DataFrame:
    """Write `shard-*.tar` and `index.parquet` into the step's folder; the latter alone for a source without media.

    A training sample with k copies is written k times, as ID, ID~2, ..., in random places.

    Column set: `shard`, the name of the file that holds the sample, or its first copy.

    Raises:
        DataError: the disk is full.
    """
    assert frame is not None
    settings, folder = context.settings, context.folder
    entries = _entries(frame, settings.seed)
    with _Index(folder / INDEX, settings) as index:
        if not context.facts_of("read")["has_media"]:
            placed = context.keep(entries.with_columns(_nowhere()), "placed")
            index.write(placed.sort(["order", "id"]))
            return keeping(frame.with_column("shard", lit("")))
        plan = _Plan(settings.shard_bytes)
        for number, (rows, data) in enumerate(_waves(entries, context)):
            rows = plan.assign(rows)
            samples = rows.join(data, left_on="sample", right_on="id", prefix="data_of_")
            write = _write_shard(str(folder), *(col(name) for name in COLUMNS))
            written = samples.groupby("number").map_groups(write.alias("row"))
            placed = context.keep(written.select(col("row").unnest()), f"placed/{number}")
            index.write(placed.sort(["shard", "offset"]))
    first = stored(folder / SCRATCH / "placed").where(col("id") == col("sample")).select("id", "shard")
    return keeping(frame.join(first, on="id", how="left"))


def _entries(frame: DataFrame, seed: int) -> DataFrame:
    """What the index says of each copy of each sample, and `sample` (its id), `key`, `order`, `weight` (bytes)."""
    frame = frame.with_columns({name: lit(None) for name in DEFAULTS if name not in frame.column_names})
    filled = {name: col(name).cast(kind).fill_null(value) for name, (kind, value) in DEFAULTS.items()}
    frame = frame.with_columns(filled)
    copies = when(col("split") == "train", col("copies")).otherwise(lit(1))
    frame = frame.with_columns({"sample": col("id"), "copy": _count_up(copies)}).explode("copy")
    again = concat(concat(col("id"), lit("~")), col("copy").cast(TEXT))
    frame = frame.with_column("id", when(col("copy") > lit(1), again).otherwise(col("id")))
    texts = length_bytes(col("caption")) + length_bytes(list_join(col("tags"), ", ")).fill_null(0)
    frame = frame.with_columns(
        {
            "order": hashed(col("id"), seed=lit(ORDER + seed)),
            "weight": (col("data_size") + texts + OVERHEAD).cast(DataType.int64()),
        }
    )
    return frame.select("sample", "key", "order", "weight", *NAMES)


@daft.func.batch(return_dtype=DataType.list(NUMBER))
def _count_up(copies: Series) -> pa.Array:
    """1 ... k for each number of copies k; a sample that is here has one."""
    counts = np.maximum(copies.to_arrow().to_numpy(zero_copy_only=False), 1)
    ends = np.cumsum(counts)
    numbers = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts) + 1
    return pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), numbers.astype(np.int32))


def _waves(entries: DataFrame, context: Context) -> Iterator[tuple[DataFrame, DataFrame]]:
    """The entries and the media of each wave."""
    folder = context.folder / SCRATCH / "waves"
    entries = context.keep(entries, "entries")
    media = context.table("decode").where(col("data").not_null()).select("id", "key", "data")
    total = entries.agg(col("weight").sum()).to_pydict()["weight"][0]
    count = min(MOST_WAVES, -(-total // WAVE_BYTES))
    if count <= 1:
        yield entries, media.exclude("key")
        return
    part = shift_right(col("key"), lit(48)).cast(DataType.int64())
    wave = shift_right(part * count, lit(16)).cast(NUMBER)
    for name, whole in (("entries", entries), ("media", media)):
        whole.with_column("wave", wave).write_parquet(str(folder / name), partition_cols=["wave"])
    for number in range(count):
        parts = [folder / name / f"wave={number}" for name in ("entries", "media")]
        if all(part.is_dir() for part in parts):
            rows, data = map(stored, parts)
            yield rows, data.exclude("key")


class _Plan:
    """Which shard a sample goes to, from sizes alone: the order is cut where `shard_bytes` are full.

    Sums over 2^16 parts of the order stand for the samples, so that a plan is as small for a large set.
    """

    def __init__(self, shard_bytes: int) -> None:
        self.shard_bytes = shard_bytes
        self.shards = self.samples = 0  # of the waves before

    def assign(self, rows: DataFrame) -> DataFrame:
        """The wave's rows with `number`, of their shard, and `first`, the number of that shard's first sample."""
        bucket = shift_right(col("order"), lit(64 - BUCKET_BITS))
        rows = rows.with_column("bucket", bucket)
        sums = rows.groupby("bucket").agg(col("weight").sum(), col("id").count().alias("count"))
        table = sums.sort("bucket").to_pydict()
        buckets, weights, counts = (np.asarray(table[name], np.int64) for name in ("bucket", "weight", "count"))
        starts = np.unique((np.cumsum(weights) - weights) // self.shard_bytes, return_index=True)[1]
        firsts = (np.cumsum(counts) - counts)[starts] + self.samples
        place = _place(col("bucket"), buckets[starts].tolist(), firsts.tolist(), self.shards)
        self.shards, self.samples = self.shards + len(starts), self.samples + int(counts.sum())
        return (
            rows.with_column("place", place)
            .with_columns({name: col("place").get(name) for name in ("number", "first")})
            .exclude("place", "bucket")
        )


@daft.func.batch(return_dtype=DataType.struct({"number": DataType.int64(), "first": DataType.int64()}))
def _place(bucket: Series, starts: list[int], firsts: list[int], before: int) -> pa.Array:
    """The shard of each bucket."""
    places = np.searchsorted(starts, bucket.to_arrow().to_numpy().astype(np.int64), side="right") - 1
    return pa.StructArray.from_arrays(
        [pa.array(places + before), pa.array(np.asarray(firsts, np.int64)[places])], ["number", "first"]
    )


@daft.func.batch(return_dtype=DataType.from_arrow_type(PLACED))
def _write_shard(folder: str, *columns: Series) -> pa.Array:
    """Write one shard, of all its samples, given by `COLUMNS`."""
    table = pa.table([column.to_arrow() for column in columns], names=list(COLUMNS))
    table = table.sort_by([("order", "ascending"), ("id", "ascending")])
    number, first = table["number"][0].as_py(), table["first"][0].as_py()
    path = Path(folder) / shard_name(number)
    rows = []
    with folder_errors(path), Shard(path) as shard:
        for position in range(len(table)):
            row = table.slice(position, 1).to_pylist()[0]
            entry = Entry(**{name: row[name] for name in NAMES})
            offset = shard.add(f"{first + position:08d}", entry, row["data"])
            place = {"shard": path.name, "offset": offset, "size": len(row["data"]), "sample": row["sample"]}
            rows.append({**{name: row[name] for name in NAMES}, **place})
    return pa.array(rows, PLACED)


def _nowhere() -> dict[str, Expression]:
    """The place of a sample without media."""
    return {"shard": lit(""), "offset": lit(0), "size": lit(0)}


class _Index:
    """Writes `index.parquet`, in row groups that do not depend on how its rows come."""

    def __init__(self, path: Path, settings: Settings) -> None:
        told = {name: value for name, value in asdict(settings).items() if name not in WITHOUT_EFFECT}
        facts = {name: str(told[name]) for name in ("max_side", "max_frames", "seed")}
        facts["curated"] = json.dumps(told, sort_keys=True)
        self.schema = index_schema().with_metadata(facts)
        self.path = path

    def __enter__(self) -> _Index:
        self.waiting = self.schema.empty_table()
        self.writer = pq.ParquetWriter(self.path, self.schema)
        return self

    def write(self, rows: DataFrame) -> None:
        """Append rows, in order."""
        for batch in rows.select(*self.schema.names).to_arrow_iter():
            self.waiting = pa.concat_tables([self.waiting, pa.Table.from_batches([batch]).cast(self.schema)])
            while len(self.waiting) >= INDEX_ROWS:
                self._write(self.waiting.slice(0, INDEX_ROWS))
                self.waiting = self.waiting.slice(INDEX_ROWS)

    def _write(self, table: pa.Table) -> None:
        self.writer.write_table(table.combine_chunks())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and len(self.waiting):
            self._write(self.waiting)
        self.writer.close()


STEP = Step("shards", write_shards, reads=("shard_bytes", "seed", "max_side", "max_frames"))
