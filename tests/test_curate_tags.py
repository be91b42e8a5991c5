"""Tags: one spelling for one thing, and none that say nothing."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from curate_frames import context_for, frame_of, rows_of
from wordnet_files import write_wordnet

from xray.curate import tags
from xray.curate.settings import Settings

FAMILY = "👨\u200d👩\u200d👧"
KINDS = ("cat", "dog", "boat", "tree", "house", "flower", "mountain", "bicycle")
COLOURS = ("red", "green", "blue", "white", "black")


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("#Sunset", "sunset"),
        ("  Red__flower-bed ", "red flower bed"),
        ('"quoted"', "quoted"),
        ("«кошка»", "кошка"),
        ("cat, dog", "cat dog"),
        ("Ｃａｔ", "cat"),  # noqa: RUF001
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("cafe\u0301", "café"),
        ("ca\u200bt\ufeff", "cat"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # noqa: RUF001
        (FAMILY, FAMILY),
        ("❤", "❤"),
        ("rock'n'roll", "rock'n'roll"),
        ("don't!", "don't"),
        ("c++", "c++"),
        ("3.5mm", "3.5mm"),
        ("猫", "猫"),
        ("!!!", ""),
        ("#", ""),
        ("", ""),
    ],
)
def test_spelling(tag: str, name: str) -> None:
    assert tags.spelled(tag) == name
    assert tags.spelled(name) == name


def canonical(
    rows: Iterable[dict[str, Any]], folder: Path, *, partitions: int = 1, **settings: Any
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    context = context_for(folder, **{"wordnet": "off", **settings})
    frame = tags.canonical_tags(frame_of(rows, partitions=partitions), context)
    found = rows_of(frame)
    assert all(row["reason"] is None for row in found.values())
    return {id: row["tags"] for id, row in found.items()}, context.facts["canonical"]


def test_each_tag_is_once_in_its_order(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"tags": ["Dog", "cat", "DOG", "#cat", "", "!", "a_b"]},
        {"tags": []},
        {"tags": None},
        {"tags": [None, "cat"]},
        {"tags": ["!!"]},
        {"tags": ["cat"]},
    ]
    found, facts = canonical(rows, tmp_path)
    assert list(found.values()) == [["dog", "cat", "a b"], [], [], ["cat"], [], ["cat"]]
    assert (facts["before"], facts["after"], facts["untagged"]) == (8, 3, 1)


def test_without_wordnet_a_plural_joins_a_singular_that_is_a_tag(tmp_path: Path) -> None:
    rows = [
        {"tags": ["selfies", "glass", "boxes", "Class", "buses", "news", "cities"]},
        {"tags": ["selfie", "box", "bus"]},
    ]
    found, facts = canonical(rows, tmp_path)
    assert found["000"] == ["selfie", "glass", "box", "class", "bus", "news", "cities"]
    assert not facts["wordnet"]
    assert ["selfies", "selfie", 1] in facts["examples"]


def test_wordnet_joins_plurals_and_synonyms(tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path / "wordnet")
    rows = [
        {"tags": ["Automobiles", "cars", "auto", "glasses", "selfies", "red_flowers"]},
        {"tags": ["Selfie", "kids"]},
    ]
    found, facts = canonical(rows, tmp_path / "step", wordnet=str(folder))
    assert list(found.values()) == [["car", "glasses", "selfie", "red flower"], ["selfie", "child"]]
    assert facts["wordnet"]
    assert (facts["before"], facts["after"]) == (8, 5)


def test_hashtags_fall_apart_where_their_words_are_known(tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path / "wordnet")
    rows = [
        {"tags": ["#SunsetBeach", "iPhone", "HotDog", "McDonald", "YouTube", "BlueDog", "USACar"]},
        {"tags": ["youtube", "you", "tube", "blue"]},
    ]
    found, _ = canonical(rows, tmp_path / "with", wordnet=str(folder))
    apart = ["sunset beach", "iphone", "hot dog", "mcdonald", "youtube", "blue dog", "usa car"]
    assert found["000"] == apart
    found, _ = canonical(rows, tmp_path / "without")
    assert found["000"][0] == "sunsetbeach", "nothing tells its words"


def test_the_fingerprint_says_which_wordnet_it_was(tmp_path: Path) -> None:
    assert tags.CANONICAL.inputs is not None
    one = write_wordnet(tmp_path / "one")
    other = write_wordnet(tmp_path / "other", verbs=("walk",))
    digests = [tags.CANONICAL.inputs("", Settings(wordnet=name)) for name in (str(one), str(other), "off")]
    assert len(set(digests)) == 3
    assert digests[2] is None


def samples(count: int = 600, source: str = "set") -> list[dict[str, Any]]:
    """Samples whose tags their captions name."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        kind, colour = draw.choice(KINDS), draw.choice(COLOURS)
        rows.append(
            {
                "id": f"{source}:{number}",
                "source": source,
                "caption": f"a {colour} {kind}",
                "tags": [kind, colour],
                "label": "things",
                "phash": draw.getrandbits(64),
            }
        )
    return rows


