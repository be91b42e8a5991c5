"""The metadata that captions are matched against: a list of entries, as MetaCLIP makes one (arXiv 2309.16671).

It is built of WordNet's lemmas, of the corpus' own words and word pairs, and of its tags; or it is the user's list.
Function words are entries too, as in MetaCLIP: each is far above t, so that it keeps next to nothing on its own, and a
rule that knew them would have to know every language.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unicodedata import normalize

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from daft import DataFrame, DataType, Series, col, lit

from xray.curate.settings import Settings
from xray.curate.step import Context
from xray.curate.wordnet import Lexicon, digest_of
from xray.data.errors import DataError

FEWEST = 2
"""Samples that a word or tag must be on to become an entry ..."""
SHARE = 2e-6
"""... or this share of the captions if that is more. By Zipf's law a share, unlike a count, yields as many words of a
corpus of any size: some 250,000, MetaCLIP's number, at eight words a caption."""
FEWEST_PAIRS = 5
PAIR_BITS = 5.0
"""Pointwise mutual information of a word pair: together 32 times as often as by chance (MetaCLIP takes 30 times)."""

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # scripts that do not part words
ALONE = rf"([\p{{P}}\p{{S}}{UNSPACED}]\p{{M}}*)"
INVISIBLE = r"[\p{Cf}\x{FE0E}\x{FE0F}]"
WORD = rf"\p{{L}}.|.\p{{L}}|[{UNSPACED}]"  # letters, and more than one unless a character can be a word


def words(texts: pa.Array) -> pa.ListArray:
    """The words of each text: lower case, NFKD; each punctuation mark or symbol is a word of its own.

    So is each character of the scripts that put no spaces between words. An entry in such a script is thus found at
    any character, and one in any other script only between the boundaries of words.

    Returns:
        list of strings; an empty text has no word.
    """
    # pyarrow 25 does not compose: its "NFKC" is this too
    plain = pc.replace_substring_regex(pc.utf8_normalize(texts.cast(pa.large_string()), "NFKD"), INVISIBLE, "")
    parted = pc.replace_substring_regex(pc.utf8_lower(plain), ALONE, r" \1 ")
    split = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(parted))
    lengths = np.diff(split.offsets.to_numpy())
    empty = pc.equal(split.flatten(), "").to_numpy(zero_copy_only=False)  # all that an empty text splits into
    lengths[np.repeat(np.arange(len(lengths)), lengths)[empty]] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, split.flatten().filter(pc.invert(pa.array(empty))))


def spaced(texts: pa.Array) -> pa.Array:
    """The words of each text with one space before, between and after them, in which entries are looked for."""
    nothing = pa.scalar("", pa.large_string())
    space = pa.scalar(" ", pa.large_string())
    return pc.binary_join_element_wise(nothing, pc.binary_join(words(texts), space), nothing, space)


def normal(texts: Iterable[str]) -> list[str]:
    """Entries of texts: their words with single spaces between them, as people read them (NFC); "" of one without."""
    return [normalize("NFC", text.strip(" ")) for text in spaced(pa.array(texts, pa.large_string())).to_pylist()]


@dataclass(frozen=True)
class Metadata:
    """Entries to match captions against.

    Attributes:
        entries: their words, each entry once; an entry's number is its place here.
        kinds: of each entry: "list", "wordnet", "tag", "word" or "pair".
        facts: how it was made, as JSON.
    """

    entries: list[str]
    kinds: list[str]
    facts: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write it as Parquet: entry, kind."""
        columns = {"entry": pa.array(self.entries, pa.string()), "kind": pa.array(self.kinds, pa.string())}
        pq.write_table(pa.table(columns), path)


def inputs(settings: Settings) -> dict[str, str | None]:
    """Digests of the files that decide the metadata: the user's list, or else WordNet."""
    if settings.metadata:
        return {"metadata": hashlib.sha256(_bytes_of(settings.metadata)).hexdigest()}
    return {"wordnet": digest_of(settings.wordnet, settings.progress)}


def make(frame: DataFrame, context: Context) -> Metadata:
    """The user's list if the settings name one, else the metadata of the corpus.

    Raises:
        DataError: the list cannot be read, is not UTF-8 or holds no entry.
    """
    return from_list(context.settings.metadata) if context.settings.metadata else of_corpus(frame, context)


def from_list(path: str) -> Metadata:
    """The metadata of a text file with one entry a line, in its order.

    Raises:
        DataError: it cannot be read, is not UTF-8 or holds no entry.
    """
    content = _bytes_of(path)
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"metadata {path} is not UTF-8 in line {line}; a text in UTF-8 is needed") from error
    entries = [entry for entry in normal(lines) if entry]
    unique = list(dict.fromkeys(entries))
    if not unique:
        raise DataError(f"metadata {path} holds no entry in {len(lines)} lines; one entry a line is needed")
    facts = {"lines": len(lines), "blank": len(lines) - len(entries), "duplicate": len(entries) - len(unique)}
    return Metadata(unique, ["list"] * len(unique), facts)


