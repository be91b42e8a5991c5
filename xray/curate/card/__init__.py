"""The data card: one HTML page, no scripts, nothing fetched, pictures and charts inside."""

from __future__ import annotations

import difflib
import math
import os
import platform
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import daft
import pyarrow
from daft import DataFrame, col, lit

import xray
from xray import pages
from xray.curate.card import charts, figures
from xray.curate.card.pictures import Album
from xray.curate.settings import Settings
from xray.curate.step import ROWS, Finished, stored
from xray.curate.story import visible
from xray.data.shards import COPIED

TEMPLATE = "card.html.jinja"
LONGEST = 110  # characters of a caption
BUDGET = 2_400_000  # characters of all pictures: the page stays below 3 MB
EXAMPLES = 8  # of a reason
REASONS = 40  # that are shown with examples
GROUPS, GROUP = 12, 8  # duplicate groups of a step, and pictures of one
CHANGED = 14  # captions before and after
FREQUENT, TOP = 9, 60  # tags, as read and in the shards
SETS = 30
KEPT = 24
UNTOLD = ("address", "num_workers", "progress")  # settings of a machine, not of what comes out


@dataclass(frozen=True)
class Example:
    """A sample on the page; `other` is the id of the one that it is said to resemble."""

    id: str
    caption: str
    detail: str = ""
    tags: Sequence[str] = ()
    other: str = ""


@dataclass(frozen=True)
class Reason:
    """Why samples left a step, how many, and some of them."""

    step: str
    text: str
    count: int
    examples: Sequence[Example]


