"""The metadata, and the entries of it that captions hold."""

from __future__ import annotations

import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_frames import context_for, frame_of, reasons_of, rows_of

from xray.curate import matching, metadata
from xray.curate.settings import Settings
from xray.data.errors import DataError


def listed(folder: Path, *entries: str) -> dict[str, Any]:
    """Settings that name a list of these entries."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "list.txt"
    path.write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")
    return {"metadata": str(path), "wordnet": "off"}


def found_in(folder: Path, captions: list[str], *entries: str) -> list[list[str]]:
    """The entries that the step finds in each caption."""
    context = context_for(folder / "match", **listed(folder, *entries))
    rows = rows_of(matching.match(frame_of({"caption": caption} for caption in captions), context))
    names = pq.read_table(context.folder / matching.ENTRIES)["entry"].to_pylist()
    return [[names[entry] for entry in rows[id]["entries"]] for id in sorted(rows, key=int)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A  Red\tfox", ["a", "red", "fox"]),
        ("fox,(jumps)!", ["fox", ",", "(", "jumps", ")", "!"]),
        ("ﬁre \uff23\uff41\uff54", ["fire", "cat"]),
        ("soft\u00adware zero\u200bwidth", ["software", "zerowidth"]),
        ("日本の写真", ["日", "本", "の", "写", "真"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("I ❤️ ЁЖИК שָׁלוֹם", ["i", "❤", "ёжик", "שָׁלוֹם"]),
        ("Café cafe\u0301 ｶﾞ 한국", ["café", "café", "ガ", "한국"]),
        ("t-shirt c++", ["t", "-", "shirt", "c", "+", "+"]),
        (" \n", []),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    words = [unicodedata.normalize("NFKD", word) for word in words]
    assert metadata.words(pa.array(["before", text, "after"])).to_pylist() == [["before"], words, ["after"]]


def test_an_entry_is_found_between_the_boundaries_of_words_only(tmp_path: Path) -> None:
    captions = ["A red fox!", "foxes", "firefox", "fox", "red  FOX", "Fox-red", "the red", "fox is next", ""]
    found = found_in(tmp_path, captions, "fox", "red fox", "red")
    all_three, both = ["fox", "red fox", "red"], ["fox", "red"]
    assert found == [all_three, [], [], ["fox"], all_three, both, ["red"], ["fox"], []]


def test_an_entry_does_not_reach_from_one_caption_into_the_next(tmp_path: Path) -> None:
    assert found_in(tmp_path, ["a red", "fox", "red", "", "fox"], "red fox", "fox") == [[], ["fox"], [], [], ["fox"]]


def test_scripts_without_spaces_match_anywhere(tmp_path: Path) -> None:
    captions = ["これは日本の写真です", "日と本", "ยินดีต้อนรับแมว", "写真 2 photos"]
    found = found_in(tmp_path, captions, "日本", "写真", "แมว", "photos")
    assert ["".join(entries).replace(" ", "") for entries in found] == ["日本写真", "", "แมว", "写真photos"]


def test_matching_agrees_with_a_plain_search(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["a", "b", "ab", "ba", "c", "b-c"]
    entries = sorted({" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(60)})
    captions = [draw.choice(["", ", ", " "]).join(draw.choices(words, k=draw.randint(0, 9))) for _ in range(3000)]
    ordered = metadata.from_list(listed(tmp_path, *entries)["metadata"]).entries

    def plain(caption: str) -> list[str]:
        text = re.sub("([-,])", r" \1 ", f" {caption} ")
        text = re.sub(" +", " ", text)
        return [entry for entry in ordered if f" {entry} " in text]

    assert found_in(tmp_path, captions, *entries) == [plain(caption) for caption in captions]


def test_more_captions_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "ROWS_AT_ONCE", 7)
    captions = [f"a{number % 3} b{number % 5}" for number in range(40)]
    entries = ["a0", "a1", "a2", "b0", "b1", "b2", "b3", "b4"]
    assert found_in(tmp_path, captions, *entries) == [caption.split() for caption in captions]


def test_a_caption_of_a_million_characters(tmp_path: Path) -> None:
    captions = ["red fox " * 125_000, "x" * 1_000_000, "fox"]
    assert found_in(tmp_path, captions, "fox", "red fox", "fox red") == [["fox", "red fox", "fox red"], [], ["fox"]]


def test_an_entry_counts_once_in_a_caption(tmp_path: Path) -> None:
    context = context_for(tmp_path / "match", **listed(tmp_path, "fox", "dog", "cat"))
    captions = ["fox fox fox", "dog fox", "fox", "nothing", ""]
    frame = matching.match(frame_of({"caption": caption} for caption in captions), context)
    assert set(reasons_of(frame).values()) == {None}
    assert pq.read_table(context.folder / matching.ENTRIES).to_pydict() == {
        "entry": ["fox", "dog", "cat"],
        "kind": ["list"] * 3,
        "count": [3, 1, 0],
    }
    facts = context.facts
    assert (facts["entries"], facts["captions"], facts["without_entry"]) == (3, 4, 1)
    assert facts["top"] == [["fox", 3], ["dog", 1], ["cat", 0]]
    assert facts["distribution"] == {
        "matches": 4,
        "matched": 2,
        "entropy": pytest.approx(0.811278, abs=1e-6),
        "head_share": 0.75,
    }


def test_no_captions_and_no_rows(tmp_path: Path) -> None:
    assert found_in(tmp_path, ["", ""], "fox") == [[], []]
    context = context_for(tmp_path / "none", **listed(tmp_path, "fox"))
    assert rows_of(matching.match(frame_of([]), context)) == {}
    context = context_for(tmp_path / "built", wordnet="off")
    assert rows_of(matching.match(frame_of([]), context)) == {}


def test_a_list_is_read_once_in_order_and_its_bad_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffRed Fox\r\n\n  dog \nred  fox\nDOG\n\u200b\nT-shirt\n日本".encode())
    made = metadata.from_list(str(path))
    assert made.entries == ["red fox", "dog", "t - shirt", "日 本"]
    assert made.kinds == ["list"] * 4
    assert made.facts == {"lines": 8, "blank": 2, "duplicate": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"list\.txt cannot be read \(No such file or directory\); a text file is needed"),
        (b"", r"list\.txt holds no entry in 0 lines; one entry a line is needed"),
        (b"\n \n\n", r"list\.txt holds no entry in 3 lines"),
        (b"fox\ndog\nr\xe9sum\xe9\n", r"list\.txt is not UTF-8 in line 3; a text in UTF-8 is needed"),
    ],
)
def test_bad_lists(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        metadata.from_list(str(path))


def test_another_list_computes_the_step_anew(tmp_path: Path) -> None:
    def inputs(*entries: str) -> Any:
        assert matching.STEP.inputs is not None
        return matching.STEP.inputs("source", Settings(**listed(tmp_path, *entries)))

    first = inputs("fox")
    assert inputs("fox") == first
    assert inputs("fox", "dog") != first


def corpus() -> list[dict[str, Any]]:
    """Captions of 40 frequent words in random order, and a few that are not random."""
    draw = random.Random(0)
    common = [f"w{chr(97 + a)}{chr(97 + b)}" for a in range(8) for b in range(5)]
    captions = [" ".join(draw.choices(common, k=8)) for _ in range(2000)]
    captions += [f"{draw.choice(common)} hot dog {draw.choice(common)}" for _ in range(10)]
    captions += [f"ice {draw.choice(common)} cream" for _ in range(10)] + ["hot, dog"] * 3 + ["once 12 . x", "日本"] * 2
    return [{"caption": caption, "tags": ["Food, hot", "hot"][: n % 3]} for n, caption in enumerate(captions)]


def test_words_pairs_and_tags_of_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        @staticmethod
        def open(setting: str, progress: bool) -> Words:
            return Words()

        def lemmas(self) -> list[str]:
            return ["Hot-dog", "zebra", "hot"]

    monkeypatch.setattr(metadata, "Lexicon", Words)
    rows = corpus()
    rows[0]["caption"] += " hapax"
    made = metadata.make(frame_of(rows), context_for(tmp_path))
    by_kind = {
        kind: [e for e, k in zip(made.entries, made.kinds, strict=True) if k == kind] for kind in set(made.kinds)
    }
    assert made.entries == sorted(made.entries)
    assert by_kind["wordnet"] == ["hot", "hot - dog", "zebra"]
    assert by_kind["tag"] == ["food , hot"]
    # "hot, dog" is no pair, "ice" and "cream" are apart, and neighbours by chance are not together often enough
    assert by_kind["pair"] == ["hot dog"]
    assert len(by_kind["word"]) == 40 + len(["dog", "ice", "cream", "once", "日", "本"])
    assert {"once", "日", "dog"} < set(by_kind["word"])
    assert not {"hapax", "12", ".", "x", ","} & set(made.entries)
    assert made.facts["captions"] == len(rows)


def test_a_word_has_to_be_the_more_frequent_the_larger_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "SHARE", 0.01)
    rows = [{"caption": f"{'often ' if n < 10 else ''}{'seldom ' if n < 9 else ''}w"} for n in range(1000)]
    made = metadata.make(frame_of(rows), context_for(tmp_path, wordnet="off"))
    assert [e for e, kind in zip(made.entries, made.kinds, strict=True) if kind == "word"] == ["often"]


def test_the_metadata_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = corpus()
    made = metadata.make(frame_of(rows), context_for(tmp_path / "a", wordnet="off"))
    again = metadata.make(frame_of(rows[::-1]), context_for(tmp_path / "b", wordnet="off"))
    assert (made.entries, made.kinds) == (again.entries, again.kinds)
    assert list((tmp_path / "a").glob("*.parquet")) == []
