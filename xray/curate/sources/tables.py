"""Tables as frames: Parquet by Daft itself, CSV and JSONL row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import daft
import pyarrow as pa
import pyarrow.parquet as pq
from daft import DataFrame, DataType, col, lit
from daft.functions import regexp_replace, substr

from xray.curate.frame import TEXT
from xray.curate.sources.columns import Columns, find, shaped
from xray.curate.sources.files import File, is_remote, opened
from xray.curate.sources.kinds import LINES, PARQUET, SEPARATED, Source, extension
from xray.curate.sources.rows import (
    BELOW,
    DETAIL,
    FOLDER,
    LISTS,
    NOTES,
    PLACE,
    REASON,
    UNREADABLE,
    JsonLines,
    Rows,
    Separated,
    header_of,
    keys_of,
    schema_of,
)
from xray.data.errors import DataError

NATIVE = ("s3", "s3a", "s3n", "gs", "gcs", "az", "abfs", "abfss", "http", "https")  # protocols that Daft reads
THREADS = 16
PEEKED = 20  # JSONL files whose first lines are looked at for their keys

Finder = Callable[[dict[str, DataType], str], Columns]


def tables(source: Source, files: Sequence[File], setting: str, retries: int) -> list[tuple[DataFrame, Columns]]:
    """Frames of `frame.COLUMNS`, less `key`, and the columns that each was made of; together they are the tables.

    Args:
        source: what the files belong to.
        files: Parquet, CSV, JSONL.
        setting: the setting `columns`.
        retries: at reading a file.

    Raises:
        DataError: no file can be read, or columns are missing.
    """
    made: list[tuple[DataFrame, Columns]] = []
    unread: list[tuple[File, str]] = []
    for extensions, described in ((PARQUET, _parquet_columns), (SEPARATED, _csv_columns), (LINES, _json_columns)):
        of_kind = [file for file in files if extension(file) in extensions]
        groups: dict[tuple[tuple[str, str], ...], list[File]] = {}
        types: dict[tuple[tuple[str, str], ...], dict[str, DataType]] = {}
        for file, found in zip(of_kind, described(of_kind, retries), strict=True):
            if isinstance(found, str):
                unread.append((file, found))
            else:
                signature = tuple((name, str(dtype)) for name, dtype in found.items())
                groups.setdefault(signature, []).append(file)
                types[signature] = found
        for signature, group in groups.items():
            columns = find(types[signature], setting, group[0].url)
            made.append((shaped(_frame(group, columns, source, retries), columns, source.name), columns))
    if unread and not made:
        raise DataError(f"the table {unread[0][0].url} cannot be read ({unread[0][1]})")
    if unread:
        made.append((shaped(_unread(unread), Columns(), source.name), Columns()))
    return made


def _in_threads(action: Callable[[File], Any], files: Sequence[File]) -> list[Any]:
    def careful(file: File) -> Any:
        try:
            return action(file)
        except Exception as error:  # pyarrow and each file system have errors of their own
            return " ".join(str(error).split())[:300] or type(error).__name__

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(careful, files))


def _parquet_columns(files: Sequence[File], retries: int) -> list[dict[str, DataType] | str]:
    """Columns and types of each file, or why it cannot be read."""

    def columns(file: File) -> dict[str, DataType]:
        with opened(file.url, retries, mode="rb", compression=None) as data:
            return {field.name: DataType.from_arrow_type(field.type) for field in pq.read_schema(data)}

    return _in_threads(columns, files)


def _csv_columns(files: Sequence[File], retries: int) -> list[dict[str, DataType] | str]:
    return _in_threads(lambda file: dict.fromkeys(header_of(file, retries), TEXT), files)


def _json_columns(files: Sequence[File], retries: int) -> list[dict[str, DataType] | str]:
    """All files have the keys found in any of those looked at: a row lacks a key as easily as a file."""
    found = _in_threads(lambda file: keys_of(file, retries), files[:PEEKED])
    keys = dict.fromkeys((key for keys in found if isinstance(keys, list) for key in keys), TEXT)
    return [known if isinstance(known, str) else keys for known in found] + [keys for _ in files[PEEKED:]]


def _frame(files: Sequence[File], columns: Columns, source: Source, retries: int) -> DataFrame:
    """The used columns of files that are alike, with the notes."""
    if extension(files[0]) in PARQUET:
        return parquet(files, source)
    used = [*columns.names.values(), *columns.texts]
    if extension(files[0]) in SEPARATED:
        reader: Separated | JsonLines = Separated(source.name, retries)
        lists: set[str] = set()
    else:
        reader = JsonLines(source.name, retries)
        lists = {columns.names[part] for part in ("tags", "alternatives") if part in columns.names}
    types = {name: LISTS if name in lists else pa.string() for name in used}
    return Rows(files, reader, schema_of(types)).read()


def parquet(files: Sequence[File], source: Source) -> DataFrame:
    """Parquet files with the notes of `rows`."""
    nothing = lit(None).cast(TEXT)
    notes = {PLACE: nothing, REASON: nothing, DETAIL: nothing}
    if not all(_is_native(file.url) for file in files):
        with opened(files[0].url, mode="rb", compression=None) as data:
            columns = pq.read_schema(data).remove_metadata()
        return Rows(files, parquet_batches, schema_of(dict(zip(columns.names, columns.types, strict=True)))).read()
    frame = daft.read_parquet([file.url for file in files], file_path_column=FOLDER)
    folder = regexp_replace(col(FOLDER), r"[^/]*$", "")
    below = substr(folder, len(source.root)) if source.root else lit("")
    return frame.with_columns({FOLDER: folder, BELOW: below, **notes})


def _is_native(url: str) -> bool:
    """Whether Daft itself reads it: it knows the protocol, and takes no part of the name for a pattern."""
    known = not is_remote(url) or url.partition("://")[0] in NATIVE
    return known and not any(sign in url for sign in "*?[{")


def parquet_batches(file: File, columns: pa.Schema) -> Iterator[pa.Table]:
    """Reader of a Parquet file through fsspec."""
    with opened(file.url, mode="rb", compression=None) as data:
        for batch in pq.ParquetFile(data).iter_batches():
            table = pa.Table.from_batches([batch])
            notes = {**dict.fromkeys(NOTES), FOLDER: file.folder, BELOW: file.below}
            for name, text in notes.items():
                table = table.append_column(name, pa.repeat(pa.scalar(text, pa.string()), len(table)))
            yield table.cast(columns)


def _unread(files: list[tuple[File, str]]) -> DataFrame:
    """A row for each file that cannot be read."""
    texts = {
        PLACE: [file.url for file, _ in files],
        REASON: [UNREADABLE] * len(files),
        DETAIL: [why for _, why in files],
        FOLDER: [file.folder for file, _ in files],
        BELOW: [file.below for file, _ in files],
    }
    return daft.from_arrow(pa.table(texts, schema=schema_of({})))
