"""Captions: any script survives cleaning, and what says nothing goes by its statistics."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from curate_frames import context_for, frame_of, reasons_of, rows_of

import pyarrow as pa  # isort: skip
import pyarrow.compute as pc  # isort: skip

from xray.curate import text
from xray.curate.boilerplate import pattern_of
from xray.curate.cleaning import clean
from xray.data.errors import DataError

FAMILY, ENGLAND = "👨\u200d👩\u200d👧", "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
KINDS = ("cat", "dog", "boat", "tree", "house", "flower", "mountain", "bicycle")
PLACES = ("indoors", "by night", "at sea", "in winter", "downtown", "near home", "overhead", "from above", "in fog")
ADJECTIVES = ("small", "large", "red", "sleepy", "wooden", "bright", "distant", "crooked", "smooth", "yellow")


def cleaned(caption: str | None, longest: int = 2000) -> str:
    result: str = clean(pa.array([caption], pa.string()), longest)[0].as_py()
    return result


@pytest.mark.parametrize(
    "caption",
    [
        "A small dog, asleep on the sofa",
        "naïve café, Zürich, 3/4 view of 50% off",
        "שלום עולם",
        "مرحبا بالعالم",
        "می\u200cخواهم",  # noqa: RUF001 - a joiner that Persian needs
        "क्\u200dष",
        "日本語のキャプション",
        "Привет, мир",
        "ภาษาไทย",
        "한국어",
        f"the {FAMILY} family",
        ENGLAND,
        "❤️",
        "👍🏽 and 👍🏿",
        "☆彡",
        "I <3 you",
        "x < y and y > z",
        "AT&T",
        "C# major",
        "Node.js rocks",
        "e.g. this",
        "it’s “quoted”",  # noqa: RUF001
        "don't - stop",
        "",
    ],
)
def test_language_stays_as_it_is(caption: str) -> None:
    assert cleaned(caption) == caption


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        (None, ""),
        ("schÃ¶n und gut", "schön und gut"),
        ("РїСЂРёРІРµС‚", "привет"),  # noqa: RUF001
        ("Don&rsquo;t &amp;amp; stop", "Don’t & stop"),  # noqa: RUF001
        ("<b>Bold</b> <a href='x'>link</a><br/>text<!-- no -->", "Bold link text"),
        ("<script>var a = 1;</script>cat", "cat"),
        ("cut off <a href='http", "cut off"),
        ("[b]hi[/b] ![alt text](http://a.b/c.png)", "hi alt text"),
        ("see https://a.b/c?d=e now, or www.foo.bar/x", "see now, or"),
        ("Visit example.com for more", "Visit for more"),
        ("mail me@x.org please", "mail please"),
        ("by @photo_guy today", "by today"),
        ("IMG_1234.jpg", ""),
        ("IMG_1234 beach", "beach"),
        ("DSC00012", ""),
        ("photo-of-cat.JPG at home", "at home"),
        ("#sunset #beach life", "sunset beach life"),
        ("my_cool_caption", "my cool caption"),
        ("\u202eevil\u202c \u2066text\u2069", "evil text"),
        ("zero\u200bwidth \ufeffand\u00ad soft", "zerowidth and soft"),
        ("a\u200db and 1\u200c2", "ab and 12"),  # joiners that join nothing
        ("flag\U000e0067\U000e0062", "flag"),  # hidden tag characters
        ("bell\x07 and\x00null\ttab\nline", "bell and null tab line"),
        ("private \ue000 use \ufffd", "private use"),
        ("cafe\u0301", "café"),
        ("★★★★★ best!!!! ever....", "★ best! ever..."),
        ("👍👍👍👍", "👍"),
        ("--- wow ---", "wow"),
        ("a  b  ,  c", "a b, c"),
        ("() empty [ ]", "empty"),
        ("...", ""),
        ("\u200d", ""),
        ("-", ""),
    ],
)
def test_what_is_no_language_goes(caption: str | None, left: str) -> None:
    assert cleaned(caption) == left
    assert cleaned(left) == left
    assert unicodedata.is_normalized("NFC", left)


@pytest.mark.parametrize(
    "part",
    ["a", "word ", "<", "<a ", "&amp;", "@", "a.b", "a@b.", "Ã¶", "👍", "\u200d", "[a](", "#", "-", "(", "\u202e"],
)
def test_a_million_characters_are_cut(part: str) -> None:
    caption = part * (10**6 // len(part))
    assert len(cleaned(caption, 100)) <= 100


def test_a_long_caption_is_cut_after_a_word() -> None:
    assert cleaned("one two three four", 14) == "one two three"
    assert cleaned("one two three four", 13) == "one two three"
    assert cleaned("one two three four", 12) == "one two"
    assert cleaned("日本語のキャプション", 4) == "日本語の"
    assert cleaned("a " + "b" * 50, 20) == "a " + "b" * 18, "one long word does not take all"


def pictures(count: int, *, source: str = "set", start: int = 0) -> list[dict[str, Any]]:
    """Samples with captions of their own, tags and file names that agree with them."""
    rows = []
    for number in range(start, start + count):
        kind, adjective = KINDS[number % len(KINDS)], ADJECTIVES[number // len(KINDS) % len(ADJECTIVES)]
        place = PLACES[number // len(KINDS) // len(ADJECTIVES) % len(PLACES)]
        rows.append(
            {
                "id": f"{source}:{number}",
                "source": source,
                "caption": f"a {adjective} {kind} {place}",
                "tags": [kind, adjective],
                "alternatives": [f"{adjective} {kind}"],
            }
        )
    return rows


def run(rows: Iterable[dict[str, Any]], folder: Path, **settings: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """The captions by id, and the facts."""
    context = context_for(folder, **settings)
    frame = text.clean_text(frame_of(rows), context)
    assert not {"original", "replaced", "text", "language"} & set(frame.column_names)
    return {id: row["caption"] for id, row in rows_of(frame).items()}, context.facts


def test_a_title_on_many_pictures_is_replaced_by_the_files_name(tmp_path: Path) -> None:
    rows = pictures(300)
    for number in range(0, 90, 3):
        rows[number]["caption"] = f"Great Collection, No. {number}"
    rows[0]["alternatives"] = []
    rows[3]["alternatives"] = ["IMG_1234.jpg", "Great collection no 7", "<b>a boat</b>"]
    captions, facts = run(rows, tmp_path)
    assert captions["set:0"] == ""
    assert captions["set:3"] == "a boat"
    assert captions["set:6"] == "small mountain"
    assert captions["set:1"] == rows[1]["caption"]
    assert facts["boilerplate"] == [["great collection no 0", 30]]
    assert (facts["replaced"], facts["emptied"], facts["changed"]) == (29, 1, 30)


@pytest.mark.parametrize("witness", ["tags", "alternatives", "label"])
def test_a_true_title_on_many_pictures_stays(witness: str, tmp_path: Path) -> None:
    """Thirty pictures of cats may be called "Cats", whichever of the samples' own words agrees."""
    rows = pictures(300)
    for row in rows[:240:8]:
        row["caption"] = "Cats"
        row["tags"], row["alternatives"] = ["pet"], ["tom"]
        row[witness] = "a cat" if witness == "label" else ["the cat"]
    captions, facts = run(rows, tmp_path)
    assert facts["boilerplate"] == []
    assert captions["set:0"] == "Cats"


