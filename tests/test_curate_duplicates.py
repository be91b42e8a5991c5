"""Duplicates: by pixels, by looks, by text."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import daft
import numpy as np
import pyarrow as pa
import pytest
from curate_frames import context_for, frame_of, reasons_of, rows_of
from daft import DataFrame, col, lit

from xray.curate import neighbours
from xray.curate.duplicates import exact_duplicates, near_duplicates, text_duplicates
from xray.curate.frame import keeping, kept
from xray.curate.neighbours import bands_for, components, near_pairs, near_within, num_words, text_pairs, words_of
from xray.curate.step import ROWS, Context, written

PIXELS, ROW = "the same pixels as another", "the same hash and caption as another"
LOOKS, TEXT = "nearly the same picture as another", "nearly the same caption as another"
WORDS = "a small red fox runs over the old wooden bridge near our village in winter"
FAR = 0x0F0F_0000_FFFF_3333
Run = Callable[[DataFrame | None, Context], DataFrame]


def hashes_of(values: Sequence[int] | np.ndarray) -> DataFrame:
    return daft.from_arrow(pa.table({"phash": pa.array(values, pa.uint64())}))


def brute(values: np.ndarray, near_bits: int) -> list[tuple[int, int]]:
    near = np.bitwise_count(values[:, None] ^ values[None]) <= near_bits
    one, other = np.nonzero(near & (values[:, None] < values[None]))
    return sorted(zip(values[one].tolist(), values[other].tolist(), strict=True))


def pairs_in(frame: DataFrame) -> list[tuple[int, int]]:
    found = frame.to_pydict()
    return sorted(zip(found["a"], found["b"], strict=True))


def with_neighbours(rng: np.random.Generator, count: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Random hashes, and for each another that differs in exactly so many bits."""
    values = rng.integers(0, 2**64, count, dtype=np.uint64)
    flips = rng.permuted(np.tile(np.arange(64, dtype=np.uint64), (count, 1)), axis=1)[:, :bits]
    return values, values ^ np.bitwise_or.reduce(np.uint64(1) << flips, axis=1)


