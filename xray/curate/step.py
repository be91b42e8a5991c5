"""What a step of the pipeline is, and what it is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daft import DataFrame

from xray.curate import engine
from xray.curate.settings import Settings
from xray.data.errors import DataError

FOLDER = "steps"  # of a curation's output: a folder for each step
DONE = "done.json"
ROWS = "rows"
SCRATCH = "scratch"


@dataclass(frozen=True)
class Context:
    """What a step is given besides its frame.

    Attributes:
        source: what is curated: a table, shards, a folder; a path or URL.
        settings: of the whole run.
        folder: the running step's own folder, which every worker can write; what is put there stays with the step.
        earlier: folders of the finished steps, by name.
        facts: what the step has to tell, as JSON: thresholds found, tags taken out with their numbers, examples. The
            card shows it and `facts_of` gives it to later steps.
    """

    source: str
    settings: Settings
    folder: Path
    earlier: Mapping[str, Path]
    facts: dict[str, Any] = field(default_factory=dict)

    def keep(self, frame: DataFrame, name: str) -> DataFrame:
        """Compute a frame that is needed more than once, and read it back; it goes when the step ends."""
        return written(frame, self.folder / SCRATCH / name)

    def table(self, step: str) -> DataFrame:
        """All rows and columns of an earlier step's table, dropped samples among them."""
        return stored(self.earlier[step] / ROWS)

    def facts_of(self, step: str) -> dict[str, Any]:
        """What an earlier step had to tell."""
        return load(self.earlier[step]).facts


@dataclass(frozen=True)
class Step:
    """A named step.

    Attributes:
        name: in the ledger and in the table that `curate` prints.
        run: from the samples that the step before kept (None for the first step) to the same ones with `reason` and
            `detail`, all columns passed on that it does not know. It must not depend on the order of rows, on their
            partitions or on the number of workers.
        reads: the settings that decide what comes out.
        inputs: what else decides it, as JSON: digests of files.
        version: another number computes the step anew.
    """

    name: str
    run: Callable[[DataFrame | None, Context], DataFrame]
    reads: tuple[str, ...] = ()
    inputs: Callable[[str, Settings], Any] | None = None
    version: int = 1


@dataclass(frozen=True)
class Finished:
    """What is known of a step that is done; in its folder as JSON.

    Attributes:
        name: of the step.
        fingerprint: digest of all that decides what came out.
        rows_in: samples given to it; for the first step, rows of the source.
        rows_out: samples passed on.
        reasons: samples dropped, by reason, most first.
        seconds: taken.
        facts: see `Context`.
    """

    name: str
    fingerprint: str
    rows_in: int
    rows_out: int
    reasons: dict[str, int]
    seconds: float
    facts: dict[str, Any]


def load(folder: Path) -> Finished:
    """The record of the finished step in `folder`.

    Raises:
        OSError, ValueError: there is none, or it is damaged.
    """
    try:
        return Finished(**json.loads((folder / DONE).read_text(encoding="utf-8")))
    except TypeError as error:
        raise ValueError(f"{folder / DONE} lacks what is due ({error})") from error


def written(frame: DataFrame, folder: Path) -> DataFrame:
    """Compute a frame into Parquet files in `folder`, and the frame that reads them."""
    frame.write_parquet(str(folder), write_mode="append")
    return stored(folder)


def stored(folder: Path) -> DataFrame:
    """The frame of the Parquet files in `folder`."""
    return engine.daft.read_parquet([str(path) for path in sorted(folder.rglob("*.parquet"))])


def step_folders(out: str | Path) -> dict[str, Path]:
    """The folders of a curation's finished steps, by name and in order.

    Raises:
        DataError: `out` holds no curation, or two of which one did not finish.
    """
    found: dict[str, Path] = {}
    for folder in sorted((Path(out) / FOLDER).glob("[0-9]*-*-*")):
        try:
            name = load(folder).name
        except (OSError, ValueError):
            continue
        if name in found:
            raise DataError(f"{out} holds a curation that was stopped on its way to other settings; finish it first")
        found[name] = folder
    if not found:
        raise DataError(f"{out} holds no curation; name a folder that `xray curate` made")
    return found
