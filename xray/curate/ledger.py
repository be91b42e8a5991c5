"""What happened to each sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from xray.curate.step import Finished


def write(path: Path, folders: Mapping[str, Path]) -> None:
    """Write the ledger: a row for every dropped or replicated sample."""


def table(steps: Sequence[Finished], computed: Collection[str]) -> str:
    """The steps, a line each: samples in and out, reasons, seconds."""
    return "\n".join(f"{done.name} {done.rows_in} {done.rows_out} {done.reasons}" for done in steps)


def explain(id: str, out: str | Path) -> str:
    """The story of one sample, step by step."""
    return ""