def samples(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the columns that `decode` makes."""
    measures: dict[str, Any] = {"width": None, "height": None, "frames": None, "pixels": None}
    return [{**measures, **row} for row in rows]


def verdicts(run: Run, folder: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> dict[str, str | None]:
    """Who stays in place of each sample, None where it stays itself; the same whatever the order of the rows."""
    rows = [{"id": f"{number:03d}", **row} for number, row in enumerate(samples(rows))]
    found = []
    for turn in range(2):
        done = rows_of(run(frame_of(rows), context_for(folder / f"{run.__name__}-{turn}", **settings)))
        found.append({id: done[id]["detail"] for id in sorted(done)})
        assert all((row["reason"] is None) == (row["detail"] is None) for row in done.values())
        rows = random.Random(turn).sample(rows, len(rows))
    assert found[0] == found[1]
    return found[0]


# Hamming neighbours


@pytest.mark.parametrize("near_bits", [1, 2, 3])
@pytest.mark.parametrize("run", [20, 10_000])
def test_every_pair_of_near_hashes_is_found_once(near_bits: int, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "RUN", run)  # crowds are split further
    rng = np.random.default_rng(near_bits)
    one, other = with_neighbours(rng, 100, near_bits)
    dense = rng.integers(0, 2**15, 300, dtype=np.uint64) << np.uint64(20)  # all agree in most blocks
    values = np.unique(np.concatenate([one, other, dense, np.array([0, 2**64 - 1], np.uint64)]))
    a, b = near_within(values, near_bits)
    assert sorted(zip(np.minimum(a, b).tolist(), np.maximum(a, b).tolist(), strict=True)) == brute(values, near_bits)
    assert pairs_in(near_pairs(hashes_of(values), near_bits)) == brute(values, near_bits)


def test_near_hashes_in_a_hundred_thousand() -> None:
    one, other = with_neighbours(np.random.default_rng(0), 50_000, 3)
    found = set(pairs_in(near_pairs(hashes_of(np.unique(np.concatenate([one, other]))), 3)))
    assert found == {(min(pair), max(pair)) for pair in zip(one.tolist(), other.tolist(), strict=True)}


def test_a_crowd_of_hashes_is_not_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    equal = neighbours._equal

    def counted(*arguments: Any) -> Any:
        nonlocal compared
        for position, distance in equal(*arguments):
            compared += len(position)
            yield position, distance

    monkeypatch.setattr(neighbours, "_equal", counted)
    rng = np.random.default_rng(0)
    values = np.unique(rng.integers(0, 2**38, 20_000, dtype=np.uint64))  # all agree in the two highest blocks
    near_within(values, 3)
    assert compared < len(values) ** 2 / 20


@pytest.mark.parametrize("count", [0, 1])
def test_few_hashes_have_no_neighbours(count: int) -> None:
    assert pairs_in(near_pairs(hashes_of([5] * count), 3)) == []


def test_no_bits_is_no_pair() -> None:
    assert pairs_in(near_pairs(hashes_of([1, 2, 3]), 0)) == []


# groups


def groups_of(pairs: Sequence[tuple[int, int]], folder: Path) -> dict[int, int]:
    table = pa.table({name: pa.array([pair[at] for pair in pairs], pa.uint64()) for at, name in enumerate("ab")})
    found = components(daft.from_arrow(table), context_for(folder), "test").to_pydict()
    assert len(set(found["node"])) == len(found["node"])
    return dict(zip(found["node"], found["group"], strict=True))


def test_groups_are_those_of_a_union_of_all_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = [(int(a), int(b)) for a, b in rng.integers(0, 300, (170, 2)) if a != b]
    parent = {node: node for pair in pairs for node in pair}

    def root(node: int) -> int:
        return node if parent[node] == node else root(parent[node])

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    assert groups_of(pairs, tmp_path) == {node: root(node) for node in parent if root(node) != node}


@pytest.mark.parametrize("chain", [list(range(70)), [*range(0, 70, 2), *range(69, 0, -2)]])
def test_a_long_chain_is_one_group(chain: list[int], tmp_path: Path) -> None:
    found = groups_of(list(pairwise(chain)), tmp_path)
    assert found == dict.fromkeys(range(1, 70), 0)


def test_no_pairs_no_groups(tmp_path: Path) -> None:
    assert groups_of([], tmp_path) == {}


# equal pixels


def test_of_equal_pixels_the_best_stays_and_takes_all_tags(tmp_path: Path) -> None:
    rows = samples(
        [
            {"pixels": "p", "caption": "short", "tags": ["b", "d"]},
            {"pixels": "p", "caption": "much longer", "tags": ["c", "b"]},
            {"pixels": "p", "caption": "", "tags": []},
            {"pixels": "q", "caption": "much longer", "tags": ["z", "y"]},
            {"pixels": None, "caption": "much longer", "tags": []},
            {"pixels": "r", "tags": ["n", "m"]},
            {"pixels": "r", "tags": ["m"]},
        ]
    )
    context = context_for(tmp_path)
    done = rows_of(exact_duplicates(frame_of(rows), context))
    last = "005" if done["006"]["reason"] else "006"  # by the key
    gone = "006" if last == "005" else "005"
    assert {id for id, row in done.items() if row["reason"]} == {"000", "002", gone}
    assert [(done[id]["reason"], done[id]["detail"]) for id in ("000", "002", gone)] == [
        (PIXELS, "001"),
        (PIXELS, "001"),
        (PIXELS, last),
    ]
    assert min((done["005"]["key"], "005"), (done["006"]["key"], "006"))[1] == last
    assert done["001"]["tags"] == ["b", "c", "d"]
    assert done["003"]["tags"] == ["z", "y"]
    assert sorted(done[last]["tags"]) == ["m", "n"]
    assert context.facts["groups"] == 2
    assert context.facts["largest"] == 3
    assert context.facts["examples"][0] == ["001", "000", "002"]
    assert context.facts["tags_united"] == 1 + (last == "006")


def test_rows_without_pixels_repeat_by_hash_and_caption(tmp_path: Path) -> None:
    rows = samples(
        [
            {"phash": 7, "caption": "a fox"},
            {"phash": 7, "caption": "a fox"},
            {"phash": 7, "caption": "a bear"},
            {"phash": None, "caption": "a fox"},
            {"phash": None, "caption": "a fox"},
            {"phash": 9, "caption": "a fox"},
        ]
    )
    reasons = reasons_of(exact_duplicates(frame_of(rows), context_for(tmp_path)))
    assert sorted((reasons.pop("000") or "", reasons.pop("001") or "")) == ["", ROW]
    assert set(reasons.values()) == {None}


@pytest.mark.parametrize("run", [exact_duplicates, near_duplicates, text_duplicates])
def test_nothing_comes_of_nothing(run: Run, tmp_path: Path) -> None:
    whole = frame_of(samples([{"caption": WORDS}, {}]))
    context = context_for(tmp_path / "none")
    assert reasons_of(run(whole.where(col("id") == lit("none")), context)) == {}
    assert (context.facts["groups"], context.facts["largest"], context.facts["examples"]) == (0, 0, [])
    done = run(whole, context_for(tmp_path / "two"))
    assert reasons_of(done) == {"000": None, "001": None}
    assert done.column_names == [*whole.column_names, "reason", "detail"]


# looks


def pictures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Decoded samples: grey, 10 x 10, of one frame, with other pixels each."""
    grey = bytes([100]) * 2304
    plain = {"width": 10, "height": 10, "frames": 1, "colours": grey}
    made = [{**plain, "pixels": str(number), "id": f"{number:03d}", **row} for number, row in enumerate(rows)]
    return [{"frame_hashes": [row["phash"]], **row} for row in made]


def near(folder: Path, rows: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, str | None]:
    """Who stays in place of each decoded sample."""
    rows = random.Random(seed).sample(rows, len(rows)) if seed else rows
    table = frame_of(rows)
    stem = folder / "decode"
    written(keeping(table), stem / ROWS)
    context = dataclasses.replace(context_for(folder / "near"), earlier={"decode": stem})
    done = rows_of(near_duplicates(kept(keeping(table)), context))
    return {id: done[id]["detail"] for id in sorted(done)}


def test_pictures_that_look_alike_in_shape_and_colours_are_duplicates(tmp_path: Path) -> None:
    grey = np.full(2304, 100, np.uint8)
    spot = grey.copy()
    spot[7] += 17
    rows = pictures(
        [
            {"phash": 7, "width": 9},
            {"phash": 7 ^ 0b111 << 40, "colours": (grey + 2).tobytes()},
            {"phash": 7 ^ 0b1111 << 20},  # too far in shape
            {"phash": 7, "colours": (grey + 3).tobytes(), "caption": "x"},  # near the second in colours
            {"phash": 7, "colours": (grey + 50).tobytes()},  # the same shape in other colours
            {"phash": 7, "colours": spot.tobytes()},  # one part differs
            {"phash": None, "colours": None},
            {"phash": 7, "colours": (grey + np.tile([3, 253], 1152).astype(np.uint8)).tobytes()},  # in every part
        ]
    )
    expected = {**{f"{number:03d}": None for number in range(8)}, "000": "003", "001": "003"}
    assert near(tmp_path / "a", rows) == expected
    assert near(tmp_path / "b", rows, seed=3) == expected


def test_of_a_chain_the_best_stays_and_all_name_it(tmp_path: Path) -> None:
    rows = pictures([{"phash": 0}, {"phash": 0b111}, {"phash": 0b111111, "width": 20}, {"phash": 0b111 << 8}])
    assert near(tmp_path, rows) == {"000": "002", "001": "002", "002": None, "003": "002"}
    plain = samples([{"phash": row["phash"], "width": row["width"], "height": 1, "frames": 1} for row in rows])
    assert list(verdicts(near_duplicates, tmp_path, plain).values()) == ["002", "002", None, "002"]


def test_pictures_tied_by_one_of_other_colours_are_no_duplicates(tmp_path: Path) -> None:
    rows = pictures([{"phash": 0}, {"phash": 0b111, "colours": bytes([150]) * 2304}, {"phash": 0b111111}])
    assert set(near(tmp_path, rows).values()) == {None}


def test_clips_are_compared_frame_by_frame(tmp_path: Path) -> None:
    frames = [1 << number * 4 for number in range(8)]
    others = [FAR ^ 1 << number * 4 for number in range(8)]
    clip = {"phash": frames[4], "media": "clip", "frames": 8, "width": 20}
    rows = pictures(
        [
            {**clip, "frame_hashes": frames},
            {**clip, "frame_hashes": [FAR, *[each ^ 3 for each in frames[1:]]], "width": 10},  # all but one are near
            {**clip, "frame_hashes": [*others[:4], frames[4], *others[5:]]},  # one frame in common
            {**clip, "frame_hashes": [*frames[:4], *others[4:]]},  # half is not most
            {**clip, "frame_hashes": frames[1::2], "width": 10},  # half as many of the same
            {"phash": frames[4]},  # a still of it
        ]
    )
    assert near(tmp_path, rows) == {"000": None, "001": "000", "002": None, "003": None, "004": "000", "005": None}


def test_a_hash_that_very_many_have(tmp_path: Path) -> None:
    """Blank-like pictures share a hash: they are told apart by colours, and each colour keeps one."""
    grey = np.zeros(2304, np.uint8)
    rows = pictures([{"phash": 0, "colours": (grey + 5 * (number % 40)).tobytes()} for number in range(1200)])
    assert sum(stays is None for stays in near(tmp_path, rows).values()) == 40


# text


def test_words_of_captions() -> None:
    captions = ["Straße-12,  ÉCOLE!! ", "猫が好きです。", "ยินดีต้อนรับ", "", "…", "한국어 문장"]
    frame = daft.from_pydict({"caption": captions}).with_column("words", words_of(col("caption")))
    found = frame.with_column("count", num_words(col("words"))).to_pydict()
    assert found["words"][:2] == ["straße 12 école", "猫 が 好 き で す"]
    assert found["words"][2].replace(" ", "") == captions[2]
    assert found["words"][3:] == ["", "", "한국어 문장"]
    assert found["count"] == [3, 3, 4, 0, 0, 2]


def test_bands_meet_the_similarity() -> None:
    for similarity in (0.3, 0.5, 0.7, 0.8, 0.9, 1.0):
        bands, rows = bands_for(similarity)
        assert bands * rows <= neighbours.HASHES
        assert 1 - (1 - similarity**rows) ** bands >= neighbours.RECALL
    assert bands_for(0.8) == (9, 4)
    assert bands_for(0.01) == (neighbours.HASHES, 1)


def test_long_captions_that_are_alike_are_duplicates(tmp_path: Path) -> None:
    rows = [
        {"caption": WORDS},
        {"caption": WORDS.upper() + "!!!"},  # equal but for case and punctuation, and longer
        {"caption": WORDS + " again"},  # one triple more
        {"caption": " ".join(WORDS.split()[::-1])},  # the same words
        {"caption": "a small red fox"},
        {"caption": "a small red fox"},
        {"caption": "雪の中で遊ぶ小さな赤い狐の写真です"},
        {"caption": "雪の中で遊ぶ小さな赤い狐の写真です。"},
        {"caption": "赤い狐"},
        {"caption": "赤い狐"},
        {"caption": ""},
    ]
    expected = dict.fromkeys([f"{number:03d}" for number in range(11)])
    expected.update({"000": "002", "001": "002", "006": "007"})
    assert verdicts(text_duplicates, tmp_path, rows) == expected
    assert not any(verdicts(text_duplicates, tmp_path / "off", rows, text_similarity=0.0).values())
    strict = verdicts(text_duplicates, tmp_path / "strict", rows, text_similarity=1.0)
    assert {id for id, stays in strict.items() if stays} == {"000", "006"}


def test_alike_texts_are_found_as_comparing_all_finds_them(tmp_path: Path) -> None:
    rng = random.Random(0)
    vocabulary = [f"w{number}" for number in range(400)]
    texts = []
    for _ in range(150):
        words = rng.choices(vocabulary, k=20)
        changed = list(words)
        changed[rng.randrange(20)] = "other"
        texts += [" ".join(words), " ".join(changed), " ".join([*words, "more"])]
    numbers = {text: number for number, text in enumerate(texts)}
    frame = daft.from_arrow(pa.table({"text": pa.array(numbers.values(), pa.uint64()), "words": list(numbers)}))

    def triples(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}

    sets = {number: triples(text) for text, number in numbers.items()}
    wanted = {(a, b) for a in sets for b in sets if a < b and len(sets[a] & sets[b]) >= 0.7 * len(sets[a] | sets[b])}
    found = pairs_in(text_pairs(frame, 0.7, context_for(tmp_path)))
    assert len(found) == len(set(found))
    assert set(found) <= wanted
    assert len(found) >= 0.98 * len(wanted) > 300


def test_a_template_that_very_many_carry(tmp_path: Path) -> None:
    rows = [{"caption": f"{WORDS} and this is number {number} of all"} for number in range(300)]
    done = verdicts(text_duplicates, tmp_path, rows, text_similarity=0.6)
    assert sum(stays is None for stays in done.values()) == 1
