"""Pairs of alike things among very many, and the groups that pairs connect; the work grows with their number, not
with its square.

Perceptual hashes. Cut 64 bits into near_bits + 2 blocks: two hashes that differ in at most near_bits bits agree in two
whole blocks at least (the pigeonhole principle; Manku et al., "Detecting near-duplicates for web crawling", 2007). So
only hashes that agree in a pair of blocks, 25 bits or more, are compared: with 10 million random ones each meets two
others. Nothing within near_bits is missed. Where a great many agree in the same two blocks, as the hashes of blank or
symmetrical pictures do, their other bits are cut into blocks in turn, so that they are not all compared either.

The groups are found by alternating large and small stars (Kiveris et al., "Connected components in MapReduce and
beyond", 2014): joins and sums only, rounds as the logarithm of the longest chain.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from itertools import combinations, count
from typing import Any

import daft
import numpy as np
import pyarrow as pa
from daft import DataFrame, DataType, Expression, Series, col, lit
from daft.functions import (
    bitwise_and,
    columns_max,
    columns_min,
    length,
    lower,
    minhash,
    regexp_count,
    regexp_replace,
    replace,
    shift_right,
    strip,
    to_struct,
    when,
)
from daft.functions import hash as hashed
from daft.functions import slice as part_of

from xray.curate.step import Context

BITS = 64
BUCKETS = 8192  # lists of hashes that agree in some bits of one block
RUN = 512  # more hashes than this with two blocks in common are not compared one by one
FEW_BITS = 13  # that are left to tell hashes apart: RUN x RUN times a few comparisons at most
SHINGLE = 3  # words
HASHES = 40  # of a text's signature; at 10 million texts each costs a third of a second, each band three
RECALL = 0.99
TEXT_REACH = 8
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
PAIR = DataType.struct({"a": DataType.uint64(), "b": DataType.uint64()})


def near_pairs(hashes: DataFrame, near_bits: int) -> DataFrame:
    """Pairs of hashes that differ in 1 to `near_bits` bits, each pair once.

    Args:
        hashes: column `phash`, uint64, distinct and not null.
        near_bits: at least 1.

    Returns:
        Columns `a` < `b`.
    """
    found: list[DataFrame] = []
    for first, mask in enumerate(_blocks(list(range(BITS)), near_bits)[:-1]):
        low = int(mask).bit_length() - int(mask).bit_count()
        bucket = bitwise_and(shift_right(col("phash"), _uint64(low)), _uint64(BUCKETS - 1))
        bucket = bitwise_and(bucket, _uint64(int(mask) >> low))
        lists = hashes.groupby(bucket.alias("bucket")).agg(col("phash").list_agg().alias("hashes"))
        found.append(exploded(lists, _pairs_of_lists(col("hashes"), first, near_bits)))
    return functools.reduce(DataFrame.concat, found)


def exploded(frame: DataFrame, pairs: Expression) -> DataFrame:
    """Columns `a` and `b` of lists of pairs."""
    found = frame.select(pairs.alias("pair")).explode("pair").where(col("pair").not_null())
    return found.select(col("pair")["a"].alias("a"), col("pair")["b"].alias("b"))


@daft.func.batch(return_dtype=DataType.list(PAIR), batch_size=64)
def _pairs_of_lists(hashes: Series, first: int, near_bits: int) -> pa.Array:
    """Of lists of hashes that agree in bits of block `first`, the near pairs, all in the last list's row."""
    values = hashes.to_arrow().flatten().to_numpy(zero_copy_only=False)
    return _in_last_row(len(hashes), *near_within(values, near_bits, first=first))


