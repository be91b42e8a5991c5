"""A finished curation of a dozen samples, by steps that do to rows made by hand what the real ones do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curate_frames import frame_of
from daft import DataFrame, col, lit
from daft.functions import when

from xray.curate import Curated, Settings, curate, pipeline
from xray.curate.frame import drop, keeping
from xray.curate.step import Context
from xray.data.shards import INDEX, encode

EVIL = "<script>alert('caption')</script> \"quoted\" & co"
WHY = "3 copies: tag 'thing' is on 2 samples"
Row = dict[str, Any]
Change = Callable[[Row], Row]


def source_rows() -> list[Row]:
    """Twelve samples, "000" to "011"."""
    rows: list[Row] = [
        {"caption": f"a drawing of thing number {number}", "tags": ["hash", "drawing", f"thing {number % 3}"]}
        for number in range(12)
    ]
    rows[0] |= {"caption": EVIL, "tags": ["hash", EVIL], "identity": EVIL}
    rows[1] |= {"caption": "see www.example.com a dog\u200b", "tags": ["hash", "Dogs"], "source": "other"}
    rows[2] |= {"media": "clip", "tags": ["hash"]}
    return rows


def picture(row: Row) -> Row:
    """What decoding measures of a sample, and its pixels; "011" cannot be decoded."""
    number, frames = int(row["id"]), 3 if row["media"] == "clip" else 1
    if number == 11:
        return {"data": None, "extension": None, "width": None, "height": None, "frames": None}
    pixels = np.full((frames, 30, 40, 3), 8 * number, np.uint8)
    data, extension = encode(pixels, row["media"])
    return {"data": data, "extension": extension, "width": 40, "height": 30, "frames": frames, "pixels": row["id"]}


def cleaned(row: Row) -> Row:
    return {"caption": "a dog"} if row["id"] == "001" else {}


def canonical(row: Row) -> Row:
    return {"tags": ["dog" if tag == "Dogs" else tag for tag in row["tags"]]}


def without_hash(row: Row) -> Row:
    return {"tags": [tag for tag in row["tags"] if tag != "hash"]}


def matched(row: Row) -> Row:
    return {"entries": [0, int(row["id"])] if row["id"] != "000" else []}


def balanced(row: Row) -> Row:
    copies = {"003": 3, "004": 0, "005": 2, "006": 2}.get(row["id"], 1)
    return {"copies": copies, "probability": float(copies)}


def halved(row: Row) -> Row:
    """ "005" is for testing, and no test sample is replicated."""
    return {"split": "test", "copies": 1} if row["id"] == "005" else {"split": "train"}


# what each step changes, which samples leave, and what it has to tell
STEPS: dict[str, tuple[Change | None, dict[str, tuple[str, str | None]], dict[str, Any]]] = {
    "read": (None, {}, {"kind": "table", "files": 1, "columns": {"caption": "text"}, "unused_columns": [EVIL]}),
    "decode": (
        picture,
        {"011": ("not an image", f"cannot identify {EVIL}")},
        {"static_clips": {"count": 1, "examples": ["006"]}},
    ),
    "clean_text": (
        cleaned,
        {},
        {"boilerplate": [[EVIL, 40]], "affixes": [["set", "end", EVIL, 3]], "replaced": 1, "emptied": 0, "changed": 1},
    ),
    "canonical_tags": (
        canonical,
        {},
        {"canonical": {"before": 6, "after": 5, "examples": [["Dogs", "dog", 1], [EVIL, "x", 1]]}},
    ),
    "stop_tags": (
        without_hash,
        {},
        {"stop_tags": [{"tag": "hash", "source": "set", "count": 11, "share": 1.0, "told": 0.01}, {"tag": EVIL}]},
    ),
    "exact_duplicates": (
        None,
        {"010": ("the same pixels as another", "009"), "009": ("the same pixels as another", "003")},
        {"groups": 1, "largest": 3, "examples": [["003", "009", "010"]]},
    ),
    "near_duplicates": (None, {"008": ("nearly the same picture as another", "004")}, {}),
    "decontaminate": (
        None,
        {},
        {"evaluation": [{"set": EVIL, "samples": 70, "hashes": 60, "long_captions": 5}]},
    ),
    "agreement": (None, {}, {"scored": 8, "threshold": 0.5, "histogram": [[-0.4, 2], [0.1, 4], [0.6, 2]]}),
    "match": (matched, {}, {"entries": 12, "top": [[EVIL, 8], ["dog", 1]]}),
    "balance": (balanced, {"004": ("in no rare entry", None)}, {"captions": {"threshold": 4}}),
    "split": (halved, {}, {}),
}


def finished_run(out: Path, monkeypatch: pytest.MonkeyPatch, *, skipped: tuple[str, ...] = ()) -> Curated:
    """A curation of `source_rows` by `STEPS`; those in `skipped` pass everything through and tell nothing."""
    replace_steps(monkeypatch, skipped)
    return curate("the source", out, Settings(progress=False))


def replace_steps(monkeypatch: pytest.MonkeyPatch, skipped: tuple[str, ...] = ()) -> list[str]:
    """Put `STEPS` in the place of the pipeline's; the list names those that ran.

    Where it holds "stop at NAME", that step is interrupted.
    """
    ran: list[str] = []
    steps = []
    for step in pipeline.STEPS:
        change, leaving, facts = STEPS.get(step.name, (None, {}, {}))
        if step.name in skipped:
            change, leaving, facts = None, {}, {}
        run = _running(step.name, change, leaving, facts, ran)
        steps.append(replace(step, run=run, reads=("seed",), inputs=None))
    monkeypatch.setattr(pipeline, "STEPS", tuple(steps))
    return ran


def _running(
    name: str, change: Change | None, leaving: dict[str, tuple[str, str | None]], facts: dict[str, Any], ran: list[str]
) -> Callable[[DataFrame | None, Context], DataFrame]:
    def run(frame: DataFrame | None, context: Context) -> DataFrame:
        if f"stop at {name}" in ran:
            raise KeyboardInterrupt
        ran.append(name)
        context.facts.update(facts)
        (context.folder / INDEX).write_bytes(b"")  # the last step's is published
        if frame is None:
            frame = frame_of(source_rows())
        if change is not None:
            frame = frame_of([{**row, **change(row)} for row in frame.to_pylist()])
        frame = keeping(frame)
        if name == "balance" and change is not None:  # it says why it copies
            why = when(col("id") == lit("003"), lit(WHY)).otherwise(col("detail"))
            frame = frame.with_column("detail", why)
        for id, (reason, detail) in leaving.items():
            frame = drop(frame, col("id") == lit(id), reason, lit(detail) if detail else None)
        return frame

    return run
