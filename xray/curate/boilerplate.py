"""Captions that say nothing about their picture, found by how often they come and what the samples have in common.

A caption on many samples may be true of them all: "cat" on thirty pictures of cats. Then the words of the caption are
found among the samples' tags, labels and file names, much more often than among those of other samples. The title of a
collection is not, or it is on a large share of all samples that have names of their own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import daft
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataFrame, DataType, Series, col, lit
from daft.functions import regexp_replace

from xray.curate.settings import Settings

MOST = 5000  # of the repeated captions, the commonest are looked at
NAMED = 0.5  # share of the caption's words that the samples' tags, labels and file names must hold ...
ABOVE_CHANCE = 0.25  # ... and by how much more than those of other samples
CHANCE_SAMPLES = 500
EVIDENCE = 10  # with fewer samples that have tags, label or file name, only how common it is counts
COMMON = 0.01  # share of all samples
DIVERSE = 0.25  # file names of different words for so many of them: it is a collection

AFFIX_WORDS = 6
AFFIX_SHARE = 0.02  # of a source's different captions
AFFIX_HELD = 0.5  # share of the captions with the same first (or last) word that go on alike
AFFIX_ON = 0.2  # share of the captions with a phrase that have the same next word: it belongs to the phrase
AFFIX_LONGER = 0.8  # share of them with the same further word: the shorter phrase is part of the longer
AFFIX_SAMPLES = 200_000  # captions of each source that are looked at
START, END = "start", "end"

_WORD = re.compile(r"\w+")


def normal(texts: pa.Array) -> pa.Array:
    """Texts as they are counted: lower case, numbers as 0, words and symbols that are no punctuation."""
    texts = pc.utf8_lower(texts.cast(pa.large_string()))
    texts = pc.replace_substring_regex(texts, r"\pN+", "0")
    texts = pc.replace_substring_regex(texts, r"[^\pL\pM\pN\p{So}]+", " ")
    return pc.utf8_trim_whitespace(texts)


@daft.func.batch(return_dtype=DataType.string())
def normalised(texts: Series) -> Series:
    return Series.from_arrow(normal(texts.to_arrow()))


def content_words(text: str) -> list[str]:
    """The words of a normalised text that may name something, less the endings of longer ones.

    Short ones, mostly articles and prepositions, count where there are no others.
    """
    words = [word for word in dict.fromkeys(text.split()) if not word.isdigit()]
    long = [word for word in words if len(word) > 3 or not word.isascii()]
    return [word if len(word) <= 4 else word[: max(4, len(word) - 2)] for word in long or words]


def coverage(words: list[str], evidence: str) -> float:
    """Share of the words that the evidence holds."""
    return sum(word in evidence for word in words) / len(words) if words else 0.0


@daft.func.batch(
    return_dtype=DataType.struct(
        {
            "evident": DataType.bool(),
            "named": DataType.float64(),
            "in_names": DataType.float64(),
            "names": DataType.string(),
        }
    )
)
def compared(texts: Series, tags: Series, labels: Series, alternatives: Series) -> Series:
    """How each sample's own words agree with its (normalised) caption."""
    rows = []
    words: dict[str, list[str]] = {}
    for text, tag, label, names in zip(*(s.to_pylist() for s in (texts, tags, labels, alternatives)), strict=True):
        if text not in words:
            words[text] = content_words(text)
        name = " ".join(_WORD.findall(re.sub(r"[\d_]+", " ", " ".join(names or ()).lower())))
        evidence = " ".join([*(part for part in tag or () if part), label or ""]).lower().strip()
        rows.append(
            {
                "evident": bool(evidence or name),
                "named": coverage(words[text], f"{evidence} {name}"),
                "in_names": coverage(words[text], name),
                "names": name or None,
            }
        )
    return Series.from_pylist(rows)


