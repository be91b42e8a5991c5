"""Balancing: what stays of captions and tags, by which draws, with which probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import daft
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_frames import context_for, frame_of, rows_of
from daft import DataFrame, col, lit

from xray.curate import balance, matching
from xray.curate.balance import FREQUENT, UNMATCHED, uniform
from xray.curate.frame import key_of
from xray.curate.step import Context


def context_with(folder: Path, entries: Sequence[str], **settings: Any) -> Context:
    """A context whose matching was against these entries."""
    matched = folder / "match"
    matched.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"entry": pa.array(entries, pa.string())}), matched / matching.ENTRIES)
    return replace(context_for(folder / "balance", **settings), earlier={"match": matched})


def balanced(folder: Path, rows: list[dict[str, Any]], entries: int, **settings: Any) -> dict[str, dict[str, Any]]:
    """The rows after balancing against so many entries, e0, e1, ..."""
    rows = [{"entries": [], **row} for row in rows]
    context = context_with(folder, [f"e{entry}" for entry in range(entries)], **settings)
    return rows_of(balance.balance(frame_of(rows), context))


def large_frame(lists: Sequence[Sequence[int]]) -> DataFrame:
    """Pairs whose captions hold these entries."""
    rows = len(lists)
    table = {
        "id": [f"{number:07d}" for number in range(rows)],
        "media": ["image"] * rows,
        "caption": ["a caption"] * rows,
        "tags": pa.array([[]] * rows, pa.list_(pa.string())),
        "entries": pa.array(lists, pa.list_(pa.int32())),
    }
    return daft.from_arrow(pa.table(table)).with_column("key", key_of(col("id")))


def drawn(folder: Path, lists: Sequence[Sequence[int]], **settings: Any) -> tuple[pa.Table, dict[str, Any]]:
    """The table in the order of `lists`, and the facts, after balancing pairs whose captions hold these entries."""
    entries = max(max(entries, default=0) for entries in lists) + 1
    context = context_with(folder, [f"e{entry}" for entry in range(entries)], **settings)
    frame = balance.balance(large_frame(lists), context).sort("id")
    return frame.select("id", "entries", "probability", "copies", "reason").to_arrow(), context.facts["captions"]


def kept_counts(table: pa.Table) -> Counter[int]:
    """Pairs left of each entry."""
    copies = table["copies"].to_pylist()
    return Counter(
        entry for entries, n in zip(table["entries"].to_pylist(), copies, strict=True) if n for entry in entries
    )


SINGLE = [entry for entry, count in enumerate([40_000, 12_000, 6_000, 5_000, 4_999, 300, 7, 1]) for _ in range(count)]


def test_heads_end_at_t_and_tails_are_whole(tmp_path: Path) -> None:
    for seed in range(2):
        table, facts = drawn(tmp_path / str(seed), [[entry] for entry in SINGLE], threshold=5_000, seed=seed)
        left = kept_counts(table)
        for head in (0, 1, 2):
            assert abs(left[head] - 5_000) < 0.05 * 5_000
        assert [left[tail] for tail in (3, 4, 5, 6, 7)] == [5_000, 4_999, 300, 7, 1]
        assert facts["head_entries"] == 3
        assert facts["tail_share"] == pytest.approx((4_999 + 308) / len(SINGLE))
        assert facts["copies"] == sum(left.values())
        assert facts["expected"] == pytest.approx(3 * 5_000 + 5_000 + 4_999 + 308)
        assert facts["after"]["entropy"] > facts["before"]["entropy"] + 0.5


def test_seeds_differ_and_a_seed_never_does(tmp_path: Path) -> None:
    lists = [[entry] for entry in SINGLE[::20]]
    frame = large_frame(lists)

    def ids(name: str, frame: DataFrame, seed: int) -> set[str]:
        entries = [f"e{entry}" for entry in range(8)]
        out = balance.balance(frame, context_with(tmp_path / name, entries, threshold=50, seed=seed))
        return set(out.where(col("copies") > lit(0)).to_pydict()["id"])

    first = ids("first", frame, 3)
    shuffled = frame.sort(col("key")).to_arrow()
    for part in range(5):  # each file is read, and drawn for, on its own
        (tmp_path / "parts").mkdir(exist_ok=True)
        pq.write_table(shuffled.slice(part * 700, 700 if part < 4 else None), tmp_path / "parts" / f"{part}.parquet")
    parts = daft.read_parquet(str(tmp_path / "parts" / "*.parquet"))
    assert parts.count_rows() == len(lists)
    assert ids("again", frame, 3) == first
    assert ids("parts", parts, 3) == first
    other = ids("other", frame, 4)
    assert len(first & other) < 0.6 * len(first)


def test_an_entry_draws_alike_whatever_its_number(tmp_path: Path) -> None:
    rows = 2_000
    one = balance.balance(large_frame([[0]] * rows), context_with(tmp_path / "a", ["fox"], threshold=500)).sort("id")
    moved = context_with(tmp_path / "b", ["ant", "cat", "fox"], threshold=500)
    two = balance.balance(large_frame([[2]] * rows), moved).sort("id")
    assert one.to_pydict()["copies"] == two.to_pydict()["copies"]


def test_a_pair_stays_if_any_of_its_entries_passes_it(tmp_path: Path) -> None:
    lists = [[0, 1]] * 6_000 + [[0]] * 2_000 + [[1, 2]] * 10 + [[]] * 5
    table, _ = drawn(tmp_path, lists, threshold=1_000)
    counts = np.array([8_000, 6_010, 10])
    passing = np.minimum(1, 1_000 / counts)
    probability = np.array(table["probability"])
    assert probability[:6_000] == pytest.approx(1 - (1 - passing[0]) * (1 - passing[1]))
    assert probability[6_000:8_000] == pytest.approx(passing[0])
    assert (probability[8_000:8_010] == 1).all()
    assert (probability[8_010:] == 0).all()
    copies = np.array(table["copies"])
    for part in (slice(0, 6_000), slice(6_000, 8_000)):
        p = probability[part][0]
        assert abs(copies[part].mean() - p) < 4 * np.sqrt(p * (1 - p) / len(copies[part]))
    assert (copies[8_000:8_010] == 1).all()
    reasons = table["reason"].to_pylist()
    assert set(reasons[8_010:]) == {UNMATCHED}
    assert [reason for reason in reasons[:8_010] if reason] == [FREQUENT] * int((copies[:8_010] == 0).sum())


def zipf(rows: int, entries: int = 5_000) -> list[list[int]]:
    """Captions of one to eight entries, whose frequencies are as 1, 1/2, 1/3, ..."""
    draw = np.random.default_rng(0)
    shares = 1 / np.arange(1, entries + 1)
    chosen = draw.choice(entries, size=(rows, 8), p=shares / shares.sum())
    return [sorted(set(row[:length])) for row, length in zip(chosen.tolist(), draw.integers(1, 9, rows), strict=True)]


def test_weights_of_one_over_probability_restore_what_was_there(tmp_path: Path) -> None:
    """Horvitz and Thompson's estimate of each entry's count is the count, within its standard error."""
    lists = zipf(40_000)
    table, facts = drawn(tmp_path, lists)
    probability, copies = np.array(table["probability"]), np.array(table["copies"])
    owners = np.repeat(np.arange(len(lists)), [len(entries) for entries in lists])
    entries = np.concatenate([np.asarray(row, np.int64) for row in lists])
    counts = np.bincount(entries)
    weights = np.divide(copies, probability, out=np.zeros(len(copies)), where=probability > 0)
    estimates = np.bincount(entries, weights[owners])
    variances = np.bincount(entries, (1 / probability[owners] - 1))
    certain = variances < 1e-9
    assert estimates[certain] == pytest.approx(counts[certain])
    scores = (estimates - counts)[~certain] / np.sqrt(variances[~certain])
    assert len(scores) > 500
    assert abs(scores[:500]).max() < 4.5
    assert abs(scores[:500].mean()) < 0.2
    assert 0.8 < scores[:500].std() < 1.2
    total = weights.sum()
    assert abs(total - len(lists)) < 4 * np.sqrt((1 / probability - 1).sum())
    assert facts["expected"] == pytest.approx(probability.sum())


def test_heads_that_stand_beside_tails_end_above_t(tmp_path: Path) -> None:
    """MetaCLIP's rule keeps a pair whole for its rarest entry, and with it the others."""
    table, facts = drawn(tmp_path, zipf(40_000))
    t, left = facts["threshold"], kept_counts(table)
    counts = Counter(entry for entries in table["entries"].to_pylist() for entry in entries)
    assert all(left[entry] == count for entry, count in counts.items() if count <= t)
    heads = [entry for entry, count in counts.items() if count > 20 * t]
    assert heads
    assert all(t < left[entry] < counts[entry] for entry in heads)


