"""A folder of images and clips, in the convention of `xray.data.folder`, as a frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import reduce

import daft
import pyarrow as pa
from daft import DataFrame, col, lit
from daft.functions import download

from xray.curate.frame import TEXT, drop
from xray.curate.sources.columns import Columns, shaped
from xray.curate.sources.files import File
from xray.curate.sources.kinds import METADATA, Source
from xray.curate.sources.rows import BELOW, DETAIL, FOLDER, PLACE, REASON
from xray.curate.sources.tables import tables
from xray.curate.sources.values import text_column
from xray.data.errors import DataError
from xray.data.folder import EXTENSIONS

OUTSIDE = "it names a file outside the folder"
ABSENT = "it names a file that is not there"


def folder(source: Source, setting: str, retries: int) -> list[tuple[DataFrame, Columns]]:
    """Frames of `frame.COLUMNS`, less `key`: what metadata files describe, and the other images and clips.

    Raises:
        DataError: a metadata file cannot be read or names no files.
    """
    metadata = [file for file in source.files if file.name.rsplit("/", 1)[-1] in METADATA and file.size]
    files = _listing(source.files)
    if not metadata:
        return [(_undescribed(files, source), COLUMNS)]
    parts = tables(source, metadata, setting, retries)
    if not all("url" in columns.names for _, columns in parts if columns.names):
        raise DataError(f"the metadata in {source.text} names no files; a column file_name is needed")
    described = reduce(DataFrame.union_all, [frame for frame, _ in parts]).collect()  # as bounded as the listing
    found = described.exclude("size").join(files.select("url", "size"), on="url", how="left")
    found = drop(found, ~col("url").startswith(source.root) | col("url").contains("/../"), OUTSIDE)
    found = drop(found, col("size").is_null(), ABSENT)
    rest = files.join(described.select("url"), on="url", how="anti")
    return [(found, parts[0][1]), (_undescribed(rest, source), Columns())]


COLUMNS = Columns({"url": "file_name", "caption": "text file beside it"})


def _listing(files: Sequence[File]) -> DataFrame:
    """The images and clips: url, name, size, and `text`, the text file beside it, if any."""
    texts = {os.path.splitext(file.name)[0]: file.url for file in files if file.name.endswith(".txt")}
    media = [file for file in files if os.path.splitext(file.name)[1].lower() in EXTENSIONS]
    table = {
        "url": [file.url for file in media],
        "name": [file.name for file in media],
        "size": [file.size for file in media],
        "text": [texts.get(os.path.splitext(file.name)[0]) for file in media],
    }
    types = {"url": pa.string(), "name": pa.string(), "size": pa.int64(), "text": pa.string()}
    return daft.from_arrow(pa.table(table, schema=pa.schema(types)))


def _undescribed(files: DataFrame, source: Source) -> DataFrame:
    """Images and clips that no metadata names; the text file beside one is its caption."""
    nothing = lit(None).cast(TEXT)
    notes = {PLACE: nothing, REASON: nothing, DETAIL: nothing, FOLDER: lit(source.root), BELOW: lit("")}
    texts = files.with_columns({"caption": text_column(download(col("text"), on_error="null")), **notes})
    return shaped(texts, Columns({"url": "name", "caption": "caption", "size": "size"}), source.name)