def test_a_title_that_a_tag_of_all_names_is_boilerplate(tmp_path: Path) -> None:
    """Agreement counts only above what chance gives."""
    rows = [{**row, "tags": [*row["tags"], "openclipart"], "alternatives": []} for row in pictures(300)]
    for row in rows[:90:3]:
        row["caption"] = "Openclipart"
    assert run(rows, tmp_path)[1]["boilerplate"] == [["openclipart", 30]]


def test_a_title_of_which_little_is_named_is_boilerplate(tmp_path: Path) -> None:
    rows = pictures(300)
    for row in rows[:90:3]:
        row.update(caption="Lemon contest winners gallery", tags=["lemon"], alternatives=[])
    assert run(rows, tmp_path)[1]["boilerplate"] == [["lemon contest winners gallery", 30]]


def test_a_collection_of_different_things_is_boilerplate(tmp_path: Path) -> None:
    """Its tags name it, but the files are named after something else each."""
    rows = pictures(300)
    for number, row in enumerate(rows[:90:3]):
        row.update(caption="Lemon theme", tags=["lemon theme"], alternatives=[f"{chr(97 + number % 26) * 5} thing"])
    assert run(rows, tmp_path)[1]["boilerplate"] == [["lemon theme", 30]]


def test_without_other_words_only_the_share_counts(tmp_path: Path) -> None:
    rows = [{**row, "id": str(number), "tags": [], "alternatives": []} for number, row in enumerate(pictures(400) * 9)]
    for row in rows[:60]:
        row["caption"] = "Untitled"
    for row in rows[100:120]:
        row["caption"] = "a cat"
    captions, facts = run(rows, tmp_path)
    assert facts["boilerplate"] == [["untitled", 60]]
    assert captions["0"] == ""
    assert captions["100"] == "a cat"


