"""Tags that say nothing about the picture, found by what else is known of the samples that carry them.

A tag is looked at where it is on a good share of a source. It says something if captions, labels or file names of its
samples name it; or if they, or the other tags, tell well which samples carry it. Two kinds do neither:

* what is on a large share of the source, is never named, and goes with no word of the captions;
* what is never, or rarely, named, and cannot be told from anything else: it came by chance.
"""

from __future__ import annotations

from typing import Any

import daft
import pyarrow as pa
from daft import DataFrame, DataType, Series, col, lit
from daft.functions import format, when

from xray.curate.boilerplate import content_words, normal
from xray.curate.step import Context

SHARE = 0.01  # of its source's samples: rarer tags are not looked at
MOST = 5000  # tags that are looked at, the commonest first
SAMPLES = 100_000  # of each source that are looked at, drawn by key
SUPPORT = 5  # samples with a word, below which it tells nothing

LARGE_SHARE = 0.05
NEVER = 0.01  # share of a tag's samples that name it
ASIDE = 0.5  # correlation (phi) with every word of captions and file names is below
RARELY = 0.2  # share of a tag's samples that name it ...
UNTOLD = 0.2  # ... and how well it can be told, from 0 (as chance has it) to 1
CLUSTER_BITS = 8  # of perceptual hashes: pictures that agree in them are one cluster

WORD, OTHER = "w", "o"


def find_noise(frame: DataFrame, context: Context) -> list[dict[str, Any]]:
    """The tags to stop in each source, with their numbers.

    Returns:
        `tag`, `source`, `count`, `share` of the source's samples, `named` (share of the tag's samples that name it),
        `lift` (how many times that is what all samples do), `told` (how well it can be told from the rest, see
        `UNTOLD`), `word` (its highest correlation with a word), commonest first.
    """
    sources = _counts(frame, ["source"])
    sizes = {row["source"]: row["count"] for row in sources}
    carried = frame.select("source", "tags").explode("tags").where(~col("tags").is_null())
    counts = carried.groupby("source", "tags").agg(col("tags").count().alias("count"))
    least = context.settings.stop_count
    counts = counts.join(daft.from_pydict({"source": list(sizes), "size": list(sizes.values())}), on="source")
    common = counts.where((col("count") >= lit(least)) & (col("count") >= col("size") * SHARE))
    looked_at = common.sort(["count", "source", "tags"], desc=[True, False, False]).limit(MOST).to_pylist()
    if not looked_at:
        return []
    tags: dict[str, list[str]] = {}
    for row in looked_at:
        tags.setdefault(row["source"], []).append(row["tags"])
    measured = _measured(_drawn(frame, {source: sizes[source] for source in tags}), tags, context)
    found = []
    for row in looked_at:
        share = row["count"] / row["size"]
        numbers = measured.get((row["source"], row["tags"]))
        if numbers and _says_nothing(share, **numbers):
            rounded = {name: round(value, 4) for name, value in {"share": share, **numbers}.items()}
            found.append({"tag": row["tags"], "source": row["source"], "count": row["count"], **rounded})
    return found


def _says_nothing(share: float, named: float, lift: float, told: float, word: float) -> bool:
    constant = share >= LARGE_SHARE and named < NEVER and word < ASIDE
    return constant or (named < RARELY and told < UNTOLD)


def _drawn(frame: DataFrame, sizes: dict[str, int]) -> DataFrame:
    limits = {
        "source": pa.array(list(sizes), pa.large_string()),
        "limit": pa.array([min(int(SAMPLES / size * 2**64), 2**64 - 1) for size in sizes.values()], pa.uint64()),
    }
    return frame.join(daft.from_pydict(limits), on="source").where(col("key") <= col("limit"))


def _measured(
    frame: DataFrame, tags: dict[str, list[str]], context: Context
) -> dict[tuple[str, str], dict[str, float]]:
    """`named`, `lift`, `told` and `word` of each (source, tag)."""
    columns = [col(name) for name in ("source", "tags", "caption", "label", "alternatives", "phash")]
    seen = seen_in(*columns, tags)
    frame = context.keep(frame.select("key", "source", seen.alias("seen")), "seen")  # type: ignore[union-attr]
    frame = frame.select("key", "source", *(col("seen")[name].alias(name) for name in ("tags", "named", "signs")))
    samples = {row["source"]: row["count"] for row in _counts(frame, ["source"])}
    carrying = _pairs(_counts(frame.select("source", "tags").explode("tags"), ["source", "tags"]), "tags")
    mentions = _pairs(_counts(frame.select("source", "named").explode("named"), ["source", "named"]), "named")
    both = frame.select("source", "tags", "named").explode("tags").explode("named")
    named = _pairs(_counts(both.where(col("tags") == col("named")), ["source", "tags"]), "tags")
    told = _told(frame, samples, context)
    measured = {}
    for (source, tag), count in carrying.items():
        size = samples[source]
        share = named.get((source, tag), 0) / count
        chance = mentions.get((source, tag), 0) / size
        rate, word = told.get((source, tag), (0.0, 0.0))
        common = count / size
        measured[source, tag] = {
            "named": share,
            "lift": share / chance if chance else 0.0,
            "told": (rate - common) / (1 - common) if common < 1 else 0.0,
            "word": word,
        }
    return measured