def test_t_is_found_by_the_share_of_the_tail() -> None:
    counts = np.array([1] * 10 + [10] * 3 + [60, 0, 0])
    assert balance.threshold_of(counts, 0.05) == 1
    assert balance.threshold_of(counts, 0.1) == 1
    assert balance.threshold_of(counts, 0.11) == 10
    assert balance.threshold_of(counts, 0.4) == 10
    assert balance.threshold_of(counts, 0.41) == 60
    assert balance.threshold_of(counts, 1.0) == 60
    assert balance.threshold_of(np.zeros(3, np.int64), 0.06) == 1


def test_the_tail_share_carries_to_another_scale(tmp_path: Path) -> None:
    """Ten times the pairs, ten times the t: the same entries are heads."""
    lists = [[entry] for entry, count in enumerate([4_000, 2_000, 900, 400, 250, 100, 60]) for _ in range(count)]
    _, small = drawn(tmp_path / "small", lists, tail_share=0.05)
    _, large = drawn(tmp_path / "large", lists * 10, tail_share=0.05)
    assert large["threshold"] == 10 * small["threshold"] == 2_500
    assert large["head_entries"] == small["head_entries"] == 4


def test_a_found_t_is_never_so_small_that_it_teaches_nothing(tmp_path: Path) -> None:
    lists = [[0]] * 100 + [[entry] for entry in range(1, 50)]
    assert drawn(tmp_path / "found", lists)[1]["threshold"] == balance.LEAST_THRESHOLD
    assert drawn(tmp_path / "given", lists, threshold=2)[1]["threshold"] == 2


