"""Captions: what is no language about the picture goes."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, cast

import daft
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataFrame, DataType, Expression, Series, col, lit

from xray.curate.boilerplate import find_affixes, find_boilerplate, normal, normalised, pattern_of
from xray.curate.cleaning import clean
from xray.curate.frame import drop, keeping
from xray.curate.step import Context, Step
from xray.data.errors import DataError

OTHER_LANGUAGE = "the caption is in another language"
UNDECIDED_WORDS = 4  # shorter captions are in any language
UNDECIDED_CHARACTERS = 8  # in scripts that put no spaces between words
CERTAIN = 0.9  # probability of a language, below which a caption is not dropped for it
EXAMPLES = 50


def clean_text(frame: DataFrame | None, context: Context) -> DataFrame:
    """Clean captions, take out boilerplate, drop other languages than `languages`.

    A caption that says nothing is replaced by the first of the sample's alternatives that does, else by "".
    """
    assert frame is not None
    settings = context.settings
    wanted = _languages(settings.languages)
    frame = keeping(frame).with_columns(
        {"original": col("caption"), "caption": cast(Expression, cleaned(col("caption"), settings.max_caption))}
    )
    frame = context.keep(frame.with_column("text", normalised(col("caption"))), "cleaned")
    sources = _counts(frame, "source")
    boilerplate = find_boilerplate(frame, settings, sum(sources.values()))
    affixes = find_affixes(frame, settings, sources) if sources else []
    by_source: dict[str, list[tuple[str, str]]] = {}
    for source, end, words, _ in affixes:
        by_source.setdefault(source, []).append((end, words))
    new = better(
        col("caption"),
        col("text"),
        col("source"),
        col("alternatives"),
        sorted(boilerplate),
        {source: pattern_of(some) for source, some in by_source.items()},
        settings.max_caption,
    )
    frame = frame.with_column("new", cast(Expression, new)).exclude("text")
    frame = frame.with_columns({"caption": col("new")["caption"], "replaced": col("new")["replaced"]})
    frame = context.keep(frame.exclude("new"), "bettered")
    ranked = sorted(boilerplate.items(), key=lambda item: (-item[1], item[0]))
    context.facts.update(
        boilerplate=[list(item) for item in ranked[:EXAMPLES]],
        affixes=[list(affix) for affix in affixes[:EXAMPLES]],
        **_changes(frame),
    )
    frame = frame.exclude("original", "replaced")
    if not wanted:
        return frame
    frame = frame.with_column("language", language_of(col("caption")))
    other = ~col("language").is_in([*wanted, ""])
    return drop(frame, other, OTHER_LANGUAGE, col("language")).exclude("language")


@daft.func.batch(return_dtype=DataType.string())
def cleaned(captions: Series, longest: int) -> Series:
    return Series.from_arrow(clean(captions.to_arrow(), longest))


@daft.func.batch(return_dtype=DataType.struct({"caption": DataType.string(), "replaced": DataType.bool()}))
def better(
    captions: Series,
    texts: Series,
    sources: Series,
    alternatives: Series,
    boilerplate: list[str],
    affixes: dict[str, str],
    longest: int,
) -> Series:
    """The captions less what is found at the ends of many, or an alternative where nothing is said.

    Args:
        captions: clean.
        texts: the captions, normalised.
        sources: of the samples.
        alternatives: lists of texts.
        boilerplate: normalised captions that say nothing.
        affixes: regular expressions of what is to be cut, by source.
        longest: see `clean`.
    """
    known = pa.array(boilerplate, pa.large_string())
    caption = captions.to_arrow().cast(pa.large_string())
    is_bad = pc.is_in(texts.to_arrow().cast(pa.large_string()), value_set=known)
    origin = sources.to_arrow().cast(pa.large_string())
    for source, pattern in affixes.items():
        where = pc.and_(pc.equal(origin, source), pc.invert(is_bad))
        if pc.any(where).as_py():
            cut = pc.replace_substring_regex(caption.filter(where), pattern, "")
            caption = pc.replace_with_mask(caption, where, clean(cut, longest))
    wanting = pc.or_(is_bad, pc.equal(caption, ""))
    others = _first_good(alternatives.to_arrow().filter(wanting), known, longest)
    caption = pc.replace_with_mask(caption, wanting, others)
    replaced = pc.and_(wanting, pc.not_equal(caption, ""))
    return Series.from_arrow(pa.StructArray.from_arrays([caption, replaced], ["caption", "replaced"]))


def _first_good(lists: pa.Array, known: pa.Array, longest: int) -> pa.Array:
    """The first text of each list that is not empty once clean, and no boilerplate; "" if there is none."""
    flat = clean(pc.list_flatten(lists), longest)
    good = pc.and_(pc.not_equal(flat, ""), pc.invert(pc.is_in(normal(flat), value_set=known)))
    parents = pc.list_parent_indices(lists).filter(good).to_pylist()
    chosen = dict(zip(reversed(parents), reversed(flat.filter(good).to_pylist()), strict=True))
    return pa.array([chosen.get(row, "") for row in range(len(lists))], pa.large_string())


@daft.func.batch(return_dtype=DataType.string(), use_process=True)
def language_of(captions: Series) -> Series:
    """The language's ISO 639-1 code, "" where the caption is too short or leaves doubt."""
    return Series.from_arrow(pa.array([_language(text) for text in captions.to_pylist()], pa.large_string()))


def _language(text: str | None) -> str:
    if not text:
        return ""
    dense = re.findall(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]", text)
    if len(text.split()) < UNDECIDED_WORDS and len(dense) < UNDECIDED_CHARACTERS:
        return ""
    language, probability = _identifier().classify(text)
    return str(language) if probability >= CERTAIN else ""


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _languages(setting: str) -> list[str]:
    """The codes of a comma-separated list."""
    codes = [code.strip().lower() for code in setting.split(",") if code.strip()]
    known = set(_identifier().labels) if codes else set()
    for code in codes:
        if code not in known:
            raise DataError(
                f"languages names {code!r}; ISO 639-1 codes such as {', '.join(sorted(known)[:8])} are needed"
            )
    return codes


def _counts(frame: DataFrame, column: str) -> dict[str, int]:
    found = frame.groupby(column).agg(col("key").count().alias("count")).sort(column).to_pydict()
    return dict(zip(found[column], found["count"], strict=True))


def _changes(frame: DataFrame) -> dict[str, int]:
    """How many captions were replaced, became empty, or differ from what was read in any way."""
    flags: dict[str, Expression] = {
        "replaced": col("replaced"),
        "emptied": (col("caption") == lit("")) & (col("original").fill_null("") != lit("")),
        "changed": col("caption") != col("original").fill_null(""),
    }
    counted = frame.agg([flag.cast(DataType.int64()).sum().alias(name) for name, flag in flags.items()]).to_pydict()
    return {name: int(counted[name][0] or 0) for name in flags}


STEP = Step(
    "clean_text",
    clean_text,
    reads=("languages", "max_caption", "boilerplate_count", "boilerplate_share"),
)