def _told(frame: DataFrame, samples: dict[str, int], context: Context) -> dict[tuple[str, str], tuple[float, float]]:
    """How surely each tag is told by the best of its samples' signs (the mean of that sign's share of samples with the
    tag, the sample itself left out), and its highest correlation with a word.
    """
    signs = frame.select("source", "signs").explode("signs").where(~col("signs").is_null())
    signs = signs.groupby("source", "signs").agg(col("signs").count().alias("with_sign"))
    signs = signs.where(col("with_sign") >= lit(SUPPORT))
    rows = frame.select("key", "source", "tags", "signs").explode("tags").explode("signs")
    rows = rows.where(~col("tags").is_null() & ~col("signs").is_null())
    rows = context.keep(rows.where(col("signs") != format(f"{OTHER} tag {{}}", col("tags"))), "signs")
    pairs = rows.groupby("source", "tags", "signs").agg(col("key").count().alias("together"))
    pairs = context.keep(pairs.join(signs, on=["source", "signs"]), "pairs")
    carrying = frame.select("source", "tags").explode("tags").where(~col("tags").is_null())
    carrying = carrying.groupby("source", "tags").agg(col("tags").count().alias("with_tag"))
    size = daft.from_pydict({"source": list(samples), "size": list(samples.values())})
    linked = pairs.where(col("signs").startswith(WORD)).join(carrying, on=["source", "tags"]).join(size, on="source")
    tag, sign, joint, all_ = (
        col(name).cast(DataType.float64()) for name in ("with_tag", "with_sign", "together", "size")
    )
    spread = (tag * (all_ - tag) * sign * (all_ - sign)).sqrt()
    linked = linked.with_column("phi", when(spread > lit(0), (joint * all_ - tag * sign) / spread).otherwise(lit(0.0)))
    words = linked.groupby("source", "tags").agg(col("phi").max())
    rate = (col("together") - 1) / (col("with_sign") - 1)
    rates = pairs.select("source", "tags", "signs", rate.alias("rate"))
    best = rows.join(rates, on=["source", "tags", "signs"]).groupby("key", "source", "tags").agg(col("rate").max())
    # a sample without signs adds nothing
    means = best.groupby("source", "tags").agg(col("rate").sum()).join(carrying, on=["source", "tags"])
    by_word = {(row["source"], row["tags"]): row["phi"] for row in words.to_pylist()}
    return {
        (row["source"], row["tags"]): (row["rate"] / row["with_tag"], by_word.get((row["source"], row["tags"]), 0.0))
        for row in means.to_pylist()
    }


@daft.func.batch(
    return_dtype=DataType.struct({name: DataType.list(DataType.string()) for name in ("tags", "named", "signs")})
)
def seen_in(
    sources: Series,
    tags: Series,
    captions: Series,
    labels: Series,
    alternatives: Series,
    hashes: Series,
    looked_at: dict[str, list[str]],
) -> Series:
    """Of each sample: which of its tags are looked at, which of those looked at are named by its texts, and its signs:
    words, label, cluster of pictures, other tags.
    """
    words = {tag: content_words(tag) for some in looked_at.values() for tag in some}
    sets = {source: set(some) for source, some in looked_at.items()}
    names = [" ".join(part for part in some or () if part) for some in alternatives.to_pylist()]
    texts = [f"{caption or ''} {name}" for caption, name in zip(captions.to_pylist(), names, strict=True)]
    texts = normal(pa.array(texts, pa.large_string())).to_pylist()
    marks = normal(pa.array([label or "" for label in labels.to_pylist()], pa.large_string())).to_pylist()
    rows = []
    for source, own, text, label, number in zip(
        sources.to_pylist(), tags.to_pylist(), texts, marks, hashes.to_pylist(), strict=True
    ):
        evidence = f" {text} {label} "
        signs = [f"{WORD} {word}" for word in dict.fromkeys(text.split())]
        signs += [f"{OTHER} tag {tag}" for tag in own or () if tag]
        signs += [f"{OTHER} label {label}"] if label else []
        signs += [f"{OTHER} cluster {number >> 64 - CLUSTER_BITS}"] if number is not None else []
        carried = [tag for tag in own or () if tag in sets[source]]
        named = [tag for tag in looked_at[source] if _names(words[tag], evidence)]
        rows.append({"tags": carried, "named": named, "signs": signs})
    return Series.from_pylist(rows)


def _names(words: list[str], evidence: str) -> bool:
    """Whether the text holds at least half of the words."""
    return 2 * sum((word if len(word) > 3 else f" {word}") in evidence for word in words) >= max(1, len(words))


def _counts(frame: DataFrame, columns: list[str]) -> list[dict[str, Any]]:
    frame = frame.where(~col(columns[-1]).is_null())
    return frame.groupby(*columns).agg(col(columns[-1]).count().alias("count")).sort([*columns]).to_pylist()


def _pairs(rows: list[dict[str, Any]], column: str) -> dict[tuple[str, str], int]:
    return {(row["source"], row[column]): row["count"] for row in rows}