def test_draws_are_uniform_and_independent() -> None:
    keys = np.arange(200_000, dtype=np.uint64)  # as little random as keys can be
    draws = {(salt, seed): uniform(keys, salt, seed) for salt in (0, 1, 2**40) for seed in (0, 1, -1)}
    for found in draws.values():
        assert 0 <= found.min() < 1e-4
        assert 1 - 1e-4 < found.max() < 1
        observed = np.bincount((found * 64).astype(int), minlength=64)
        expected = len(keys) / 64
        assert ((observed - expected) ** 2 / expected).sum() < 110  # chi-squared with 63 degrees of freedom: p = 2e-4
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4.5 / np.sqrt(len(keys))
    names = list(draws)
    for place, name in enumerate(names):
        for other in names[:place]:
            assert abs(np.corrcoef(draws[name], draws[other])[0, 1]) < 4.5 / np.sqrt(len(keys))
            joint = np.bincount((draws[name] * 8).astype(int) * 8 + (draws[other] * 8).astype(int), minlength=64)
            assert ((joint - len(keys) / 64) ** 2 / (len(keys) / 64)).sum() < 110
    salts = np.arange(1_000, dtype=np.uint64)
    across = uniform(np.full(1_000, 7, np.uint64), salts, 0)
    assert across == pytest.approx([uniform(np.asarray([7], np.uint64), int(salt), 0)[0] for salt in salts])
    assert abs(across.mean() - 0.5) < 4 / np.sqrt(12 * 1_000)


def clips(*tags: Sequence[str], **columns: Any) -> list[dict[str, Any]]:
    return [{"media": "clip", "tags": list(own), **columns} for own in tags]


def test_rare_tags_are_replicated_by_the_inverse_square_root(tmp_path: Path) -> None:
    rows = clips(*[["a"]] * 1600, *[["a", "b"]] * 400, *[["b", "c", "c"]] * 100, *[["d"]] * 4, ["e"], ["e", "d"])
    found = balanced(tmp_path, rows, 1, tag_threshold=0.19, max_copies=8)
    t = 0.19 * len(rows)
    by_tags = {tuple(row["tags"]): row["probability"] for row in found.values()}
    assert by_tags == {
        ("a",): 1,
        ("a", "b"): 1,
        ("b", "c", "c"): pytest.approx(np.sqrt(t / 100)),
        ("d",): 8,  # sqrt(t / 5) = 8.9
        ("e",): 8,
        ("e", "d"): 8,
    }
    copies = [row["copies"] for row in found.values() if "c" in row["tags"]]
    assert set(copies) == {2}
    assert {row["reason"] for row in found.values()} == {None}
    details = {tuple(row["tags"]): row["detail"] for row in found.values()}
    assert details[("a",)] is None
    assert details[("b", "c", "c")] == "2 copies: tag 'c' is on 100 samples"
    assert details[("d",)] == "8 copies: tag 'd' is on 5 samples"
    assert details[("e", "d")] == "8 copies: tag 'e' is on 2 samples"


