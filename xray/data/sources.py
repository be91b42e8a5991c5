"""The public sets that `fetch` brings, each turned into a folder that `pack` takes.

openclipart         6,900 clip-art images with titles and tags, public domain (Debian)
fluent-emoji-anim   3,391 animated emoji as clips, some still, MIT (npm); named by emojibase
emojibase           names, tags and groups of emoji, MIT (npm)
wordnet             names of things and how they are related, Princeton's WordNet 3.0 licence (Debian)
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from xray.data import emoji, openclipart
from xray.data.archives import open_deb, unpack
from xray.data.download import Download, apt, npm
from xray.data.errors import DataError
from xray.data.shards import folder_errors

EMOJIBASE = ("emojibase-data", "17.0.0")
FLUENT_EMOJI = [(f"@lobehub/fluent-emoji-anim-{part}", "1.0.0") for part in (1, 2, 3, 4)]
FORMAT = "2"  # of the folders; another number makes them anew from the downloads
COMPLETE = ".complete.json"


def fetch(name: str, cache: str | Path | None = None, progress: bool = True) -> Path:
    """Bring a public set into the cache, or find it there.

    Args:
        name: "openclipart", "fluent-emoji-anim", "emojibase" or "wordnet".
        cache: folder for downloads and unpacked sets; None takes `default_cache()`.
        progress: say on stderr what is being done.

    Returns:
        The set's folder; `pack` takes it (emojibase and wordnet hold names only, no pictures).

    Raises:
        DataError: an unknown name, or a cache that cannot be written.
        SourceUnavailable: a client or registry is missing; its sentence says which.
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SOURCES)}"
        raise DataError(f"the source {name!r} is unknown; {hint}")
    return SOURCES[name](Path(cache) if cache is not None else default_cache(), progress)


def default_cache() -> Path:
    """Where fetched sets are kept: $XRAY_CACHE, else the folder `xray` of the user's cache folder."""
    if os.environ.get("XRAY_CACHE"):
        return Path(os.environ["XRAY_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xray"


def _openclipart(cache: Path, progress: bool) -> Path:
    images, texts = (apt(f"openclipart-{kind}", cache, progress=progress) for kind in ("png", "svg"))
    return _make(
        cache,
        "openclipart",
        [images, texts],
        lambda folder: openclipart.convert(images[0], texts[0], folder),
        progress,
    )


def _fluent_emoji(cache: Path, progress: bool) -> Path:
    names = fetch("emojibase", cache, progress)
    parts = [npm(package, version, cache, progress=progress) for package, version in FLUENT_EMOJI]
    return _make(
        cache,
        "fluent-emoji-anim",
        parts,
        lambda folder: emoji.convert([path for path, _ in parts], names, folder),
        progress,
    )


def _emojibase(cache: Path, progress: bool) -> Path:
    package, version = EMOJIBASE
    download = npm(package, version, cache, progress=progress)
    return _make(cache, "emojibase", [download], lambda folder: emoji.unpack_names(download[0], folder), progress)


def _wordnet(cache: Path, progress: bool) -> Path:
    download = apt("wordnet-base", cache, progress=progress)
    return _make(cache, "wordnet", [download], lambda folder: _unpack_wordnet(download[0], folder), progress)


def _unpack_wordnet(package: Path, folder: Path) -> None:
    """The database's files and its licence, without folders."""
    wanted = (PurePosixPath("usr/share/wordnet"), PurePosixPath("usr/share/doc/wordnet-base/copyright"))
    with open_deb(package) as tar:
        unpack(tar, folder, lambda path: PurePosixPath(path.name) if {path, path.parent} & set(wanted) else None)


SOURCES: dict[str, Callable[[Path, bool], Path]] = {
    "openclipart": _openclipart,
    "fluent-emoji-anim": _fluent_emoji,
    "emojibase": _emojibase,
    "wordnet": _wordnet,
}


def _make(
    cache: Path,
    name: str,
    downloads: list[tuple[Path, Download]],
    convert: Callable[[Path], None],
    progress: bool,
) -> Path:
    """The unpacked set `cache/name`, made anew unless it is whole and from these very downloads."""
    target = cache / name
    facts = {"format": FORMAT, **{record.file: record.sha256 for _, record in downloads}}
    try:
        if json.loads((target / COMPLETE).read_text(encoding="utf-8")) == facts:
            return target
    except (OSError, ValueError):
        pass
    if progress:
        print(f"unpacking {name}", file=sys.stderr, flush=True)
    with folder_errors(cache):
        draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
        try:
            convert(draft)
            (draft / COMPLETE).write_text(json.dumps(facts), encoding="utf-8")
            os.chmod(draft, 0o755)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return target
