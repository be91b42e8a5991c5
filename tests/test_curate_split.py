"""The split by identity."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import daft
import numpy as np
import pyarrow as pa
import pytest
from curate_frames import context_for, frame_of, rows_of
from daft import col, lit

from xray.curate.duplicates import near_duplicates
from xray.curate.frame import kept
from xray.curate.split import hexadecimal, split_by_identity
from xray.data.clean import split_of

FAR = 0x0F0F_0000_FFFF_3333


def identities(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, str]:
    """The identity of each sample; the same whatever the order of the rows."""
    rows = [{"id": f"{number:03d}", **row} for number, row in enumerate(rows)]
    found = []
    for turn in range(2):
        done = rows_of(split_by_identity(frame_of(rows), context_for(folder / f"split-{turn}", **settings)))
        assert all(row["reason"] is None for row in done.values())
        found.append({id: done[id]["identity"] for id in sorted(done)})
        rows = random.Random(0).sample(rows, len(rows))
    assert found[0] == found[1]
    return found[0]


def test_what_looks_alike_is_of_one_identity(tmp_path: Path) -> None:
    looks = [0b1000, 0b1111, FAR, FAR ^ 15, None]
    assert identities(tmp_path, [{"phash": look} for look in looks]) == {
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
        {"phash": None},
    ]
    found = identities(tmp_path, rows)
    assert [found[f"{number:03d}"] for number in range(5)] == ["bear"] * 5
    assert [found["005"], found["007"]] == ["owl", "007"]
    assert found["006"].startswith("looks:")


def test_identities_are_those_of_a_union_of_all_ties(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ["", "", "", *"abcdefghijkl"]
    rows: list[dict[str, Any]] = [
        {"phash": None if rng.random() < 0.2 else int(rng.integers(0, 2**11)) << 30, "identity": str(rng.choice(names))}
        for _ in range(120)
    ]
    tied = np.eye(len(rows), dtype=bool)
    for one, a in enumerate(rows):
        for other, b in enumerate(rows):
            near = None not in (a["phash"], b["phash"]) and (a["phash"] ^ b["phash"]).bit_count() <= 1
            tied[one, other] |= near or (a["identity"] == b["identity"] != "")
    for _ in rows:
        tied = tied @ tied
    found = identities(tmp_path, rows, near_bits=1)
    names_of = np.array([found[f"{number:03d}"] for number in range(len(rows))])
    assert ((names_of[:, None] == names_of[None]) == tied).all()
    assert len(set(found.values())) > 10
    for number, row in enumerate(rows):
        given = [other["identity"] for at, other in enumerate(rows) if tied[number, at] and other["identity"]]
        looks = [other["phash"] for at, other in enumerate(rows) if tied[number, at] and other["phash"] is not None]
        default = f"looks:{min(looks):016x}" if looks else f"{number:03d}"
        assert found[f"{number:03d}"] == (min(given) if given else default), row


def test_one_identity_is_on_one_side_and_test_samples_come_once(tmp_path: Path) -> None:
    rows = [{"phash": None, "identity": f"{number % 60}" if number % 3 else "", "copies": 4} for number in range(200)]
    for seed in (0, 1):
        context = context_for(tmp_path / f"{seed}", seed=seed, test_share=0.4)
        done = rows_of(split_by_identity(frame_of(rows), context))
        assert all(row["split"] == split_of(row["identity"], seed, 0.4) for row in done.values())
        assert all(row["copies"] == (1 if row["split"] == "test" else 4) for row in done.values())
        assert {row["split"] for row in done.values()} == {"train", "test"}
        assert context.facts["identities"] == len({row["identity"] for row in done.values()})


@pytest.mark.parametrize(("share", "split"), [(0.0, "train"), (1.0, "test")])
def test_all_on_one_side(share: float, split: str, tmp_path: Path) -> None:
    done = rows_of(split_by_identity(frame_of([{"phash": 1}, {}]), context_for(tmp_path, test_share=share)))
    assert {row["split"] for row in done.values()} == {split}


def test_an_identity_of_many_samples_is_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"phash": 5}] * 20 + [{"identity": "fox"}] * 10 + [{"phash": None}] * 300
    context = context_for(tmp_path)
    split_by_identity(frame_of(rows), context)
    assert context.facts == {
        "identities": 302,
        "large": [
            {"identity": name, "split": split_of(name), "samples": samples}
            for name, samples in (("looks:0000000000000005", 20), ("fox", 10))
        ],
    }


def test_what_was_tied_by_a_dropped_sample_stays_tied(tmp_path: Path) -> None:
    """Of three pictures in a chain, the middle one leaves as a duplicate before the split."""
    measures = {"width": 1, "height": 1, "frames": 1, "pixels": None}
    near = context_for(tmp_path / "near")
    rows = [{"phash": look, **measures} for look in (0, 0b111, 0b111111)]
    near_duplicates(frame_of(rows), near)
    context = dataclasses.replace(context_for(tmp_path / "split"), earlier={"near_duplicates": near.folder})
    left = frame_of(rows).where(col("id") != lit("001"))
    done = rows_of(split_by_identity(left, context))
    assert {row["identity"] for row in done.values()} == {"looks:0000000000000000"}


def test_nothing_comes_of_nothing(tmp_path: Path) -> None:
    whole = frame_of([{"identity": "fox", "copies": 2}, {}])
    context = context_for(tmp_path)
    done = split_by_identity(whole.where(col("id") == lit("none")), context)
    assert rows_of(kept(done)) == {}
    assert context.facts == {"identities": 0, "large": []}
    assert done.column_names == [*whole.column_names, "split", "reason", "detail"]


def test_hexadecimal_digits() -> None:
    numbers = [0, 1, 2**64 - 1, None, FAR]
    frame = daft.from_arrow(pa.table({"number": pa.array(numbers, pa.uint64())}))
    found = frame.select(hexadecimal(col("number"))).to_pydict()["number"]
    assert found == [None if number is None else f"{number:016x}" for number in numbers]
