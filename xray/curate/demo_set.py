"""The dataset of the demo: what public sets can be reached, curated into one folder of images and clips."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xray.curate.pipeline import curate
from xray.curate.settings import Settings
from xray.data.errors import DataError, SourceUnavailable
from xray.data.shapes import generated
from xray.data.shards import INDEX
from xray.data.sources import fetch

SETS = ("openclipart", "fluent-emoji-anim")  # images and clips
GENERATED_FOR_ONE = 5_000  # generated samples in place of one missing set
VERSION = 2  # another number makes the demo's data anew
NOTE = "demo.json"


@dataclass(frozen=True)
class DemoSet:
    """The demo's dataset.

    Attributes:
        folder: with shards and index.
        missing: public sets that could not be reached; generated samples stand in for them.
    """

    folder: Path
    missing: list[str]


def prepare_demo(
    out: str | Path,
    cache: str | Path | None = None,
    *,
    max_side: int = 72,
    max_frames: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> DemoSet:
    """Fetch and curate the demo's data, or find it made already.

    A set that cannot be fetched is named on stderr and its share is generated, so that there are always
    images and clips.

    Args:
        out: the dataset folder.
        cache: see `fetch`.
        max_side: see `Settings`.
        max_frames: likewise.
        seed: likewise.
        progress: show what is being done.

    Raises:
        DataError: `out` holds something else or cannot be written.
    """
    out = Path(out)
    wanted = {"version": VERSION, "max_side": max_side, "max_frames": max_frames, "seed": seed}
    if (out / INDEX).is_file():
        found = _note(out)
        if {key: found.get(key) for key in wanted} == wanted:
            _tell(f"{out} is made already; remove it to make it anew")
            return DemoSet(out, list(found["missing"]))
        raise DataError(f"{out} holds another dataset; remove it or name another folder")
    folders, missing = [], []
    for name in SETS:
        try:
            folders.append(str(fetch(name, cache, progress)))
        except (SourceUnavailable, DataError) as error:
            missing.append(name)
            _tell(f"going on without {name}: {error}")
    size = GENERATED_FOR_ONE * len(missing)
    if not folders:  # clean by design: there is nothing to curate
        generated(out, size, seed, image_size=max_side, num_frames=max(2, max_frames))
    else:
        if missing:
            shapes = out.with_name(f"{out.name}-generated")
            folders.append(str(generated(shapes, size, seed, image_size=max_side, num_frames=max(2, max_frames))))
        settings = Settings(
            seed=seed,
            max_side=max_side,
            max_frames=max_frames,
            wordnet=_wordnet(cache, progress),
            balance="none",
            progress=progress,
        )
        done = curate(",".join(folders), out, settings)
        if progress:
            _tell(str(done))
    (out / NOTE).write_text(json.dumps({**wanted, "missing": missing}), encoding="utf-8")
    return DemoSet(out, missing)


def _wordnet(cache: str | Path | None, progress: bool) -> str:
    """The setting `wordnet`: its folder in the cache, or "off" where it cannot be fetched."""
    try:
        return str(fetch("wordnet", cache, progress))
    except (SourceUnavailable, DataError) as error:
        _tell(f"going on without wordnet: {error}")
        return "off"


def _note(out: Path) -> dict[str, Any]:
    """What is known of a set made before, empty if nothing."""
    try:
        found = json.loads((out / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("missing"), list) else {}


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
