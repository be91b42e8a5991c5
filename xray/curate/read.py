"""The first step: whatever a source holds, as one frame of `frame.COLUMNS`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

from daft import DataFrame, Window, col, lit
from daft.functions import format, length, list_count, row_number, when

from xray.curate.frame import BYTES, COLUMNS, TEXT, drop, key_of
from xray.curate.settings import Settings
from xray.curate.sources.columns import Columns
from xray.curate.sources.files import File, is_remote
from xray.curate.sources.folders import folder
from xray.curate.sources.kinds import METADATA, Source, tell_all
from xray.curate.sources.shards import dataset, shards
from xray.curate.sources.tables import tables
from xray.curate.sources.values import digest_column
from xray.curate.step import Context, Step
from xray.data.download import sha256_of
from xray.data.errors import DataError

REPEATED = "the id is used already"
# how Daft's errors say that a file, not this program or its disk, is to blame
UNREAD = ("CorruptFile", "FileNotFound", "ByteStreamError", "Timeout", "SocketError", "Throttled", "MiscTransient")


def read(frame: DataFrame | None, context: Context) -> DataFrame:
    """Read the source: a row for every sample, and for everything in it that cannot be one.

    Raises:
        DataError: the source is not there, is of no known kind or lacks columns.
    """
    sources = tell_all(context.source, context.settings.retries)
    parts: list[tuple[DataFrame, Columns]] = []
    for source in sources:
        made = _frames(source, context.settings)
        if len(sources) > 1:
            made = [(_prefixed(frame, source.name), columns) for frame, columns in made]
        parts += made
    context.facts.update(_facts(sources, [columns for _, columns in parts]))
    return _unique(_together([frame for frame, _ in parts]), context)


def inputs(text: str, settings: Settings) -> Any:
    """Digest of what the source is made of: the bytes of tables on this machine, and path, size and time of media and
    of remote files.
    """
    digest = hashlib.sha256()
    for source in tell_all(text, settings.retries):
        digest.update(repr((source.kind, source.name)).encode())
        read_whole = [file for file in source.files if _is_text(source, file)]
        with ThreadPoolExecutor(8) as pool:
            digests = pool.map(sha256_of, (file.url for file in read_whole))
            contents = dict(zip(read_whole, digests, strict=True))
        for file in source.files:
            digest.update(repr((file.name, contents.get(file) or (file.size, file.stamp))).encode())
    return digest.hexdigest()


STEP = Step("read", read, reads=("columns",), inputs=inputs)


def _frames(source: Source, settings: Settings) -> list[tuple[DataFrame, Columns]]:
    if source.kind == "folder":
        return folder(source, settings.columns, settings.retries)
    if source.kind == "shards":
        return shards(source, settings.retries)
    if source.kind == "dataset":
        return dataset(source)
    return tables(source, source.files, settings.columns, settings.retries)


def _together(frames: Sequence[DataFrame]) -> DataFrame:
    """All rows; `bytes` is there if any frame has it."""
    embeds = any("bytes" in frame.column_names for frame in frames)
    names = [name for name in COLUMNS if name != "key"] + ["bytes"] * embeds + ["reason", "detail"]

    def alike(frame: DataFrame) -> DataFrame:
        if embeds and "bytes" not in frame.column_names:
            frame = frame.with_column("bytes", lit(None).cast(BYTES))
        return frame.select(*names)

    return reduce(DataFrame.union_all, map(alike, frames))


def _prefixed(frame: DataFrame, name: str) -> DataFrame:
    """With the set's name before each id: several sources count alike."""
    own = col("id").startswith(f"{name}:") | col("id").startswith(format("{}:", col("source")))
    return frame.with_column("id", when(own, col("id")).otherwise(format("{}:{}", lit(name), col("id"))))


def _unique(frame: DataFrame, context: Context) -> DataFrame:
    """With keys, and of several rows with one id all but one dropped, under names of their own. The one with the
    longest caption and the most tags stays; the order of the source does not matter.

    Raises:
        DataError: a file turned out to be damaged, or could not be read on.
    """
    frame = frame.with_column("key", key_of(col("id")))
    frame = frame.select(*COLUMNS, *(name for name in frame.column_names if name not in COLUMNS))
    try:
        if "bytes" not in frame.column_names:  # what is embedded is sooner read twice than written twice
            frame = context.keep(frame, "rows")
        counted = frame.select("key").groupby("key").agg(col("key").count().alias("rows"))
        repeated = context.keep(counted.where(col("rows") > lit(1)).select("key"), "repeated")
    except Exception as error:
        words = " ".join(str(error).split())
        if not any(sign in words for sign in UNREAD):
            raise
        raise DataError(f"the source {context.source} cannot be read ({words[:300]})") from error
    if repeated.count_rows() == 0:
        return frame
    few = frame.join(repeated, on="key", how="semi")
    content = digest_column(lit(True), *(col(name) for name in frame.column_names if name not in ("id", "key")))
    better = [col("reason").is_null(), length(col("caption")), list_count(col("tags")), content]
    rank = row_number().over(Window().partition_by("key").order_by(*better, desc=True)).cast(TEXT)
    few = few.with_column("rank", rank)
    few = drop(few, col("rank") != lit("1"), REPEATED, detail=col("id"))
    renamed = when(col("rank") == lit("1"), col("id")).otherwise(format("{}#{}", col("id"), col("rank")))
    few = few.with_column("id", renamed).with_column("key", key_of(col("id"))).select(*frame.column_names)
    return frame.join(repeated, on="key", how="anti").union_all(few)


def _is_text(source: Source, file: File) -> bool:
    """Whether a file's bytes are digested: tables and metadata on this machine."""
    if is_remote(file.url) or source.kind == "shards":
        return False
    return source.kind != "folder" or file.name.rsplit("/", 1)[-1] in METADATA


def _facts(sources: Sequence[Source], columns: Sequence[Columns]) -> dict[str, Any]:
    used: dict[str, str] = {}
    for found in columns:
        used.update({part: name for part, name in found.names.items() if part not in used})
    return {
        "kind": ", ".join(dict.fromkeys(source.kind for source in sources)),
        "files": sum(len(source.files) for source in sources),
        "columns": used,
        "has_media": any(found.has_media for found in columns),
        "unused_columns": sorted({name for found in columns for name in found.unused}),
    }