def near_within(
    values: np.ndarray, near_bits: int, *, free: list[int] | None = None, first: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of hashes that differ in 1 to `near_bits` bits, each once.

    Args:
        values: uint64, distinct.
        near_bits: at least 1.
        free: the bits in which they may differ; all by default.
        first: only pairs whose first common block this is.
    """
    free = list(range(BITS)) if free is None else free
    blocks = _blocks(free, near_bits)
    found = [(values[:0], values[:0])]
    for one, two in combinations(range(len(blocks)), 2):
        if first not in (None, one):
            continue
        shared = blocks[one] | blocks[two]
        ordered = values[np.argsort(values & shared)]
        left = [bit for bit in free if not int(shared) >> bit & 1]
        crowds = _crowds(ordered & shared) if len(left) > FEW_BITS else []
        pairs = [near_within(ordered[crowd], near_bits, free=left) for crowd in crowds]
        for crowd in reversed(crowds):
            ordered = np.delete(ordered, crowd)
        for position, distance in _equal(ordered & shared):
            a, b = ordered[position], ordered[position + distance]
            near = np.bitwise_count(a ^ b) <= near_bits
            pairs.append((a[near], b[near]))
        for a, b in pairs:
            earlier = np.zeros(len(a), bool)  # a pair is found wherever two blocks agree; its first such place counts
            for other in set(range(two)) - {one}:
                earlier |= (a ^ b) & blocks[other] == 0
            found.append((a[~earlier], b[~earlier]))
    return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])


def nearest(hashes: Expression, known: np.ndarray, near_bits: int) -> Expression:
    """The hash with the fewest other bits of a set that every worker can hold, the smallest of several.

    Args:
        hashes: uint64.
        known: the set, uint64.
        near_bits: hashes further away are none; then, and where there is no hash, the result is null.
    """
    finder: Any = _Nearest(known, near_bits)
    found: Expression = finder.of(hashes)
    return found


@daft.cls
class _Nearest:
    def __init__(self, known: np.ndarray, near_bits: int) -> None:
        self.near_bits = near_bits
        pairs = combinations(_blocks(list(range(BITS)), near_bits), 2)
        self.tables = [(one | two, known[np.argsort(known & (one | two))]) for one, two in pairs]

    @daft.method.batch(return_dtype=DataType.uint64())
    def of(self, hashes: Series) -> pa.Array:
        values = hashes.to_arrow()
        wanted = values.fill_null(0).to_numpy()
        best, distance = np.zeros(len(wanted), np.uint64), np.full(len(wanted), self.near_bits + 1)
        for shared, known in self.tables:
            first = np.searchsorted(known & shared, wanted & shared, "left")
            last = np.searchsorted(known & shared, wanted & shared, "right")
            row = np.flatnonzero(first < last)
            while len(row):
                found = known[first[row]]
                bits = np.bitwise_count(found ^ wanted[row])
                better = (bits < distance[row]) | ((bits == distance[row]) & (found < best[row]))
                better &= bits <= self.near_bits
                best[row[better]], distance[row[better]] = found[better], bits[better]
                first[row] += 1
                row = row[first[row] < last[row]]
        return pa.array(best, mask=(distance > self.near_bits) | ~values.is_valid().to_numpy(zero_copy_only=False))


def _blocks(bits: list[int], near_bits: int) -> list[np.uint64]:
    """Masks of near_bits + 2 blocks of bits, as equal as can be."""
    return [np.uint64(sum(1 << int(bit) for bit in block)) for block in np.array_split(bits, near_bits + 2)]


def _crowds(key: np.ndarray) -> list[slice]:
    """Runs of more than RUN equal values of a sorted array."""
    bounds = np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1, [len(key)]])
    return [slice(bounds[at], bounds[at + 1]) for at in np.flatnonzero(np.diff(bounds) > RUN)]


def _equal(key: np.ndarray, reach: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
    """Positions and a distance at which a sorted array holds the same value again; for all distances up to `reach`."""
    position = np.arange(len(key))
    for distance in range(1, len(key) if reach is None else reach + 1):
        position = position[position + distance < len(key)]
        position = position[key[position] == key[position + distance]]
        if not len(position):
            return
        yield position, distance


def _in_last_row(rows: int, a: np.ndarray, b: np.ndarray) -> pa.Array:
    """Pairs as lists, for as many rows; all but the last are empty."""
    offsets = np.zeros(rows + 1, np.int64)
    offsets[-1] = len(a)
    pairs = pa.StructArray.from_arrays([pa.array(np.minimum(a, b)), pa.array(np.maximum(a, b))], names=["a", "b"])
    return pa.LargeListArray.from_arrays(offsets, pairs)


def _uint64(value: int) -> Expression:
    return lit(value).cast(DataType.uint64())


def words_of(caption: Expression) -> Expression:
    """A caption's words, in lower case with one space between them and no punctuation.

    Each character of a script that puts no spaces between words counts as a word.
    """
    words = regexp_replace(lower(caption), r"[^\p{L}\p{M}\p{N}]+", " ")
    apart = regexp_replace(words, f"({UNSPACED})", " $1 ")
    return strip(regexp_replace(apart, r"  +", " "))


def num_words(words: Expression) -> Expression:
    """The number of words of what `words_of` gave; two characters of a script without spaces count as one."""
    tokens = length(words) - length(replace(words, " ", "")) + lit(1)
    count = tokens.cast(DataType.float64()) - regexp_count(words, UNSPACED).cast(DataType.float64()) / lit(2.0)
    return when(words == "", lit(0.0)).otherwise(count)


def bands_for(similarity: float) -> tuple[int, int]:
    """Bands and hashes a band, HASHES in all at most, by which RECALL of the pairs that are just alike enough meet."""
    for rows in range(HASHES, 0, -1):
        found = similarity**rows
        bands = 1 if found == 1 else math.ceil(math.log(1 - RECALL) / math.log1p(-found))
        if rows * bands <= HASHES:
            return bands, rows
    return HASHES, 1


def with_bands(texts: DataFrame, similarity: float) -> DataFrame:
    """The texts with columns `band_0`, `band_1` ...: texts alike have one in common (Broder, 1997)."""
    bands, rows = bands_for(similarity)
    signed = texts.with_column("signature", minhash(col("words"), num_hashes=bands * rows, ngram_size=SHINGLE))
    cut = {f"band_{band}": hashed(part_of(col("signature"), band * rows, (band + 1) * rows)) for band in range(bands)}
    return signed.with_columns(cut).exclude("signature")


def text_pairs(texts: DataFrame, similarity: float, context: Context) -> DataFrame:
    """Pairs of texts whose word triples are alike.

    Of pairs of exactly this similarity, 99 % are found, of more alike ones more: a pair of similarity s meets in one of
    b bands of r hashes with the probability 1 - (1 - s^r)^b; for 0.8 that is 9 bands of 4. A band that more than
    TEXT_REACH texts have in common ties each to its next TEXT_REACH only, in the order of their hashes.

    Args:
        texts: columns `text`, uint64, a hash of `words`, which is of SHINGLE words at least; may hold a text twice.
        similarity: Jaccard similarity, more than 0.
        context: of the running step.

    Returns:
        Columns `a` < `b`, hashes.
    """
    texts = context.keep(with_bands(texts, similarity), "bands")
    bucket = bitwise_and(col("band"), _uint64(BUCKETS - 1)).alias("bucket")
    met: list[DataFrame] = []
    for name in _bands(texts):
        banded = texts.select("text", col(name).alias("band"))
        lists = banded.groupby(bucket).agg(to_struct(col("band"), col("text")).list_agg().alias("texts"))
        met.append(exploded(lists, _texts_that_meet(col("texts"))))
    pairs = context.keep(functools.reduce(DataFrame.concat, met).distinct(), "met")
    needed = pairs.select(col("a").alias("text")).concat(pairs.select(col("b").alias("text"))).distinct()
    words = texts.select("text", "words").join(needed, on="text", how="semi").groupby("text").agg(col("words").min())
    words = context.keep(words, "words")
    for side in ("a", "b"):
        pairs = pairs.join(words.select(col("text").alias(side), col("words").alias(f"words_{side}")), on=side)
    return pairs.where(jaccard(col("words_a"), col("words_b")) >= lit(similarity)).select("a", "b")


def matching_texts(texts: DataFrame, others: DataFrame, similarity: float, context: Context) -> DataFrame:
    """Pairs of a text and one of few others whose word triples are alike, found as by `text_pairs`.

    Args:
        texts: columns `text` and `words`, see `text_pairs`.
        others: likewise; no text twice.
        similarity: Jaccard similarity, more than 0.
        context: of the running step.

    Returns:
        Columns `a`, a text, and `b`, another, as hashes.
    """
    texts = context.keep(with_bands(texts, similarity), "bands")
    others = context.keep(with_bands(others, similarity), "other-bands")
    met: list[DataFrame] = []
    for name in _bands(texts):
        other = others.select(name, col("text").alias("b"), col("words").alias("words_b"))
        both = texts.select(name, col("text").alias("a"), col("words").alias("words_a")).join(other, on=name)
        met.append(both.where(jaccard(col("words_a"), col("words_b")) >= lit(similarity)).select("a", "b"))
    return context.keep(functools.reduce(DataFrame.concat, met).distinct(), "met")


def _bands(texts: DataFrame) -> list[str]:
    return [name for name in texts.column_names if name.startswith("band_")]


@daft.func.batch(return_dtype=DataType.list(PAIR), batch_size=64)
def _texts_that_meet(texts: Series) -> pa.Array:
    """Of lists of band and text, the pairs with a band in common, all in the last list's row."""
    members = texts.to_arrow().flatten()
    band, text = (field.to_numpy(zero_copy_only=False) for field in members.flatten())
    order = np.argsort(band)
    band, text = band[order], text[order]
    shared = np.zeros(len(band), bool)
    shared[1:] = band[1:] == band[:-1]
    shared[:-1] |= shared[1:]
    several = np.unique(np.stack([band[shared], text[shared]], axis=1), axis=0)  # sorted by band, then by text
    found = [(band[:0], band[:0])]
    for position, distance in _equal(several[:, 0], TEXT_REACH):
        found.append((several[position, 1], several[position + distance, 1]))
    return _in_last_row(len(texts), np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found]))