def test_the_fraction_of_a_copy_is_drawn(tmp_path: Path) -> None:
    rows = clips(*[["a"]] * 2000, *[["b"]] * 500)
    for seed in range(2):
        found = balanced(tmp_path / str(seed), rows, 1, tag_threshold=0.45, seed=seed)
        copies = np.array([row["copies"] for row in found.values() if row["tags"] == ["b"]])
        expected = 1.5  # sqrt(0.45 / 0.2)
        assert {row["probability"] for row in found.values() if row["tags"] == ["b"]} == {expected}
        assert set(copies) == {1, 2}
        assert abs(copies.mean() - expected) < 4 * 0.5 / np.sqrt(len(copies))
    again = balanced(tmp_path / "again", rows, 1, tag_threshold=0.45, seed=1)
    assert [row["copies"] for row in again.values()] == [row["copies"] for row in found.values()]


def test_the_threshold_of_tags_is_the_median_tag(tmp_path: Path) -> None:
    rows = clips(*[["a"]] * 90, *[["b"]] * 60, *[["c"]] * 40, *[["d"]] * 9, ["e"], ["f", "f"])
    context = context_with(tmp_path, ["fox"])
    found = rows_of(balance.balance(frame_of([{"entries": [], **row} for row in rows]), context))
    assert context.facts["tags"]["threshold"] == 9 / len(rows)
    assert context.facts["tags"]["tags"] == 6
    assert context.facts["tags"]["rare_tags"] == 2
    assert {row["tags"][0]: row["probability"] for row in found.values()} == {
        **dict.fromkeys("abcd", 1),
        **dict.fromkeys("ef", 3),
    }
    assert context.facts["tags"]["copies"] == 90 + 60 + 40 + 9 + 6


MIXED: list[dict[str, Any]] = [
    {"caption": "x", "entries": [0], "tags": ["rare"], "media": "image"},
    {"caption": "x", "entries": [], "tags": [], "media": ""},
    {"caption": "", "entries": [], "tags": ["rare"], "media": "image"},
    {"caption": "x", "entries": [], "tags": ["rare"], "media": "clip"},
    {"caption": "x", "entries": [], "tags": [], "media": "clip"},
    {"caption": "", "entries": [], "tags": [], "media": "clip"},
    *({"caption": "", "entries": [], "tags": ["a"], "media": "clip"} for _ in range(20)),
    *({"caption": "", "entries": [], "tags": ["a"], "media": "image"} for _ in range(20)),
]


@pytest.mark.parametrize(
    ("rule", "copies"),
    [
        ("both", [1, 0, 1, 4, 1, 1]),
        ("captions", [1, 0, 1, 0, 0, 1]),
        ("tags", [3, 1, 3, 3, 1, 1]),
        ("none", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_what_is_balanced_by_what(rule: str, copies: list[int], tmp_path: Path) -> None:
    # "rare" is on one of 21 tagged clips and on 3 of 43 tagged samples: t is to give whole copies in both
    t = {"both": 16 / 21, "tags": 27 / 43}.get(rule, 0.0)
    found = balanced(tmp_path, MIXED, 2, balance=rule, tag_threshold=t)
    assert [found[f"{number:03d}"]["copies"] for number in range(6)] == copies
    assert [found[f"{number:03d}"]["probability"] for number in range(6)] == copies
    dropped = [UNMATCHED if n == 0 else None for n in copies]
    assert [found[f"{number:03d}"]["reason"] for number in range(6)] == dropped


def test_the_detail_names_the_rarest_entries(tmp_path: Path) -> None:
    lists = [[0, 1, 2, 3]] * 300 + [[0, 1, 2]] * 100 + [[0, 1]] * 100 + [[0]] * 100
    found = balanced(tmp_path, [{"caption": "x", "entries": own} for own in lists], 4, threshold=1)
    details = {tuple(row["entries"]): row["detail"] for row in found.values() if row["reason"] == FREQUENT}
    assert details == {
        (0, 1, 2, 3): "e3 (300), e2 (400), e1 (500)",
        (0, 1, 2): "e2 (400), e1 (500), e0 (600)",
        (0, 1): "e1 (500), e0 (600)",
        (0,): "e0 (600)",
    }
    assert {row["detail"] for row in found.values() if row["copies"]} == {None}


def test_metadata_without_entries_balances_no_caption(tmp_path: Path) -> None:
    found = balanced(tmp_path, MIXED[:2], 0)
    assert [row["copies"] for row in found.values()] == [1, 1]


@pytest.mark.parametrize("rule", ["both", "captions", "tags", "none"])
def test_no_rows(rule: str, tmp_path: Path) -> None:
    empty = large_frame([[0]]).where(col("id") == lit("none"))
    context = context_with(tmp_path, ["fox"], balance=rule)
    out = balance.balance(empty, context)
    assert out.count_rows() == 0
    assert {"probability", "copies", "reason", "detail"} <= set(out.column_names)
