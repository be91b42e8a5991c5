"""Tags: one spelling for one thing, and none that say nothing."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataFrame, DataType, Series, col, lit
from daft.functions import list_count

from xray.curate.cleaning import JOINER
from xray.curate.frame import TEXTS, keeping
from xray.curate.noise import find_noise
from xray.curate.settings import Settings
from xray.curate.step import Context, Step
from xray.curate.wordnet import PLURALS, Lexicon, digest_of

MOST = 1_000_000  # of the different tags, the commonest are looked up; rarer ones are only spelled alike
EXAMPLES = 50
NAMES = "names.json"

_UNSEEN = re.compile(r"[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
_GAP = re.compile(r"[\s_,;:/\\|\"\u201c-\u201e\u00ab\u00bb()\[\]{}<>*!?=~^`\x00-\x1f\x7f\u2010-\u2015-]+")
_EDGE = ".'\u2018\u2019&@#%"
_CAMEL = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")


def canonical_tags(frame: DataFrame | None, context: Context) -> DataFrame:
    """Write tags alike: case, Unicode, punctuation, hashtags, plurals, and synonyms by WordNet.

    Each tag is once in a sample, in the order of the source. A tag's name is found once, not for every sample.
    """
    assert frame is not None
    counts = frame.select("tags").explode("tags").where(~col("tags").is_null())
    counts = counts.groupby("tags").agg(col("tags").count().alias("count"))
    counts = context.keep(counts, "counts")
    found = counts.sort(["count", "tags"], desc=[True, False]).limit(MOST).to_pydict()
    settings = context.settings
    names = names_of(found["tags"], Lexicon.open(settings.wordnet, settings.progress))
    unlike = {tag: name for tag, name in names.items() if name != spelled(tag)}
    text = json.dumps(unlike, ensure_ascii=False, sort_keys=True)
    (context.folder / NAMES).write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    changed = [
        [tag, names[tag], count]
        for tag, count in zip(found["tags"], found["count"], strict=True)
        if names[tag] != " ".join(tag.casefold().split())
    ]
    before = counts.count_rows()
    frame = frame.with_column("had", list_count(col("tags")))
    frame = frame.with_column("tags", renamed(col("tags"), str(context.folder / NAMES), digest))  # type: ignore[arg-type]
    context.facts["canonical"] = {
        "before": before,
        "after": len(set(names.values()) - {""}) + before - len(names),
        "wordnet": settings.wordnet != "off" and digest_of(settings.wordnet, settings.progress) is not None,
        "examples": changed[:EXAMPLES],
        "untagged": _untagged(frame),
    }
    return keeping(frame.exclude("had"))


def spelled(tag: str) -> str:
    """A tag in lower case, words apart by single spaces, without the signs around and between them."""
    text = JOINER.sub(r"\1", _UNSEEN.sub("", unicodedata.normalize("NFKC", tag)))
    text = unicodedata.normalize("NFKC", text.casefold())
    return " ".join(_GAP.sub(" ", text).strip(f"{_EDGE} ").split())


def names_of(tags: list[str], lexicon: Lexicon | None) -> dict[str, str]:
    """The name of each tag.

    Args:
        tags: all different.
        lexicon: for plurals and synonyms; without it, and for words that it lacks, a plural takes the name of its
            singular where that is a tag, too.
    """
    plain = {tag: spelled(tag) for tag in tags}
    vocabulary = {name for tag, name in plain.items() if len(_parts(tag)) < 2}
    known: Callable[[str], bool] = vocabulary.__contains__
    if lexicon is not None:
        words = set(lexicon.lemmas())
        known = lambda name: name in vocabulary or name in words  # noqa: E731

    @functools.cache
    def name_of(name: str) -> str:
        if lexicon is not None and (better := lexicon.canonical(name)) != name:
            return better
        return name if lexicon is not None and name in lexicon else _singular(name, vocabulary)

    return {tag: name_of(_apart(tag, name, known)) for tag, name in plain.items()}


def _parts(tag: str) -> list[str]:
    """The words of a hashtag such as "SunsetBeach"; none of anything else."""
    text = tag.strip().lstrip("#")
    parts = _CAMEL.findall(text)
    return parts if "".join(parts) == text else []


def _apart(tag: str, name: str, known: Callable[[str], bool]) -> str:
    """The name with spaces between the words of a hashtag, if they are known, and not the whole."""
    parts = [part.lower() for part in _parts(tag)]
    apart = " ".join(parts)
    if len(parts) < 2 or known(name) or not (known(apart) or all(len(part) > 1 and known(part) for part in parts)):
        return name
    return apart


def _singular(name: str, vocabulary: set[str]) -> str:
    if len(name) < 4 or name.endswith("ss"):
        return name
    forms = (name.removesuffix(ending) + single for ending, single in PLURALS if name.endswith(ending))
    return next((form for form in forms if form in vocabulary), name)


@daft.func.batch(return_dtype=TEXTS)
def renamed(tags: Series, path: str, digest: str) -> Series:
    """The tags' names, each once in a sample; `path` holds the names of those that spelling alone does not give."""
    names = _names(path, digest)
    return Series.from_arrow(_each(tags.to_arrow(), lambda tag: names.get(tag) or spelled(tag)))


