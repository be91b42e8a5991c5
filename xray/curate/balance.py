"""Balancing: captions by MetaCLIP's rule, tags by inverse-square-root resampling.

Captions (arXiv 2309.16671): an entry of the metadata that is in `count` captions passes a pair with probability
p = t / max(count, t); a pair stays if any of its entries passes it, thus with probability 1 - prod(1 - p). Entries no
more frequent than t lose nothing. An entry that is alone in its captions ends at t pairs. One that stands beside others
ends above, since they keep its pairs too: of entries by Zipf's law, eight to a caption, the most frequent keeps three
quarters of its pairs when t is found by a tail of 6%, four to a caption half.

Tags (Mahajan et al. 2018, SWAG): a sample is repeated max(1, sqrt(t / f)) times, f being the share of the samples that
carry its rarest tag.

Every draw is a function of the sample's key, the entry and the seed alone, so that any worker reaches the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from daft import DataFrame, DataType, Expression, Series, col, lit
from daft.functions import when

from xray.curate.frame import BALANCED, TEXT
from xray.curate.matching import ENTRIES, entry_counts, summary
from xray.curate.step import Context, Step

UNMATCHED = "no entry of the metadata is in the caption"
FREQUENT = "its entries are frequent enough without it"
CAPTIONS, TAGS = "captions", "tags"
PASSING, RARE = "entries.parquet", "rare-tags.parquet"
LEAST_THRESHOLD = 20
"""Of a t that is found by the tail. MetaCLIP's tail of 6% is meant for hundreds of millions of pairs: of openclipart's
6,899 it is the entries that come twice, and t = 2 would leave 48% of the pairs; this leaves 70%."""
NAMED = 3  # entries in a detail, the rarest
REASONS = (None, UNMATCHED, FREQUENT)
DRAWN_COLUMNS = {**BALANCED, "reason": TEXT, "detail": TEXT}
DRAWN = DataType.struct(DRAWN_COLUMNS)


def balance(frame: DataFrame | None, context: Context) -> DataFrame:
    """Draw how many copies of each sample stay: adds `probability`, their expected number, and `copies`.

    `settings.balance` says which samples: "captions" those with a caption, "tags" those with tags, "both" pairs of
    image and caption by the caption and clips with tags by their tags. All others stay as they are, and so do captions
    if the metadata has no entries. A later stage that wants the samples as they were weighs each by 1 / probability.

    Facts, for `captions` and `tags`: `samples`, the `threshold` and what it means, the expected and the drawn number of
    copies; for captions also `before` and `after`, see `matching.summary`.
    """
    assert frame is not None
    entries = pq.read_table(context.earlier["match"] / ENTRIES, columns=["entry"])
    frame = frame.with_column("rule", _rule(context.settings.balance, matched=entries.num_rows > 0))
    by_caption, by_tag = frame.where(col("rule") == lit(CAPTIONS)), frame.where(col("rule") == lit(TAGS))
    context.facts[CAPTIONS] = _plan_captions(by_caption, entries, context)
    context.facts[TAGS] = _plan_tags(by_tag, context)
    draw = cast(Any, Draw(str(context.folder), context.settings.seed))
    copies = draw(col("key"), col("entries"), col("tags"), col("rule"))
    drawn = context.keep(frame.select(*frame.column_names, copies), "drawn")
    for rule in (CAPTIONS, TAGS):
        totals = drawn.where(col("rule") == lit(rule)).agg(col("probability").sum(), col("copies").sum()).to_pydict()
        context.facts[rule].update(expected=totals["probability"][0] or 0.0, copies=totals["copies"][0] or 0)
    left = drawn.where((col("rule") == lit(CAPTIONS)) & (col("copies") > lit(0)))
    context.facts[CAPTIONS]["after"] = summary(entry_counts(left, entries.num_rows))
    return drawn.exclude("rule")


STEP = Step("balance", balance, reads=("seed", "balance", "threshold", "tail_share", "tag_threshold", "max_copies"))


def _rule(balance: str, matched: bool) -> Expression:
    """By what a sample is balanced: CAPTIONS, TAGS or null."""
    captioned = (col("caption") != lit("")) & lit(matched)
    tagged, clip = col("tags").list_count("all") > lit(0), col("media") == lit("clip")
    chosen = {
        "captions": ((captioned, CAPTIONS),),
        "tags": ((tagged, TAGS),),
        "both": ((captioned & ~clip, CAPTIONS), (tagged & clip, TAGS)),
        "none": (),
    }[balance]
    rule = lit(None).cast(TEXT)
    for condition, name in chosen:
        rule = when(condition, lit(name)).otherwise(rule)
    return rule


def _plan_captions(frame: DataFrame, entries: pa.Table, context: Context) -> dict[str, Any]:
    """Write what `Draw` has to know of each entry: entry, key, count, passing."""
    counts = entry_counts(frame, entries.num_rows)
    settings = context.settings
    threshold = settings.threshold or max(LEAST_THRESHOLD, threshold_of(counts, settings.tail_share))
    entries = entries.append_column("key", hashed(entries["entry"]))
    entries = entries.append_column("count", pa.array(counts))
    entries = entries.append_column("passing", pa.array(threshold / np.maximum(counts, threshold)))
    pq.write_table(entries, context.folder / PASSING)
    return {
        "samples": frame.count_rows(),
        "threshold": threshold,
        "tail_share": float(counts[counts < threshold].sum() / max(1, counts.sum())),
        "head_entries": int((counts > threshold).sum()),
        "before": summary(counts),
    }


def _plan_tags(frame: DataFrame, context: Context) -> dict[str, Any]:
    """Write the tags that are replicated, the rarest first: tag, count, copies (expected)."""
    samples = frame.count_rows()
    tags = frame.select(col("tags").list_distinct().alias("tag")).explode("tag").where(col("tag").not_null())
    counts = context.keep(tags.groupby("tag").agg(col("tag").count().alias("count")), "tag_counts")
    numbers = counts.groupby("count").agg(col("tag").count().alias("tags")).sort("count").to_pydict()
    threshold = context.settings.tag_threshold or _median(numbers["count"], numbers["tags"]) / max(1, samples)
    rare = counts.where(col("count") < lit(threshold * samples)).sort(["count", "tag"]).to_arrow()
    copies = np.sqrt(threshold * samples / rare["count"].to_numpy())
    copies = np.minimum(copies, context.settings.max_copies)
    pq.write_table(rare.append_column("copies", pa.array(copies)), context.folder / RARE)
    return {
        "samples": samples,
        "threshold": threshold,
        "tags": sum(numbers["tags"]),
        "rare_tags": rare.num_rows,
    }


def _median(values: Sequence[int], times: Sequence[int]) -> int:
    """The lower median of ascending values that come so many times each; 0 of none."""
    if not values:
        return 0
    return values[int(np.searchsorted(np.cumsum(times), (sum(times) + 1) // 2))]


def threshold_of(counts: np.ndarray, tail_share: float) -> int:
    """MetaCLIP's t: the least count up to which entries hold `tail_share` of all matches; rarer ones hold less."""
    counts = np.sort(counts[counts > 0])
    if not len(counts):
        return 1
    reached = np.cumsum(counts) >= tail_share * counts.sum()
    return int(counts[np.argmax(reached)])