def find_boilerplate(frame: DataFrame, settings: Settings, samples: int) -> dict[str, int]:
    """The (normalised) captions that are boilerplate, and how many samples carry each.

    Args:
        frame: with `text`, the normalised caption, besides the columns of a sample.
        settings: `boilerplate_count`, `boilerplate_share`.
        samples: rows of the frame.
    """
    least = max(settings.boilerplate_count, settings.boilerplate_share * samples)
    counts = frame.where(col("text") != lit("")).groupby("text").agg(col("key").count().alias("count"))
    common = counts.where(col("count") > lit(least)).sort(["count", "text"], desc=[True, False]).limit(MOST)
    found = common.to_pydict()
    if not found["text"]:
        return {}
    carried = dict(zip(found["text"], found["count"], strict=True))
    rows = frame.join(daft.from_pydict({"text": list(carried)}), on="text", how="semi").select(
        "text", compared(col("text"), col("tags"), col("label"), col("alternatives")).alias("own")
    )
    rows = rows.select("text", *(col("own")[name].alias(name) for name in ("evident", "named", "in_names", "names")))
    agreed = rows.groupby("text").agg(
        col("evident").cast(DataType.int64()).sum(),
        col("named").mean(),
        col("in_names").mean(),
        col("names").count().alias("with_names"),
        col("names").count_distinct().alias("kinds"),
    )
    others = _other_samples(frame)
    return {
        row["text"]: carried[row["text"]]
        for row in agreed.sort("text").to_pylist()
        if _says_nothing(row, carried[row["text"]] / samples, others)
    }


def _other_samples(frame: DataFrame) -> list[tuple[str, str]]:
    """(caption, evidence) of some samples."""
    some = frame.select("key", "text", "tags", "label", "alternatives").sort("key").limit(CHANCE_SAMPLES).to_pylist()
    return [
        (
            row["text"],
            " ".join(
                part for part in (*(row["tags"] or ()), row["label"], *(row["alternatives"] or ())) if part
            ).lower(),
        )
        for row in some
    ]


def _says_nothing(row: Mapping[str, Any], share: float, others: Iterable[tuple[str, str]]) -> bool:
    if row["evident"] < EVIDENCE:
        return share > COMMON
    words = content_words(row["text"])
    chances = [coverage(words, evidence) for text, evidence in others if text != row["text"]]
    chance = sum(chances) / len(chances) if chances else 0.0
    if row["named"] < NAMED or row["named"] - chance < ABOVE_CHANCE:
        return True
    collection = row["with_names"] >= EVIDENCE and row["kinds"] > DIVERSE * row["with_names"]
    return share > COMMON and collection and row["in_names"] < NAMED


@daft.func.batch(return_dtype=DataType.list(DataType.string()))
def ends(texts: Series) -> Series:
    """The first and the last one to six words of each caption that has more."""
    rows = []
    for text in texts.to_pylist():
        words = text.split()
        lengths = range(1, min(AFFIX_WORDS, len(words) - 1) + 1)
        rows.append(
            [f"{START} {' '.join(words[:k])}" for k in lengths] + [f"{END} {' '.join(words[-k:])}" for k in lengths]
        )
    return Series.from_arrow(pa.array(rows, pa.large_list(pa.large_string())))