@functools.lru_cache(maxsize=1)
def _names(path: str, digest: str) -> dict[str, str]:
    names: dict[str, str] = json.loads(Path(path).read_text(encoding="utf-8"))
    return names


def _each(lists: pa.Array, name_of: Callable[[str], str]) -> pa.Array:
    """Lists of names, less those that are empty or came in the same list before; null lists become empty."""
    lists = lists.cast(pa.large_list(pa.large_string()))
    encoded = pc.list_flatten(lists).dictionary_encode()
    names = pa.array(
        [name_of(tag) if tag is not None else "" for tag in encoded.dictionary.to_pylist()], pa.large_string()
    )
    flat = pc.fill_null(names.take(encoded.indices), "")
    again = flat.dictionary_encode()
    parents = pc.list_parent_indices(lists).to_numpy()
    codes = again.indices.to_numpy()
    _, first = np.unique(parents * (len(again.dictionary) + 1) + codes, return_index=True)
    keep = np.zeros(len(flat), bool)
    keep[first] = True
    keep &= pc.not_equal(flat, "").to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(parents[keep], minlength=len(lists)))])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat.filter(pa.array(keep)))


def stop_tags(frame: DataFrame | None, context: Context) -> DataFrame:
    """Take out tags that say nothing about the picture; see `noise.find_noise`."""
    assert frame is not None
    found = find_noise(frame, context)
    stopped: dict[str, list[str]] = {}
    for row in found:
        stopped.setdefault(row["source"], []).append(row["tag"])
    frame = frame.with_column("had", list_count(col("tags")))
    if stopped:
        frame = frame.with_column("tags", without(col("source"), col("tags"), stopped))  # type: ignore[arg-type]
    context.facts["stop_tags"] = found
    context.facts["untagged"] = _untagged(frame) if stopped else 0
    return keeping(frame.exclude("had"))


@daft.func.batch(return_dtype=TEXTS)
def without(sources: Series, tags: Series, stopped: Mapping[str, list[str]]) -> Series:
    """The tags less those that are stopped in their source."""
    lists, origin = tags.to_arrow(), sources.to_arrow().cast(pa.large_string())
    for source, names in stopped.items():
        where = pc.equal(origin, source)
        if pc.any(where).as_py():
            stop = set(names)
            some = _each(lists.filter(where), lambda tag, stop=stop: "" if tag in stop else tag)  # type: ignore[misc]
            lists = _replaced(lists, where, some)
    return Series.from_arrow(lists)


def _replaced(lists: pa.Array, where: pa.Array, some: pa.Array) -> pa.Array:
    lists = lists.cast(pa.large_list(pa.large_string()))
    chosen = np.arange(len(lists))
    mask = where.to_numpy(zero_copy_only=False)
    chosen[mask] = len(lists) + np.arange(mask.sum())
    return pa.concat_arrays([lists, some]).take(pa.array(chosen))


def _untagged(frame: DataFrame) -> int:
    """Samples that had tags, and have none now."""
    lost = (col("had") > lit(0)) & (list_count(col("tags")) == lit(0))
    return int(frame.agg(lost.cast(DataType.int64()).sum().alias("lost")).to_pydict()["lost"][0] or 0)


def _inputs(source: str, settings: Settings) -> Any:
    return digest_of(settings.wordnet, settings.progress)


CANONICAL = Step("canonical_tags", canonical_tags, reads=("wordnet",), inputs=_inputs)
STOPLIST = Step("stop_tags", stop_tags, reads=("stop_count",))
