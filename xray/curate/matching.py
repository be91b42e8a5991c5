"""Which entries of the metadata a caption holds (MetaCLIP's substring matching, arXiv 2309.16671)."""

from __future__ import annotations

from itertools import chain
from typing import Any, cast

import ahocorasick_rs
import daft
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from daft import DataFrame, Series, col, lit

from xray.curate import metadata
from xray.curate.frame import MATCHED, keeping
from xray.curate.settings import Settings
from xray.curate.step import Context, Step

ENTRIES = "entries.parquet"
"""In the step's folder: entry, kind, count (captions that hold it); an entry's number is its row."""
TOP = 50
HEAD = 100  # one entry in so many, the most frequent
ROWS_AT_ONCE = 8192  # of captions, since each match is a Python object for a while


def match(frame: DataFrame | None, context: Context) -> DataFrame:
    """Add `entries`, the numbers of the metadata's entries in each caption, ascending, each once.

    Facts: how the metadata was made, its number of entries, `captions` and how many of them hold none, and the matched
    `distribution`, see `summary`.

    Raises:
        DataError: the user's list cannot be read, is not UTF-8 or holds no entry.
    """
    assert frame is not None
    made = metadata.make(frame, context)
    path = context.folder / ENTRIES
    made.write(path)
    matcher = cast(Any, Matcher(str(path)))
    found = context.keep(frame.with_column("entries", matcher(col("caption"))), "matched")
    counts = entry_counts(found, len(made.entries))
    table = pq.read_table(path)
    pq.write_table(table.append_column("count", pa.array(counts)), path)
    captions = found.where(col("caption") != lit(""))
    context.facts.update(
        metadata=made.facts,
        entries=len(made.entries),
        captions=captions.count_rows(),
        without_entry=captions.where(col("entries").list_count("all") == lit(0)).count_rows(),
        distribution=summary(counts),
        top=[[made.entries[entry], int(counts[entry])] for entry in np.argsort(-counts, kind="stable")[:TOP]],
    )
    return keeping(found)


def _inputs(source: str, settings: Settings) -> Any:
    return metadata.inputs(settings)


STEP = Step("match", match, inputs=_inputs)


def entry_counts(frame: DataFrame, number: int) -> np.ndarray:
    """How many rows of `frame` hold each of the `number` entries."""
    every = frame.select("entries").explode("entries").where(col("entries").not_null())
    found = every.groupby("entries").agg(col("entries").count().alias("count")).to_arrow()
    counts = np.zeros(number, np.int64)
    counts[found["entries"].to_numpy()] = found["count"].to_numpy()
    return counts


def summary(counts: np.ndarray) -> dict[str, float]:
    """Of a distribution of matches over entries: `matches`, `matched` entries, `entropy` in bits, and `head_share`,
    the share of the matches that the most frequent hundredth of the matched entries holds.
    """
    counts = np.sort(counts[counts > 0])[::-1]
    total = counts.sum()
    if not total:
        return {"matches": 0, "matched": 0, "entropy": 0.0, "head_share": 0.0}
    shares = counts / total
    return {
        "matches": float(total),
        "matched": len(counts),
        "entropy": float(-(shares * np.log2(shares)).sum()),
        "head_share": float(shares[: max(1, len(counts) // HEAD)].sum()),
    }


@daft.cls
class Matcher:
    """Finds entries by an Aho-Corasick automaton, which each process builds once.

    All entries are found, those within others too: "red fox" yields "red", "fox" and "red fox".

    Args:
        path: Parquet file of the entries.
    """

    def __init__(self, path: str) -> None:
        entries = pq.read_table(path, columns=["entry"])["entry"].combine_chunks()
        self.automaton = ahocorasick_rs.BytesAhoCorasick(
            [text.encode() for text in metadata.spaced(entries).to_pylist()]
        )

    @daft.method.batch(return_dtype=MATCHED["entries"])
    def __call__(self, captions: Series) -> pa.Array:
        """The numbers of the entries in each caption, ascending, each once."""
        texts = captions.to_arrow()
        parts = [self._found(texts.slice(start, ROWS_AT_ONCE)) for start in range(0, len(texts), ROWS_AT_ONCE)]
        return pa.concat_arrays(parts) if parts else pa.array([], pa.list_(pa.int32()))

    def _found(self, texts: pa.Array) -> pa.ListArray:
        spaced = metadata.spaced(texts)
        offsets = np.frombuffer(spaced.buffers()[1], np.int64)[: len(texts) + 1]
        # all texts as one: between two of them are two spaces, which no entry has
        whole: Any = np.frombuffer(spaced.buffers()[2], np.uint8)
        matches = self.automaton.find_matches_as_indexes(whole, overlapping=True)
        flat = np.fromiter(chain.from_iterable(matches), np.int64, 3 * len(matches)).reshape(-1, 3)
        rows = np.searchsorted(offsets, flat[:, 1], side="right") - 1
        found = np.sort(rows << 32 | flat[:, 0])
        unique = found[np.diff(found, prepend=-1) > 0]  # np.unique takes ten times as long
        counts = np.bincount(unique >> 32, minlength=len(texts))
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return pa.ListArray.from_arrays(ends, (unique & (1 << 32) - 1).astype(np.int32))