def find_affixes(frame: DataFrame, settings: Settings, sources: Mapping[str, int]) -> list[tuple[str, str, str, int]]:
    """Phrases of two words or more that an improbable share of a source's captions begins or ends with.

    Args:
        frame: as for `find_boilerplate`, without the captions found there.
        settings: `boilerplate_count`.
        sources: rows of the frame by source.

    Returns:
        (source, "start" or "end", the words, normalised, how many captions of those looked at).
    """
    shares = {source: min(1.0, AFFIX_SAMPLES / count) for source, count in sources.items()}
    limits = {
        "source": pa.array(list(shares), pa.large_string()),
        "limit": pa.array([min(int(share * 2**64), 2**64 - 1) for share in shares.values()], pa.uint64()),
    }
    some = frame.join(daft.from_pydict(limits), on="source").where(col("key") <= col("limit"))
    texts = some.groupby("source").agg(col("text").count_distinct().alias("count")).to_pydict()
    least = {
        source: max(settings.boilerplate_count, AFFIX_SHARE * count)
        for source, count in zip(texts["source"], texts["count"], strict=True)
    }
    some = some.with_column("affix", ends(col("text"))).explode("affix").where(~col("affix").is_null())
    counts = some.groupby("source", "affix").agg(col("text").count_distinct().alias("count"))
    counted: dict[str, dict[str, int]] = defaultdict(dict)
    for row in counts.where(col("count") > lit(settings.boilerplate_count)).to_pylist():
        counted[row["source"]][row["affix"]] = row["count"]
    found = []
    for source in sorted(counted):
        held = {affix: n for affix, n in counted[source].items() if _is_affix(affix, counted[source], least[source])}
        found += [(source, affix, held[affix]) for affix in sorted(held) if not _goes_on(affix, held)]
    named = _named_affixes(some, [(source, affix) for source, affix, _ in found])
    return [(source, *affix.split(" ", 1), n) for source, affix, n in found if (source, affix) not in named]  # type: ignore[misc]


def _named_affixes(some: DataFrame, affixes: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those of which the samples' tags, labels and file names hold a word: they tell of the picture."""
    if not affixes:
        return set()
    found = daft.from_pydict({"source": [source for source, _ in affixes], "affix": [affix for _, affix in affixes]})
    some = some.join(found, on=["source", "affix"])
    own = compared(regexp_replace(col("affix"), "^[a-z]+ ", ""), col("tags"), col("label"), col("alternatives"))
    named = (
        some.select("source", "affix", (own["named"] > lit(0)).cast(DataType.float64()).alias("named"))
        .groupby("source", "affix")
        .agg(col("named").mean())
    )
    return {(row["source"], row["affix"]) for row in named.where(col("named") >= lit(NAMED)).to_pylist()}


def _is_affix(affix: str, counts: Mapping[str, int], least: float) -> bool:
    """Whether two words come together so often that they are one thing, and what else comes with them."""
    end, *words = affix.split()
    if len(words) < 2:
        return False
    shorter = " ".join([end, *(words[:-1] if end == START else words[1:])])
    if len(words) > 2:
        return counts[affix] >= AFFIX_ON * counts[shorter] and _is_affix(shorter, counts, least)
    telling = any(len(word) > 3 or not word.isascii() for word in words)
    return telling and counts[affix] > least and counts[affix] >= AFFIX_HELD * counts[shorter]


def _goes_on(affix: str, held: Mapping[str, int]) -> bool:
    """Whether nearly all captions with this phrase have a longer one that was found."""
    end, words = affix.split(" ", 1)

    def holds(other: str) -> bool:
        if end == START:
            return other.startswith(f"{affix} ")
        return other.startswith(f"{END} ") and other.endswith(f" {words}") and other != affix

    return any(holds(other) and count >= AFFIX_LONGER * held[affix] for other, count in held.items())


def pattern_of(affixes: Iterable[tuple[str, str]]) -> str:
    """The regular expression, RE2's, of ("start" or "end", words) at their places; numbers may differ.

    A phrase at the end is cut with the punctuation before it, one at the start with that behind it.
    """
    gap = r"[^\pL\pM\pN\p{So}]"
    parts = {START: list[str](), END: list[str]()}
    for end, words in affixes:
        parts[end].append(f"{gap}+".join(r"\pN+".join(map(re.escape, word.split("0"))) for word in words.split()))
    choice = {end: "|".join(sorted(some, key=lambda part: (-len(part), part))) for end, some in parts.items()}
    patterns = []
    if choice[START]:
        patterns.append(rf"^{gap}*(?:{choice[START]})(?:{gap}+|$)")
    if choice[END]:
        patterns.append(rf"(?:^|{gap}+)(?:{choice[END]}){gap}*$")
    return f"(?i){'|'.join(patterns)}"