def test_the_settings_bound_what_is_rare(tmp_path: Path) -> None:
    rows = pictures(300)
    for row in rows[:11]:
        row["caption"] = "Great collection"
    assert run(rows, tmp_path / "a")[1]["boilerplate"] == [["great collection", 11]]
    assert run(rows, tmp_path / "b", boilerplate_count=11)[1]["boilerplate"] == []
    assert run(rows, tmp_path / "c", boilerplate_share=0.04)[1]["boilerplate"] == []


def test_phrases_at_the_ends_of_one_sources_captions_are_cut(tmp_path: Path) -> None:
    rows = pictures(300) + pictures(300, source="other")
    for row in rows[:60]:
        row["caption"] += " - Stock Photo"
    for row in rows[60:120]:
        row["caption"] = f"Free clipart of {row['caption'].removeprefix('a ')}!"
    for row in rows[300:305]:
        row["caption"] += " - Stock Photo"
    captions, facts = run(rows, tmp_path)
    plain = {row["id"]: row["caption"] for row in pictures(300)}
    assert [affix[:3] for affix in facts["affixes"]] == [
        ["set", "end", "stock photo"],
        ["set", "start", "free clipart of"],
    ]
    assert all(captions[f"set:{number}"] == plain[f"set:{number}"] for number in range(60))
    assert captions["set:60"] == "crooked house indoors!" == plain["set:60"].removeprefix("a ") + "!"
    assert captions["other:0"].endswith("Stock Photo"), "too few there"


def test_a_phrase_that_tells_of_the_picture_is_not_cut(tmp_path: Path) -> None:
    rows = pictures(300)
    for row in rows[:60]:
        row["caption"] += ", night sky"
        row["tags"] = [*row["tags"], "night"]
    captions, facts = run(rows, tmp_path)
    assert facts["affixes"] == []
    assert captions["set:0"].endswith("night sky")


def test_phrases_are_cut_whatever_is_between_their_words() -> None:
    pattern = pattern_of([("start", "clipart by"), ("start", "clipart by 0 a+b"), ("end", "stock photo")])
    captions = ["Clipart by X - stock-photo.", "CLIPART BY 12 a+b: cat", "a stock photo of a cat", "Clipartbycat"]
    cut = pc.replace_substring_regex(pa.array(captions), pattern, "").to_pylist()
    assert cut == ["X", "cat", captions[2], captions[3]]


def test_every_row_stays_and_partitions_do_not_matter(tmp_path: Path) -> None:
    rows = pictures(300)
    for row in rows[:90:3]:
        row["caption"] = "Great collection"
    for row in rows[1:90:3]:
        row["caption"] += " | Stock Photo"
    one, five = (context_for(tmp_path / str(n)) for n in (1, 5))
    first = rows_of(text.clean_text(frame_of(rows), one))
    second = rows_of(text.clean_text(frame_of(rows[::-1], partitions=5), five))
    assert first == second
    assert one.facts == five.facts
    assert one.facts["boilerplate"]
    assert one.facts["affixes"]
    assert len(first) == 300
    assert {row["reason"] for row in first.values()} == {None}


@pytest.mark.parametrize("rows", [[], [{"caption": "", "tags": None, "label": None, "alternatives": None}] * 20])
def test_nothing_to_clean(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    captions, facts = run(rows, tmp_path)
    assert set(captions.values()) <= {""}
    assert facts == {"boilerplate": [], "affixes": [], "replaced": 0, "emptied": 0, "changed": 0}


def test_captions_in_other_languages_are_dropped(tmp_path: Path) -> None:
    spoken = {
        "en": "a small dog runs along the beach with a ball",
        "de": "ein kleiner Hund rennt mit einem Ball am Strand entlang",
        "fr": "un petit chien court sur la plage avec une balle",
        "short": "petit chien",
        "name": "Chevrolet Celebrity Wagon 1989 model",
        "ja": "小さな犬がボールを持って海岸を走っています",
        "empty": "",
    }
    rows = [{"id": name, "caption": caption} for name, caption in spoken.items()]
    frame = text.clean_text(frame_of(rows), context_for(tmp_path / "two", languages="en, DE"))
    dropped = {id: row["detail"] for id, row in rows_of(frame).items() if row["reason"] == text.OTHER_LANGUAGE}
    assert dropped == {"fr": "fr", "ja": "ja"}
    frame = text.clean_text(frame_of(rows), context_for(tmp_path / "all"))
    assert set(reasons_of(frame).values()) == {None}
    with pytest.raises(DataError, match="languages names 'english'; ISO 639-1 codes"):
        text.clean_text(frame_of(rows), context_for(tmp_path / "bad", languages="en,english"))