@daft.func.batch(return_dtype=DataType.float64())
def jaccard(a: Series, b: Series) -> pa.Array:
    """Jaccard similarity of the word triples of two texts."""
    both = zip(a.to_pylist(), b.to_pylist(), strict=True)
    return pa.array([_jaccard(_triples(one), _triples(two)) for one, two in both], pa.float64())


def _triples(words: str) -> set[tuple[str, ...]]:
    split = words.split(" ")
    return set(zip(*(split[start:] for start in range(SHINGLE)), strict=False))


def _jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / max(1, len(a | b))


def components(pairs: DataFrame, context: Context, name: str) -> DataFrame:
    """The groups that pairs connect.

    Args:
        pairs: columns `a` and `b`, uint64, never equal.
        context: of the running step.
        name: of what is kept meanwhile.

    Returns:
        Columns `node` and `group`, the smallest node that it is connected to; smallest ones themselves are not in it.
    """
    edges = context.keep(_downwards(pairs.select("a", "b")), f"{name}-0")
    for round in count(1):
        if _are_stars(edges):
            return edges.select(col("a").alias("node"), col("b").alias("group"))
        edges = context.keep(_small_stars(_large_stars(edges)), f"{name}-{round}")
    raise AssertionError("unreachable")


def _downwards(edges: DataFrame) -> DataFrame:
    """Each edge once, from the larger node to the smaller."""
    edges = edges.select(columns_max("a", "b").alias("a"), columns_min("a", "b").alias("b"))
    return edges.where(col("a") != col("b")).distinct()


