"""The steps in their order, each computed once into a folder of its own.

    OUT/steps/run.json                   the source
    OUT/steps/03-clean_text-5f0c.../     a finished step: its table as Parquet, `done.json`, what else it made
    OUT/steps/.04-canonical_tags/        the running one; a run that ended meanwhile leaves it, the next one removes it
    OUT/*.tar index.parquet ...          the dataset, published from the last step; the index is there last

A step's folder carries a fingerprint of all that decides its content: the code's version, its settings, the files it
reads, and the fingerprint of the step before. What has one already is not computed again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import daft
from daft import DataFrame, col

import xray
from xray.curate import (
    agreement,
    balance,
    card,
    decontaminate,
    duplicates,
    engine,
    ledger,
    matching,
    media,
    read,
    shards,
    split,
    tags,
    text,
)
from xray.curate.frame import kept
from xray.curate.settings import Settings
from xray.curate.step import DONE, FOLDER, ROWS, SCRATCH, Context, Finished, Step, load, stored
from xray.data.errors import DataError
from xray.data.shards import INDEX, LEDGER, folder_errors

RUN = "run.json"
CARD = "card.html"
# ENOSPC, EDQUOT and EFBIG as Rust words them
FULL_DISK = ("os error 28", "os error 122", "os error 27", "No space left")
STEPS: tuple[Step, ...] = (
    read.STEP,
    media.STEP,
    text.STEP,
    tags.CANONICAL,
    tags.STOPLIST,
    duplicates.EXACT,
    duplicates.NEAR,
    duplicates.TEXT,
    decontaminate.STEP,
    agreement.STEP,
    matching.STEP,
    balance.STEP,
    split.STEP,
    shards.STEP,
)


@dataclass(frozen=True)
class Curated:
    """What a curation did.

    Attributes:
        out: the dataset folder.
        steps: the finished steps, in order.
        computed: names of those that this call computed; the others were there already.
    """

    out: Path
    steps: list[Finished]
    computed: list[str]

    def __str__(self) -> str:
        return ledger.table(self.steps, self.computed)


def curate(source: str | Path, out: str | Path, settings: Settings | None = None) -> Curated:
    """Make a dataset of clean, balanced, deduplicated samples of whatever `source` holds.

    It can be stopped at any time and called again: finished steps are kept, and only what has changed is computed.

    Args:
        source: a Parquet, CSV or JSONL table (or a pattern of several), WebDataset shards, a folder of images and
            clips; a path or URL.
        out: the folder to make or to go on with.
        settings: see `Settings`.

    Returns:
        `Curated`, which prints as a table of the steps.

    Raises:
        DataError: a bad setting, a source that cannot be read or is empty, an `out` that holds something else, is in
            use or cannot be written, nothing left to write.
    """
    settings = settings or Settings()
    out = Path(out).absolute()
    source = str(source)
    engine.start(settings.engine, settings.address)
    with folder_errors(out), _claimed(out, source), _engine_errors():
        folders: dict[str, Path] = {}
        finished: list[Finished] = []
        computed: list[str] = []
        for number, step in enumerate(STEPS):
            fingerprint = _fingerprint(step, source, settings, finished[-1].fingerprint if finished else "")
            folder = out / FOLDER / f"{number:02d}-{step.name}-{fingerprint[:12]}"
            if not _is_done(folder, fingerprint):
                _say(f"{step.name}", settings)
                draft = out / FOLDER / f".{number:02d}-{step.name}"
                context = Context(source, settings, draft, dict(folders))
                before = stored(folders[STEPS[number - 1].name] / ROWS) if number else None
                _compute(step, context, before, fingerprint)
                os.replace(draft, folder)
                computed.append(step.name)
            folders[step.name] = folder
            finished.append(load(folder))
            if finished[-1].rows_out == 0:
                raise DataError(f"nothing of {source} is left after {step.name}; {_why(finished)}")
        _publish(out, source, settings, folders, finished)
        _remove_others(out / FOLDER, set(folders.values()))
    return Curated(out, finished, computed)


def _fingerprint(step: Step, source: str, settings: Settings, before: str) -> str:
    parts = {
        "step": [step.name, step.version],
        "settings": settings.only(step.reads),
        "inputs": step.inputs(source, settings) if step.inputs else None,
        "before": before,
        "versions": [xray.__version__, daft.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _is_done(folder: Path, fingerprint: str) -> bool:
    try:
        return load(folder).fingerprint == fingerprint
    except (OSError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
        return False


def _compute(step: Step, context: Context, before: DataFrame | None, fingerprint: str) -> None:
    """Run one step into its folder, which is whole once `done.json` is in it."""
    folder = context.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    frame = step.run(None if before is None else kept(before), context)
    frame.write_parquet(str(folder / ROWS), write_mode="append")
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    counts = stored(folder / ROWS).groupby("reason").agg(col("id").count().alias("count")).to_pydict()
    by_reason = dict(zip(counts["reason"], counts["count"], strict=True))
    rows_out = by_reason.pop(None, 0)
    done = Finished(
        name=step.name,
        fingerprint=fingerprint,
        rows_in=rows_out + sum(by_reason.values()),
        rows_out=rows_out,
        reasons=dict(sorted(by_reason.items(), key=lambda item: (-item[1], item[0]))),
        seconds=time.perf_counter() - began,
        facts=context.facts,
    )
    (folder / DONE).write_text(json.dumps(asdict(done), indent=1, ensure_ascii=False), encoding="utf-8")


def _why(finished: Sequence[Finished]) -> str:
    """Which reasons emptied the set."""
    reasons = [f"{count:,} {reason}" for done in finished for reason, count in done.reasons.items()]
    return f"dropped: {', '.join(reasons)}" if reasons else "it is empty"


def _publish(
    out: Path, source: str, settings: Settings, folders: dict[str, Path], finished: Sequence[Finished]
) -> None:
    """Put the last step's shards, the ledger, the card and, last of all, the index into `out`."""
    mark = out / FOLDER / "published.json"
    fingerprint = json.dumps(finished[-1].fingerprint)
    if (out / INDEX).is_file() and mark.is_file() and mark.read_text() == fingerprint:
        return
    for path in (out / INDEX, mark, *sorted(out.glob("*.tar"))):
        path.unlink(missing_ok=True)
    made = folders[STEPS[-1].name]
    for shard in sorted(made.glob("*.tar")):
        _link(shard, out / shard.name)
    ledger.write(out / LEDGER, folders)
    card.write(out / CARD, source, settings, folders, finished)
    _link(made / INDEX, out / INDEX)
    mark.write_text(fingerprint)


