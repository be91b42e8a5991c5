"""The split by identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curate_frames import context_for, frame_of, rows_of

from xray.curate.split import split_by_identity

FAR = 0x0F0F_0000_FFFF_3333


def identities(folder: Path, rows: list[dict[str, Any]], partitions: int = 1, **settings: Any) -> dict[str, str]:
    done = rows_of(split_by_identity(frame_of(rows, partitions=partitions), context_for(folder, **settings)))
    return {id: row["identity"] for id, row in done.items()}


def test_what_looks_alike_is_of_one_identity(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"phash": 0b1000},
        {"phash": 0b1111},
        {"phash": FAR},
        {"phash": FAR ^ 15},
        {"phash": None},
    ]
    assert identities(tmp_path, rows) == {
        "000": "looks:0000000000000008",
        "001": "looks:0000000000000008",
        "002": f"looks:{FAR:016x}",
        "003": f"looks:{FAR ^ 15:016x}",
        "004": "004",
    }


def test_given_identities_and_looks_join(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"phash": 1, "identity": "fox"},
        {"phash": 3, "identity": "bear"},  # looks like the fox
        {"phash": FAR, "identity": "bear"},
        {"phash": FAR ^ 1},  # looks like a bear
        {"phash": None, "identity": "fox"},
        {"phash": None, "identity": "owl"},
        {"phash": ~FAR & (2**62 - 1)},
    ]
    done = identities(tmp_path, rows)
    assert [done[f"{number:03d}"] for number in range(5)] == ["bear"] * 5
    assert done["005"] == "owl"
    assert done["006"].startswith("looks:")
    assert done == identities(tmp_path / "again", rows, partitions=5)