def of_corpus(frame: DataFrame, context: Context) -> Metadata:
    """WordNet's lemmas, the tags, and the words and word pairs of the captions that are frequent enough.

    Pairs of neighbours count whose pointwise mutual information is high, as for MetaCLIP's bigrams.
    """
    captions = frame.where(col("caption") != lit("")).select("caption")
    number = captions.count_rows()
    least = max(FEWEST, math.ceil(SHARE * number))
    lexicon = Lexicon.open(context.settings.wordnet, context.settings.progress)
    vocabulary = _frequent_words(captions, least)
    pairs = _frequent_pairs(captions, vocabulary, max(FEWEST_PAIRS, least), context.folder)
    found: dict[str, Iterable[str]] = {
        "wordnet": normal(lexicon.lemmas()) if lexicon else (),
        "tag": normal(_frequent_tags(frame, least)),
        "word": normal(vocabulary),
        "pair": normal(pairs),
    }
    kinds: dict[str, str] = {}
    for kind, entries in found.items():
        for entry in entries:
            kinds.setdefault(entry, kind)
    kinds.pop("", None)
    entries = sorted(kinds)
    facts = {"captions": number, "least_count": least, "kinds": dict(Counter(kinds.values()))}
    return Metadata(entries, [kinds[entry] for entry in entries], facts)


@daft.func.batch(return_dtype=DataType.list(DataType.string()))
def words_of(captions: Series) -> pa.Array:
    """`words` of a column."""
    return words(captions.to_arrow())


def _frequent_words(captions: DataFrame, least: int) -> dict[str, int]:
    """Words of letters and their counts, in order."""
    found = _counted(captions.select(words_of(col("caption")).alias("entry")), least)
    lettered = pc.match_substring_regex(pa.array(found, pa.string()), WORD).to_pylist()
    return {word: count for (word, count), yes in zip(found.items(), lettered, strict=True) if yes}


def _frequent_tags(frame: DataFrame, least: int) -> list[str]:
    return list(_counted(frame.select(col("tags").list_distinct().alias("entry")), least))


def _counted(lists: DataFrame, least: int) -> dict[str, int]:
    """What the lists in column `entry` hold at least `least` times, in order; what is rarer stays with the workers."""
    every = lists.explode("entry").where(col("entry").not_null())
    counts = every.groupby("entry").agg(col("entry").count().alias("count")).where(col("count") >= lit(least))
    table = counts.to_pydict()
    return dict(sorted(zip(table["entry"], table["count"], strict=True)))


def _frequent_pairs(captions: DataFrame, vocabulary: Mapping[str, int], least: int, folder: Path) -> list[str]:
    """Neighbours of the vocabulary that come together often, and more often than by chance."""
    path = folder / "vocabulary.parquet"
    pq.write_table(pa.table({"word": pa.array(vocabulary, pa.string())}), path)
    neighbours = cast(Any, Neighbours(str(path)))
    pairs = _counted(captions.select(neighbours(col("caption")).alias("entry")), least)
    path.unlink()
    first, second = np.divmod(np.fromiter(pairs, np.int64, len(pairs)), PAIR)
    together = np.fromiter(pairs.values(), np.float64, len(pairs))
    counts = np.fromiter(vocabulary.values(), np.float64, len(vocabulary))
    information = np.log2(together * counts.sum() / (counts[first] * counts[second]))
    names = list(vocabulary)
    chosen = np.flatnonzero(information >= PAIR_BITS)
    return [f"{names[first[number]]} {names[second[number]]}" for number in chosen]


PAIR = 1 << 32


@daft.cls
class Neighbours:
    """Finds word pairs in captions; as numbers, since there are so many.

    Args:
        path: Parquet file of the vocabulary; only its words count.
    """

    def __init__(self, path: str) -> None:
        self.vocabulary = pq.read_table(path)["word"].combine_chunks().cast(pa.large_string())

    @daft.method.batch(return_dtype=DataType.list(DataType.int64()))
    def __call__(self, captions: Series) -> pa.Array:
        """Each neighbouring pair of each caption: PAIR times the number of the first word, plus that of the second."""
        found = words(captions.to_arrow())
        lengths = np.diff(found.offsets.to_numpy())
        rows = np.repeat(np.arange(len(lengths)), lengths)
        places = pc.index_in(found.flatten(), self.vocabulary).fill_null(-1).to_numpy().astype(np.int64)
        first, second = places[:-1], places[1:]
        together = (first >= 0) & (second >= 0) & (rows[:-1] == rows[1:])
        counts = np.bincount(rows[:-1][together], minlength=len(lengths))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, (first * PAIR + second)[together])


def _bytes_of(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"metadata {path} cannot be read ({error.strerror}); a text file is needed") from error