@dataclass
class _Run:
    """The tables of a finished curation."""

    folders: Mapping[str, Path]
    finished: Sequence[Finished]
    facts: Mapping[str, Mapping[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.facts = {done.name: done.facts for done in self.finished}

    def table(self, step: str) -> DataFrame:
        return stored(self.folders[step] / ROWS)

    def kept(self, step: str) -> DataFrame:
        return self.table(step).where(col("reason").is_null())


def write(
    path: Path, source: str, settings: Settings, folders: Mapping[str, Path], finished: Sequence[Finished]
) -> None:
    """Write the card of a curation.

    Everything that comes from data (ids, captions, tags, reasons) is escaped by the template.

    Args:
        path: of the page.
        source: what was curated; what may be secret in a URL is not shown.
        settings: of the run.
        folders: of the steps, by name and in order.
        finished: the steps' records, in order.
    """
    run = _Run(folders, finished)
    reasons = list(_reasons(run))
    groups = _groups(run)
    kept = _examples(run.kept(finished[-1].name), KEPT)
    still = run.facts["decode"].get("static_clips", {}).get("examples", [])
    shown = {id for part in (kept, *(reason.examples for reason in reasons)) for e in part for id in (e.id, e.other)}
    shown |= set(still)
    shown |= {example.id for _, _, rows in groups for row in rows for example in row}
    page = pages.template(Path(__file__).with_name(TEMPLATE), shorten=shorten, number="{:,}".format, share=_share)
    html = page.render(
        source=public(source),
        command=command(source, path.parent, settings),
        settings=[(name, value, value != getattr(Settings(), name)) for name, value in _effective(settings)],
        versions={
            "xray": xray.__version__,
            "daft": daft.__version__,
            "pyarrow": pyarrow.__version__,
            "python": platform.python_version(),
        },
        steps=finished,
        facts=run.facts,
        reasons=reasons,
        groups=groups,
        kept=kept,
        album=Album(run.table("decode"), shown, BUDGET),
        captions=_captions(run),
        tags=_tags(run),
        entries=_entries(run),
        media=_media(run),
        splits=figures.numbers(run.kept("split"), "split", "media", most=SETS)
        if "split" in _columns(run, "split")
        else [],
        sources=_sources(run),
        balanced=_balanced(run),
        agreement=_agreement(run),
    )
    draft = path.with_name(f".{path.name}")
    draft.write_text(html, encoding="utf-8")
    os.replace(draft, path)


def shorten(text: str, longest: int = LONGEST) -> str:
    """See `pages.shorten`."""
    return pages.shorten(text, longest)


def public(source: str) -> str:
    """Paths or URLs less what may be secret in them: a user's name and password, and what signs a request."""
    if "://" not in source:
        return source
    return re.sub(r"\?[^,]*", "", re.sub(r"(://)[^/@,]*@", r"\1", source))


def command(source: str, out: Path, settings: Settings) -> str:
    """How to curate the same again."""
    said = [f"{name}={value}" for name, value in _effective(settings) if value != getattr(Settings(), name)]
    return shlex.join(["xray", "curate", public(source), out.name, *said])


def _effective(settings: Settings) -> Iterator[tuple[str, Any]]:
    told = ((name, value) for name, value in asdict(settings).items() if name not in UNTOLD)
    return ((name, public(value) if isinstance(value, str) else value) for name, value in told)


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _columns(run: _Run, step: str) -> list[str]:
    return run.table(step).column_names


def _examples(frame: DataFrame, count: int) -> list[Example]:
    """A fixed draw of samples: keys are hashes."""
    columns = ["id", "caption", "tags", *(["detail"] if "detail" in frame.column_names else [])]
    rows = frame.select("key", *columns).sort("key").limit(count).to_pylist()
    return [Example(row["id"], row["caption"] or "", row.get("detail") or "", row["tags"] or ()) for row in rows]


def _resembling(examples: Sequence[Example], table: DataFrame) -> list[Example]:
    """The examples, those whose detail is the id of another sample with that."""
    details = [example.detail for example in examples if example.detail]
    known = set(table.where(col("id").is_in(details)).select("id").to_pydict()["id"]) if details else set()
    return [replace(example, other=example.detail) if example.detail in known else example for example in examples]


def _reasons(run: _Run) -> Iterator[Reason]:
    """Why samples left, step by step."""
    told = 0
    for done in run.finished:
        for text, count in done.reasons.items():
            leaving = run.table(done.name).where(col("reason") == lit(text))
            examples = _resembling(_examples(leaving, EXAMPLES), run.table(done.name)) if told < REASONS else []
            paired = any(example.other for example in examples)  # and take two places each
            yield Reason(done.name, text, count, examples[: EXAMPLES // 2] if paired else examples)
            told += 1
        if done is run.finished[-1] and "copies" in _columns(run, done.name):
            copied = run.kept(done.name).where(col("copies") > lit(1))
            count = copied.count_rows()
            if count:
                yield Reason("balance", COPIED, count, _examples(copied, EXAMPLES))


def _groups(run: _Run) -> list[tuple[str, Mapping[str, Any], Sequence[Sequence[Example]]]]:
    """Of each step that looks for duplicates: its name, what it told, and the samples of some groups."""
    found: list[tuple[str, Mapping[str, Any], Sequence[Sequence[Example]]]] = []
    for done in run.finished:
        listed = [ids[:GROUP] for ids in done.facts.get("examples", [])[:GROUPS]] if "groups" in done.facts else []
        if not listed:
            continue
        ids = [id for group in listed for id in group]
        rows = run.table(done.name).where(col("id").is_in(ids)).select("id", "caption", "reason").to_pylist()
        known = {row["id"]: Example(row["id"], row["caption"], row["reason"] or "") for row in rows}
        groups = [[known[id] for id in group if id in known] for group in listed]
        found.append((done.name, done.facts, groups))
    return found


def _captions(run: _Run) -> dict[str, Any]:
    """Captions before and after: their lengths, and some that changed."""
    before, after = run.table("read"), run.table("clean_text")
    pairs = before.select("key", col("caption").alias("was")).join(after.select("key", "id", "caption"), on="key")
    changed = pairs.where(col("was") != col("caption"))
    bins = [f"{edge:,}" for edge in figures.EDGES]
    series = [("as read", figures.caption_lengths(before)), ("in the shards", figures.caption_lengths(_last(run)))]
    while bins and not any(shares[len(bins) - 1] for _, shares in series):
        bins.pop()
    return {
        "changed": [marked(pair["was"], pair["caption"]) for pair in changed.sort("key").limit(CHANGED).to_pylist()],
        "lengths": charts.histogram(
            bins,
            [(name, shares[: len(bins)]) for name, shares in series],
            description="Lengths of captions as read and in the shards",
            name="characters, from",
        ),
    }


def _last(run: _Run) -> DataFrame:
    return run.kept(run.finished[-1].name)


def _tags(run: _Run) -> dict[str, Any]:
    """Tags before and after: how often they occur, and the most frequent ones."""
    before, after = run.table("read"), _last(run)
    was, now = figures.spectrum(before, "tags"), figures.spectrum(after, "tags")
    drawn = figures.spectrum(after, "tags", copies=True)
    curves = [("as read", was.points()), ("in the shards", now.points())]
    if drawn != now:
        curves.append(("in the shards, with copies", drawn.points()))
    top = figures.most_frequent(before, "tags", FREQUENT)
    spelled = {was: now for was, now, _ in run.facts["canonical_tags"].get("canonical", {}).get("examples", [])}
    names = [spelled.get(tag, tag) for tag, _ in top]
    left = figures.occurrences(after, "tags", names)
    return {
        "was": was,
        "now": now,
        "chart": charts.rank_chart(curves, description="How often tags occur, by rank, as read and in the shards"),
        "before": [(tag, times, name, left.get(name, 0)) for (tag, times), name in zip(top, names, strict=True)],
        "after": figures.most_frequent(after, "tags", TOP),
    }


def _entries(run: _Run) -> dict[str, Any] | None:
    """Entries of the metadata before and after balancing; None where nothing was matched."""
    if "entries" not in _columns(run, "match"):
        return None
    was = figures.spectrum(run.kept("match"), "entries")
    now = figures.spectrum(run.kept("balance"), "entries", copies=True)
    if not was.items:
        return None
    threshold = run.facts["balance"].get("captions", {}).get("threshold") or 0
    mark = (f"t = {threshold:,}", float(threshold)) if threshold else None
    curves = [("before balancing", was.points()), ("after, with copies", now.points())]
    description = "How often entries of the metadata are matched, by rank, before and after balancing"
    return {
        "was": was,
        "now": now,
        "threshold": threshold,
        "chart": charts.rank_chart(curves, description=description, mark=mark),
    }


def _media(run: _Run) -> list[dict[str, Any]]:
    """Images and clips: how many were decoded, how many frames clips have, why they left."""
    frame = run.table("decode")
    if "frames" not in frame.column_names:
        return []
    counts = [
        col("id").count().alias("samples"),
        col("frames").min().alias("fewest"),
        col("frames").mean().alias("mean"),
        col("frames").max().alias("most"),
    ]
    return list(frame.groupby("media", "reason").agg(*counts).sort(["media", "reason"]).to_pylist())


def _sources(run: _Run) -> list[dict[str, Any]]:
    """Rows read and samples kept of the largest sets."""
    rows = figures.numbers(run.table("read"), "source", most=SETS)
    left = _last(run).where(col("source").is_in([row["source"] for row in rows]))
    now = {row["source"]: row for row in figures.numbers(left, "source", most=SETS)}
    nothing = {"samples": 0, "drawn": 0}
    return [
        {"source": row["source"], "rows": row["samples"], **{k: now.get(row["source"], nothing)[k] for k in nothing}}
        for row in rows
    ]


def _balanced(run: _Run) -> list[dict[str, Any]]:
    """What balancing tells of the samples that it balances by caption and by tags."""
    facts = run.facts["balance"]
    return [{"rule": rule, **facts[rule]} for rule in ("captions", "tags") if facts.get(rule, {}).get("samples")]


def _agreement(run: _Run) -> dict[str, Any] | None:
    """How well captions and pictures agree; None where no model was asked."""
    facts = run.facts["agreement"]
    if not facts.get("scored"):
        return None
    bins: Counter[int] = Counter()
    for score, count in facts["histogram"]:
        bins[math.floor(2 * score)] += count
    halves = range(min(bins), max(bins) + 1)
    shares = [bins[half] / facts["scored"] for half in halves]
    chart = charts.histogram(
        [f"{half / 2:g}" for half in halves],
        [("pairs", shares)],
        description="How well captions and pictures agree, in standard deviations above chance",
        name="standard deviations above chance, from",
    )
    return {"chart": chart, "scored": facts["scored"], "threshold": facts["threshold"]}


def marked(was: str, now: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Two texts in pieces, those marked True that only one of them has; what cannot be seen is escaped."""
    pair = [re.findall(r"\w+|\s+|.", visible(shorten(text))) for text in (was, now)]
    sides: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    for tag, a, b, c, d in difflib.SequenceMatcher(None, pair[0], pair[1], autojunk=False).get_opcodes():
        for side, words, low, high in ((sides[0], pair[0], a, b), (sides[1], pair[1], c, d)):
            if low < high:
                side.append(("".join(words[low:high]), tag != "equal"))
    return sides
