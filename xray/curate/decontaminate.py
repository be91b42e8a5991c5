"""What resembles a sample of an evaluation set goes, so that what is learnt of it is no memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import daft
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataFrame, DataType, Series, col, lit
from daft.exceptions import DaftCoreException
from daft.functions import coalesce
from daft.functions import hash as hashed

from xray.curate.frame import HASH, TEXT, drop, keeping
from xray.curate.neighbours import matching_texts, nearest, num_words, words_of
from xray.curate.settings import Settings
from xray.curate.step import Context, Step
from xray.data.clean import looks
from xray.data.decoding import decode
from xray.data.download import sha256_of
from xray.data.errors import DataError, DecodeError
from xray.data.folder import read_folder
from xray.data.shards import INDEX, decode_stored, read_index

REASON = "resembles an evaluation sample"
READERS: dict[str, Callable[[str], DataFrame]] = {
    ".parquet": daft.read_parquet,
    ".csv": daft.read_csv,
    ".jsonl": daft.read_json,
}
FILES = pa.schema(
    [
        ("id", pa.string()),
        ("caption", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),  # of its bytes in a shard; null: a file of its own
        ("size", pa.int64()),
        ("frames", pa.int32()),  # as the shard holds them
    ]
)


def decontaminate(frame: DataFrame | None, context: Context) -> DataFrame:
    """Drop samples whose picture looks like one of the evaluation sets' (`against`), or whose long caption is like one.

    An evaluation set is a dataset (its test split, or all of it if it has none), a folder of images and clips, or a
    table (Parquet, CSV, JSONL) with the columns `phash` or `caption` and perhaps `id`. Looks are compared by perceptual
    hash, whatever the colours, captions as `text_duplicates` does. The id of the evaluation sample is the detail.
    `facts["evaluation"]` tells of each set how many `samples`, `hashes` and `long_captions` it has.

    Raises:
        DataError: an evaluation set that is not there, cannot be read, or has neither pictures nor captions.
    """
    assert frame is not None
    given = _given(context.settings)
    if not given:
        return keeping(frame)
    known = functools.reduce(DataFrame.concat, [_evaluation_set(path, context.settings) for path in given])
    known = known.with_column("words", words_of(col("caption")))
    long = num_words(col("words")) >= lit(context.settings.text_words)
    known = context.keep(known.with_column("long", long), "evaluation")
    context.facts["evaluation"] = _told(known)
    told = keeping(frame)
    for found in (_by_picture(frame, known, context), _by_caption(frame, known, context)):
        told = told.join(found, on="id", how="left")
        told = drop(told, col("resembles").not_null(), REASON, col("resembles")).exclude("resembles")
    return told


def evaluation_files(source: str, settings: Settings) -> list[tuple[str, str]]:
    """The files of the evaluation sets, each with the digest of its content."""
    return [(path.as_posix(), sha256_of(path)) for given in _given(settings) for path in _files(given)]


COMPARED = ("near_bits", "text_similarity", "text_words")
DECODED = ("max_side", "max_frames", "max_pixels")
STEP = Step("decontaminate", decontaminate, (*COMPARED, *DECODED), evaluation_files)


def _by_picture(frame: DataFrame, known: DataFrame, context: Context) -> DataFrame:
    """Ids of samples and of what their picture `resembles`."""
    ids = known.where(col("phash").not_null()).groupby("phash").agg(col("id").min().alias("resembles"))
    ids = context.keep(ids.with_column_renamed("phash", "nearest"), "pictures")
    hashes = ids.select("nearest").to_arrow()["nearest"].to_numpy()
    looks = frame.select("id", "phash").where(col("phash").not_null())
    looks = looks.with_column("nearest", nearest(col("phash"), hashes, context.settings.near_bits)).where(
        col("nearest").not_null()
    )
    return context.keep(looks.join(ids, on="nearest").select("id", "resembles"), "by-picture")


def _by_caption(frame: DataFrame, known: DataFrame, context: Context) -> DataFrame:
    """Ids of samples and of what their caption `resembles`."""
    settings = context.settings
    text = hashed(col("words")).alias("text")
    others = known.where(col("long")).select("id", "words", text).groupby("text", "words").agg(col("id").min())
    own = frame.select("id", words_of(col("caption")).alias("words"))
    own = own.where(num_words(col("words")) >= lit(settings.text_words)).select("id", "words", text)
    if not settings.text_similarity or not others.limit(1).count_rows():
        return own.where(lit(False)).select("id", col("words").alias("resembles"))
    own = context.keep(own, "texts")
    pairs = matching_texts(
        own.select("text", "words"), others.select("text", "words"), settings.text_similarity, context
    )
    names = pairs.join(others.select(col("text").alias("b"), col("id").alias("name")), on="b")
    names = names.groupby("a").agg(col("name").min().alias("resembles"))
    return context.keep(own.join(names, left_on="text", right_on="a").select("id", "resembles"), "by-caption")


def _told(known: DataFrame) -> list[dict[str, Any]]:
    counts = [col("id").count().alias("samples"), col("phash").count().alias("hashes")]
    long = col("long").cast(DataType.int64()).sum().alias("long_captions")
    return known.groupby("set").agg(*counts, long).sort("set").to_pylist()


def _evaluation_set(path: Path, settings: Settings) -> DataFrame:
    """Columns `set`, `id`, `caption` and `phash`, which may be null."""
    if path.is_file():
        found = _table(path)
    else:
        next(_files(path), None)
        rows = _of_dataset(path) if (path / INDEX).is_file() else _of_folder(path)
        place = [col(name) for name in ("path", "offset", "size", "frames")]
        limits = [getattr(settings, name) for name in DECODED]
        files = daft.from_arrow(pa.Table.from_pylist(rows, FILES))
        found = files.with_column("phash", perceptual_hashes(*place, *limits))
    return found.select(
        lit(path.as_posix()).alias("set"), "id", coalesce(col("caption"), lit("")).alias("caption"), "phash"
    )


def _of_dataset(root: Path) -> list[dict[str, Any]]:
    table = read_index(root)
    test = table.filter(pc.equal(table["split"], "test"))
    chosen = (test if len(test) else table).select(["id", "caption", "shard", "offset", "size", "frames"])
    return [{**row, "path": str(root / row["shard"])} for row in chosen.to_pylist()]


def _of_folder(root: Path) -> list[dict[str, Any]]:
    records = read_folder(root).records
    return [{"id": record.id, "caption": record.caption, "path": str(record.path)} for record in records]


def _table(path: Path) -> DataFrame:
    if path.suffix not in READERS:
        raise DataError(f"against names {path}; a dataset, a folder or a table ({', '.join(READERS)}) is needed")
    try:
        table = READERS[path.suffix](str(path))
    except DaftCoreException as error:
        raise DataError(f"{path} cannot be read as a table ({error})") from error
    there = table.column_names
    if "phash" not in there and "caption" not in there:
        raise DataError(f"{path} has the columns {', '.join(there)}; phash or caption is needed")
    empty = lit(None)
    caption = (col("caption") if "caption" in there else empty).cast(TEXT)
    phash = (col("phash") if "phash" in there else empty).cast(HASH)
    id = (col("id") if "id" in there else coalesce(caption, phash.cast(TEXT))).cast(TEXT)
    return table.select(id.alias("id"), caption.alias("caption"), phash.alias("phash"))


@daft.func.batch(return_dtype=HASH, batch_size=64)
def perceptual_hashes(
    paths: Series, offsets: Series, sizes: Series, frames: Series, max_side: int, max_frames: int, max_pixels: int
) -> pa.Array:
    """Perceptual hashes of media files, or of samples at offsets in shards; null for what cannot be decoded."""
    rows = zip(paths.to_pylist(), offsets.to_pylist(), sizes.to_pylist(), frames.to_pylist(), strict=True)
    limits = {"max_side": max_side, "max_frames": max_frames, "max_pixels": max_pixels}
    return pa.array([_perceptual_hash(*row, limits) for row in rows], pa.uint64())


def _perceptual_hash(
    path: str, offset: int | None, size: int | None, frames: int | None, limits: Mapping[str, Any]
) -> int | None:
    try:
        with open(path, "rb") as file:
            file.seek(offset or 0)
            data = file.read(-1 if size is None else size)
        if frames is None:
            return looks(decode(data, trim=True, **limits).frames).shape
        return looks(decode_stored(data, frames)).shape
    except (OSError, DecodeError):
        return None


def _given(settings: Settings) -> list[Path]:
    return [Path(path.strip()) for path in settings.against.split(",") if path.strip()]


def _files(given: Path) -> Iterator[Path]:
    """The files of an evaluation set.

    Raises:
        DataError: it is not there.
    """
    if not given.exists():
        raise DataError(f"against names {given}, where nothing is; a dataset, a folder or a table is needed")
    yield from [given] if given.is_file() else sorted(path for path in given.rglob("*") if path.is_file())
