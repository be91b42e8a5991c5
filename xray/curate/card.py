"""The data card: one HTML page with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from xray.curate.step import Finished


def write(path: Path, source: str, folders: Mapping[str, Path], finished: Sequence[Finished]) -> None:
    """Write the card."""
