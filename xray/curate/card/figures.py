"""The numbers of the data card: each is a query whose answer does not grow with the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from daft import DataFrame, col, lit
from daft.functions import length, when

LONGEST = 4096  # characters; longer captions count as this long
EDGES = (0, 1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, LONGEST)


@dataclass(frozen=True)
class Spectrum:
    """How often the items of a column occur: (times, number of items that occur so often), most often first."""

    counts: Sequence[tuple[int, int]]

    @property
    def items(self) -> int:
        """Distinct items."""
        return sum(items for _, items in self.counts)

    @property
    def total(self) -> int:
        """Occurrences of all items."""
        return sum(times * items for times, items in self.counts)

    @property
    def entropy(self) -> float:
        """Of the occurrences, in bits: log2 of the number of items if all were equally frequent."""
        if not self.total:
            return 0.0
        return math.log2(self.total) - sum(n * c * math.log2(c) for c, n in self.counts) / self.total

    def above(self, times: float) -> int:
        """Occurrences of the items that occur more often than `times`."""
        return sum(c * n for c, n in self.counts if c > times)

    def head(self, share: float) -> float:
        """Share of the occurrences that the most frequent `share` of the items hold."""
        left = head = max(1, round(share * self.items)) if self.items else 0
        held = 0
        for times, items in self.counts:
            taken = min(left, items)
            held += taken * times
            left -= taken
        return held / self.total if head else 0.0

    def points(self) -> list[tuple[float, float]]:
        """(rank, times) where the curve of times by rank bends."""
        rank, points = 0, []
        for times, items in self.counts:
            points += [(rank + 1.0, float(times))] + ([(float(rank + items), float(times))] if items > 1 else [])
            rank += items
        return points


def spectrum(frame: DataFrame, column: str, *, copies: bool = False) -> Spectrum:
    """Of a column of lists.

    Args:
        frame: of samples.
        column: of lists; null and empty ones hold nothing.
        copies: count a sample as often as its `copies` say, if the frame has such a column.
    """
    counts = _counted(frame, column, copies).groupby("times").agg(col("item").count().alias("items")).to_pydict()
    pairs = zip(counts["times"], counts["items"], strict=True)
    return Spectrum(sorted(((int(times), int(items)) for times, items in pairs), reverse=True))


def most_frequent(frame: DataFrame, column: str, count: int) -> list[tuple[Any, int]]:
    """The items of a column of lists that occur most often, and how often."""
    found = _counted(frame, column, False).sort(["times", "item"], desc=[True, False]).limit(count).to_pydict()
    return list(zip(found["item"], found["times"], strict=True))


def occurrences(frame: DataFrame, column: str, items: Sequence[Any]) -> dict[Any, int]:
    """How often these items of a column of lists occur; those that do not occur are left out."""
    found = _counted(frame, column, False).where(col("item").is_in(list(items))).to_pydict() if items else {}
    return dict(zip(found["item"], found["times"], strict=True)) if found else {}


def _counted(frame: DataFrame, column: str, copies: bool) -> DataFrame:
    times = col("copies") if copies and "copies" in frame.column_names else lit(1)
    items = frame.select(col(column).alias("item"), times.cast("int64").alias("times")).explode("item")
    return items.where(col("item").not_null() & (col("times") > lit(0))).groupby("item").agg(col("times").sum())


def caption_lengths(frame: DataFrame) -> list[float]:
    """Share of the samples whose caption's number of characters is in each bin of `EDGES`."""
    characters = length(col("caption")).cast("int64")
    capped = when(characters > lit(LONGEST), lit(LONGEST)).otherwise(characters)
    counts = frame.select(capped.alias("length")).groupby("length").agg(col("length").count().alias("n")).to_pydict()
    bins = [0] * len(EDGES)
    for size, n in zip(counts["length"], counts["n"], strict=True):
        if size is not None:
            bins[sum(edge <= size for edge in EDGES) - 1] += n
    total = sum(bins)
    return [count / total if total else 0.0 for count in bins]


def numbers(frame: DataFrame, *by: str, most: int) -> list[dict[str, Any]]:
    """Samples, copies (as many as samples where nothing drew any) and identities for each value of some columns.

    Only the `most` values that the most samples have are there, these first.
    """
    copies = col("copies") if "copies" in frame.column_names else lit(1)
    known = when(col("identity") != lit(""), col("identity")).otherwise(lit(None).cast("string"))
    rows = frame.with_columns({"drawn": copies.cast("int64"), "known": known})
    counts = [col("id").count().alias("samples"), col("drawn").sum(), col("known").count_distinct().alias("identities")]
    grouped = rows.groupby(*by).agg(*counts)
    return list(grouped.sort(["samples", *by], desc=[True, *(False for _ in by)]).limit(most).to_pylist())
