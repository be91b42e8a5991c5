"""How well the agreement step finds swapped captions, given a CLIP checkpoint.

    python -m bench.swapped_captions OUT [--sets shapes emoji openclipart] [--cache FOLDER]

A clean set is cut in two by identity. A small CLIP is trained on the one part, then a tenth of the captions of either
part are swapped (`tests/dirt.py`) and both go through `xray curate`: the part that the model has seen clean, and one
that it has not seen. The curve says which recall goes with which precision as `agreement`, the share that is dropped,
grows; openclipart is not clean by itself, so what is found there and was not swapped may be right all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from bench import results
from xray import data, train
from xray.curate import Settings, agreement, curate
from xray.data.clean import split_of
from xray.data.folder import METADATA, write_metadata
from xray.train import recipes

sys.path.append(str(results.ROOT / "tests"))
import dirt

RESULT = results.RESULTS / "swapped_captions.json"
SHARE = 0.1  # swapped
PRECISIONS = (0.95, 0.9, 0.8, 0.7, 0.5)
HELD_OUT = 0.25  # of identities


@dataclass(frozen=True)
class CleanSet:
    """A set and the recipe that learns it."""

    folder: Callable[[Path, str | None], Path]
    recipe: train.Recipe


SETS = {
    "shapes": CleanSet(
        lambda out, cache: out if out.exists() else dirt.shapes_folder(out, 4000, seed=1, image_size=64),
        replace(recipes.clip_tiny(), steps=400, batch_size=64, clip_fraction=0.0),
    ),
    "emoji": CleanSet(
        lambda out, cache: data.fetch("fluent-emoji-anim", cache),
        replace(recipes.clip_tiny(), steps=600, batch_size=64, clip_fraction=1.0, vocab_size=2048),
    ),
    "openclipart": CleanSet(
        lambda out, cache: data.fetch("openclipart", cache),
        replace(recipes.clip_tiny(), steps=600, batch_size=64, clip_fraction=0.0, vocab_size=2048),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Swapped captions found by a CLIP checkpoint.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--cache", default=None)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for name in given.sets:
        out = given.out / name
        parts = cut(SETS[name].folder(out / "clean", given.cache), out)
        checkpoint = trained(SETS[name].recipe, parts["seen"], out)
        found[name] = {part: measured(folder, out, checkpoint) for part, folder in parts.items()}
        print(name, {part: some["recall at precision"] for part, some in found[name].items()}, flush=True)
        write(found)


def cut(clean: Path, out: Path) -> dict[str, Path]:
    """Two folders of links, "seen" and "held out", with the rows of the metadata that name their files."""
    parts = {"seen": out / "seen", "held out": out / "held_out"}
    rows = [json.loads(line) for line in (clean / METADATA[1]).read_text(encoding="utf-8").splitlines()]
    for part, folder in parts.items():
        shutil.rmtree(folder, ignore_errors=True)
        split = "train" if part == "seen" else "test"
        own = [row for row in rows if split_of(row.get("identity") or row["file_name"], 0, HELD_OUT) == split]
        for row in own:
            path = folder / row["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to((clean / row["file_name"]).absolute())
        write_metadata(folder, own)
    return parts


def settings(**more: Any) -> Settings:
    return Settings(max_side=72, max_frames=4, balance="none", progress=False, **more)


def trained(recipe: train.Recipe, folder: Path, out: Path) -> Path:
    """The run of a model trained on the clean part, curated but for what needs a model."""
    curate(folder, out / "train", settings(test_share=0.0))
    run = out / "run"
    if not (run / agreement.WEIGHTS).is_file():
        train.run(
            replace(recipe, data=str(out / "train"), out=str(run), resume="auto", tensorboard=False, progress=False)
        )
    return run


def measured(clean: Path, out: Path, checkpoint: Path) -> dict[str, Any]:
    """Precision and recall on a part with swapped captions, of all shares dropped and of the one that was swapped."""
    dirty, curated = out / f"dirty_{clean.name}", out / f"curated_{clean.name}"
    shutil.rmtree(dirty, ignore_errors=True)
    truth = dirt.soil(clean, dirty, share=SHARE, kinds=("swapped",))
    curate(dirty, curated, settings(checkpoint=str(checkpoint), agreement=SHARE))
    (step,) = (curated / "steps").glob("*-agreement-*")
    table = pq.read_table(step / "rows", columns=["id", "agreement", "reason"]).to_pydict()
    scored = [row for row in zip(*table.values(), strict=True) if row[1] is not None]
    swapped = np.array([id.split(":", 1)[1] in truth.kind for id, _, _ in scored])
    scores = np.array([score for _, score, _ in scored])
    dropped = np.array([reason is not None for _, _, reason in scored])
    recall, precision = curve(scores, swapped)
    thin = slice(None, None, max(1, len(recall) // 50))
    at = {str(least): float(recall[precision >= least].max(initial=0.0)) for least in PRECISIONS}
    return {
        "pairs": len(scored),
        "swapped": int(swapped.sum()),
        "recall at precision": at,
        "dropped": {
            "share": float(dropped.mean()),
            "recall": float(swapped[dropped].sum() / swapped.sum()),
            "precision": float(swapped[dropped].mean()),
        },
        "curve": [[round(float(r), 4), round(float(p), 4)] for r, p in zip(recall[thin], precision[thin], strict=True)],
    }


def curve(scores: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision of dropping all up to each distinct score, lowest first."""
    order = np.argsort(scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) > 0, True))
    hits = np.cumsum(wanted[order])[last]
    return hits / wanted.sum(), hits / (last + 1)


def write(found: dict[str, Any]) -> None:
    """All numbers so far."""
    content = {
        "device_name": results.device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": results.commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "sets": found,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
