"""The dataset of the demo: what public sets can be reached, packed into one folder of images and clips."""

from __future__ import annotations

import sys
from pathlib import Path

from xray.data.errors import DataError, SourceUnavailable
from xray.data.packing import pack
from xray.data.shards import INDEX, read_facts
from xray.data.sources import fetch

SETS = ("openclipart", "fluent-emoji-anim")  # images and clips
GENERATED_FOR_ONE = 5_000  # generated samples in place of one missing set
VERSION = "1"  # another number packs the demo's data anew


def prepare_demo(
    out: str | Path,
    cache: str | Path | None = None,
    *,
    max_side: int = 72,
    max_frames: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Fetch and pack the demo's data, or find it packed already.

    A set that cannot be fetched is named on stderr and its share is generated, so that there are always
    images and clips.

    Args:
        out: the dataset folder.
        cache: see `fetch`.
        max_side: see `pack`.
        max_frames: likewise.
        seed: likewise.
        progress: show what is being done.

    Returns:
        `out` as a path.

    Raises:
        DataError: `out` holds something else or cannot be written.
    """
    out = Path(out)
    facts = {"demo": VERSION, "max_side": str(max_side), "max_frames": str(max_frames), "seed": str(seed)}
    if (out / INDEX).is_file():
        found = read_facts(out)
        if all(found.get(key) == value for key, value in facts.items()):
            _tell(f"{out} is packed already ({found.get('sets', 'unknown sets')}); remove it to pack anew")
            return out
        raise DataError(f"{out} holds another dataset; remove it or name another folder")
    folders, missing = [], []
    for name in SETS:
        try:
            folders.append(fetch(name, cache, progress))
        except (SourceUnavailable, DataError) as error:
            missing.append(name)
            _tell(f"going on without {name}: {error}")
    sets = [name for name in SETS if name not in missing] + ["generated"] * bool(missing)
    packed = pack(
        folders,
        out,
        max_side=max_side,
        max_frames=max_frames,
        seed=seed,
        generated_size=GENERATED_FOR_ONE * len(missing),
        facts={"demo": VERSION, "sets": ", ".join(sets)},
        progress=progress,
    )
    if progress:
        _tell(str(packed))
    return out


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