def _large_stars(edges: DataFrame) -> DataFrame:
    """Tie every node's larger neighbours to the smallest of its neighbours and itself."""
    both = edges.concat(edges.select(col("b").alias("a"), col("a").alias("b")))
    lowest = both.groupby("a").agg(col("b").min().alias("lowest"))
    lowest = lowest.select("a", columns_min("a", "lowest").alias("lowest"))
    tied = both.join(lowest, on="a").where(col("b") > col("a"))
    return _downwards(tied.select(col("b").alias("a"), col("lowest").alias("b")))


def _small_stars(edges: DataFrame) -> DataFrame:
    """Tie every node and its smaller neighbours to the smallest of them."""
    lowest = edges.groupby("a").agg(col("b").min().alias("lowest"))
    tied = edges.join(lowest, on="a")
    neighbours = tied.select(col("b").alias("a"), col("lowest").alias("b"))
    return _downwards(neighbours.concat(lowest.select("a", col("lowest").alias("b"))))


def _are_stars(edges: DataFrame) -> bool:
    """Whether every node has one smaller neighbour at most, which has none."""
    if edges.count_rows() != edges.select("a").distinct().count_rows():
        return False
    centres = edges.select(col("b").alias("a")).distinct()
    return edges.join(centres, on="a", how="semi").count_rows() == 0