def _link(made: Path, published: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(made, published)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copyfile(made, published)


def _remove_others(folder: Path, current: set[Path]) -> None:
    """Remove steps of earlier settings; what the current ones need stays."""
    for path in folder.iterdir():
        if path.is_dir() and path not in current:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _claimed(out: Path, source: str) -> Iterator[None]:
    """Make `out` or see that it is of the same source, and keep other runs out of it."""
    run = out / FOLDER / RUN
    if out.is_dir() and any(out.iterdir()) and not run.is_file():
        raise DataError(f"{out} holds files that no curation made; name a new or empty folder, or remove it first")
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    if run.is_file():
        known = _source_of(run)
        if known != source:
            raise DataError(
                f"{out} holds the curation of {known}, not of {source}; name another folder or remove it first"
            )
    else:
        draft = run.with_name(f".{RUN}")
        draft.write_text(json.dumps({"source": source}), encoding="utf-8")
        os.replace(draft, run)
    with open(run, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out} is in use by another run; wait for it or name another folder") from error
        yield


def _source_of(run: Path) -> str:
    try:
        return str(json.loads(run.read_text(encoding="utf-8"))["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run} is damaged ({error}); remove {run.parent.parent} and curate anew") from error


@contextmanager
def _engine_errors() -> Iterator[None]:
    """Daft reports what the operating system refused as errors of its own: make a full disk one again."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if any(sign in str(error) for sign in FULL_DISK):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _say(message: str, settings: Settings) -> None:
    if settings.progress:
        print(message, file=sys.stderr, flush=True)