def uniform(keys: np.ndarray, salts: np.ndarray | int, seed: int) -> np.ndarray:
    """Numbers in [0, 1), each a function of a key, a salt and the seed, and independent of those of any others.

    Args:
        keys, salts: uint64, of one shape.
        seed: any integer.
    """
    mixed = _mix(np.asarray(salts, np.uint64) ^ _mix(np.asarray(seed % 2**64, np.uint64)))
    return (_mix(keys ^ mixed) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's increment and finaliser (Steele et al. 2014): any bit of `x` turns each of the result's by half."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(texts: pa.ChunkedArray) -> pa.Array:
    """uint64 hashes of texts: an entry's draws do not depend on its place in the metadata."""
    return Series.from_arrow(texts.combine_chunks()).hash().to_arrow()


@daft.cls
class Draw:
    """Draws the copies of samples.

    Args:
        folder: of the plan's two files.
        seed: of all draws.
    """

    def __init__(self, folder: str, seed: int) -> None:
        entries, rare = pq.read_table(Path(folder) / PASSING), pq.read_table(Path(folder) / RARE)
        self.seed = seed
        self.keys, self.counts, self.passing = (entries[name].to_numpy() for name in ("key", "count", "passing"))
        self.labels = _joined(entries["entry"].combine_chunks(), " (", entries["count"].combine_chunks(), ")")
        self.tags, self.tag_counts = rare["tag"].combine_chunks(), rare["count"].combine_chunks()
        self.tag_copies = rare["copies"].to_numpy()

    @daft.method.batch(return_dtype=DRAWN, unnest=True)
    def __call__(self, key: Series, entries: Series, tags: Series, rule: Series) -> pa.Array:
        """The expected and the drawn copies of each sample, why it leaves, and what made it leave or be repeated."""
        keys, rules = key.to_arrow().to_numpy(), rule.to_arrow()
        by_caption, by_tag, rest = (
            np.flatnonzero(mask.fill_null(False).to_numpy(zero_copy_only=False))
            for mask in (pc.equal(rules, CAPTIONS), pc.equal(rules, TAGS), pc.is_null(rules))
        )
        parts = (
            self._by_captions(keys[by_caption], entries.to_arrow().take(by_caption)),
            self._by_tags(keys[by_tag], tags.to_arrow().take(by_tag)),
            _drawn(np.ones(len(rest)), np.ones(len(rest))),
        )
        return pa.concat_arrays(parts).take(np.argsort(np.concatenate([by_caption, by_tag, rest])))

    def _by_captions(self, keys: np.ndarray, lists: pa.Array) -> pa.StructArray:
        lengths, owners, values = _unlisted(lists)
        found = values.to_numpy()
        passing = self.passing[found]
        passes = uniform(keys[owners], self.keys[found], self.seed) < passing
        probability = 1 - _by_row(np.multiply, 1 - passing, lengths, 1.0)
        stays = _by_row(np.logical_or, passes, lengths, False)
        reasons = np.where(stays, 0, np.where(lengths > 0, REASONS.index(FREQUENT), REASONS.index(UNMATCHED)))
        named = (~stays)[owners]
        return _drawn(probability, stays, reasons, self._rarest(owners[named], found[named], len(keys)))

    def _rarest(self, owners: np.ndarray, entries: np.ndarray, rows: int) -> pa.Array:
        """The rarest entries of each row with their counts, as text; null for a row without any."""
        order = np.lexsort((entries, self.counts[entries], owners))
        owners, entries = owners[order], entries[order]
        lengths = np.bincount(owners, minlength=rows)
        rank = np.arange(len(owners)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        shown = np.minimum(lengths, NAMED)
        offsets = np.concatenate([[0], np.cumsum(shown)]).astype(np.int32)
        lists = pa.ListArray.from_arrays(offsets, self.labels.take(pa.array(entries[rank < NAMED])))
        return pc.if_else(pa.array(lengths > 0), pc.binary_join(lists, ", "), None)

    def _by_tags(self, keys: np.ndarray, lists: pa.Array) -> pa.StructArray:
        lengths, _, values = _unlisted(lists)
        common = len(self.tags)
        ranks = pc.index_in(values, self.tags).fill_null(common).to_numpy()
        rarest = _by_row(np.minimum, ranks, lengths, common)
        expected = np.append(self.tag_copies, 1.0)[rarest]
        whole = np.floor(expected)
        copies = whole + (uniform(keys, 0, self.seed) < expected - whole)
        tag = pa.array(rarest, mask=rarest == common)
        because = _joined(
            pa.array(copies.astype(np.int32)),
            " copies: tag '",
            self.tags.take(tag),
            "' is on ",
            self.tag_counts.take(tag),
            " samples",
        )
        return _drawn(expected, copies, detail=pc.if_else(pa.array(copies > 1), because, None))


def _drawn(probability: np.ndarray, copies: np.ndarray, reasons: Any = None, detail: Any = None) -> pa.StructArray:
    """Rows of what `Draw` returns; `reasons` are numbers in REASONS."""
    rows = len(copies)
    return pa.StructArray.from_arrays(
        [
            pa.array(probability, pa.float64()),
            pa.array(copies.astype(np.int32)),
            pa.nulls(rows, pa.string()) if reasons is None else pa.array(REASONS, pa.string()).take(pa.array(reasons)),
            pa.nulls(rows, pa.string()) if detail is None else detail.cast(pa.string()),
        ],
        list(DRAWN_COLUMNS),
    )


def _unlisted(lists: pa.Array) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Of a column of lists: the length of each, the row of each value, the values."""
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)
    return lengths, np.repeat(np.arange(len(lengths)), lengths), pc.list_flatten(lists)


def _by_row(reduce: np.ufunc, values: np.ndarray, lengths: np.ndarray, empty: Any) -> np.ndarray:
    """`values` reduced over each row, of which each has so many; `empty` for a row without any."""
    reduced = np.full(len(lengths), empty)
    some = lengths > 0
    if some.any():
        reduced[some] = reduce.reduceat(values, (np.cumsum(lengths) - lengths)[some])
    return reduced


def _joined(*parts: Any) -> pa.Array:
    """Texts and numbers put together; null where any is."""
    texts = [part if isinstance(part, str) else part.cast(pa.string()) for part in parts]
    return pc.binary_join_element_wise(*texts, "")