def stopped(
    rows: Iterable[dict[str, Any]], folder: Path, **settings: Any
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    context = context_for(folder, **settings)
    found = rows_of(tags.stop_tags(frame_of(rows), context))
    assert all(row["reason"] is None for row in found.values())
    return {id: row["tags"] for id, row in found.items()}, context.facts


@pytest.mark.parametrize("share", [0.04, 0.1, 0.5, 1.0])
def test_a_tag_put_on_by_a_machine_is_stopped(share: float, tmp_path: Path) -> None:
    rows = samples()
    noisy = random.Random(1).sample(rows, int(share * len(rows)))
    for row in noisy:
        row["tags"] = ["hash", *row["tags"]]
    found, facts = stopped(rows, tmp_path)
    assert [(row["tag"], row["source"], row["count"]) for row in facts["stop_tags"]] == [("hash", "set", len(noisy))]
    assert found == {row["id"]: row["tags"] for row in samples()}
    assert facts["untagged"] == 0


def test_a_batch_tag_that_no_caption_names_is_stopped(tmp_path: Path) -> None:
    """It goes with the file names of one batch of pictures of everything, and with nothing that they show."""
    rows = samples()
    for row in rows[:150]:
        row["tags"] = [*row["tags"], "lemon theme", "upload"]
    assert {row["tag"] for row in stopped(rows, tmp_path)[1]["stop_tags"]} == {"lemon theme", "upload"}


@pytest.mark.parametrize("names", ["caption", "label", "alternatives", "a word"])
def test_a_tag_that_says_something_stays(names: str, tmp_path: Path) -> None:
    rows = samples()
    for row in rows:
        if row["tags"][0] in ("cat", "dog"):
            row["tags"] = ["animal", *row["tags"]]
            if names == "caption":
                row["caption"] += ", an animal"
            elif names == "label":
                row["label"] = "animals"
            elif names == "alternatives":
                row["alternatives"] = ["my animal"]
            else:
                row["caption"] += " outdoors"  # not its name, but always there
    found, facts = stopped(rows, tmp_path)
    assert facts["stop_tags"] == []
    assert found == {row["id"]: row["tags"] for row in rows}


def test_rare_tags_that_are_told_by_others_stay(tmp_path: Path) -> None:
    """No caption names "pet", but it comes with cats only."""
    rows = samples(2000)
    cats = [row for row in rows if row["tags"][0] == "cat"][:60]
    for row in cats:
        row["tags"] = [*row["tags"], "pet"]
        row["caption"] = "tom"
    for row in rows[::40]:
        row["tags"] = [*row["tags"], "xyz"]
    facts = stopped(rows, tmp_path)[1]
    assert [row["tag"] for row in facts["stop_tags"]] == ["xyz"]


def test_a_tag_is_stopped_in_its_source_only(tmp_path: Path) -> None:
    rows = samples() + samples(source="other")
    for row in rows[:100]:
        row["tags"] = ["special"]
    for row in rows[600:700]:
        row["tags"] = ["special"]
        row["caption"] = "a special thing"
    found, facts = stopped(rows, tmp_path)
    assert [(row["tag"], row["source"]) for row in facts["stop_tags"]] == [("special", "set")]
    assert found["set:0"] == []
    assert found["other:0"] == ["special"]
    assert facts["untagged"] == 100


def test_the_setting_bounds_what_is_rare(tmp_path: Path) -> None:
    rows = samples()
    for row in rows[:30]:
        row["tags"] = [*row["tags"], "hash"]
    assert len(stopped(rows, tmp_path / "a", stop_count=30)[1]["stop_tags"]) == 1
    assert stopped(rows, tmp_path / "b", stop_count=31)[1]["stop_tags"] == []


@pytest.mark.parametrize("rows", [[], [{"tags": None, "label": None, "alternatives": None, "phash": None}] * 30])
def test_no_tags(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert set(map(tuple, canonical(rows, tmp_path / "a")[0].values())) <= {()}
    assert stopped(rows, tmp_path / "b")[1]["stop_tags"] == []


def test_order_and_partitions_do_not_matter(tmp_path: Path) -> None:
    rows = samples() + samples(300, "other")
    for row in rows[::7]:
        row["tags"] = ["Hash", *row["tags"], "cats"]
    one, one_facts = canonical(rows, tmp_path / "1")
    five, five_facts = canonical(rows[::-1], tmp_path / "5", partitions=5)
    assert one == five
    assert one_facts == five_facts
    clean = [{**row, "tags": one[row["id"]]} for row in rows]
    first, second = stopped(clean, tmp_path / "a"), stopped(clean[::-1], tmp_path / "b")
    assert first == second
    assert len(first[1]["stop_tags"]) == 2
