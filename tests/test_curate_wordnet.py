"""WordNet's names, plurals and synonyms, from files of a few words."""

from __future__ import annotations

from pathlib import Path

import pytest
from wordnet_files import write_wordnet

pytest.importorskip("daft", reason="curation needs Daft")

from xray.curate import wordnet
from xray.curate.wordnet import Lexicon, digest_of
from xray.data.errors import DataError, SourceUnavailable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_wordnet(tmp_path / "wordnet")


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("flowers", "flower"),
        ("red flowers", "red flower"),
        ("men", "man"),
        ("glasses", "glasses"),  # not "glass"
        ("spectacles", "glasses"),
        ("hearts", "heart"),  # a game, too, but rarely
        ("automobiles", "car"),
        ("auto", "car"),
        ("motorcar", "car"),  # never met, but it has one sense only
        ("machine", "machine"),  # its second sense is a car
        ("kitty", "kitty"),  # which of two senses is unknown
        ("frogs", "frog"),  # not "toad"
        ("kids", "child"),
        ("thought", "thought"),  # too often something else than an idea
        ("sundown", "sunset"),
        ("cars and flowers", "cars and flowers"),
        ("usa", "united states"),
        ("hot dogs", "hot dog"),
        ("bus", "bus"),
        ("runs", "runs"),  # no noun
        ("unknown things", "unknown things"),
        ("", ""),
        ("кошки", "кошки"),
    ],
)
def test_a_tag_gets_the_commonest_name(tag: str, name: str, folder: Path) -> None:
    lexicon = Lexicon.open(str(folder))
    assert lexicon is not None
    assert lexicon.canonical(tag) == name
    assert lexicon.canonical(name) == name


def test_names_of_every_kind_of_word(folder: Path) -> None:
    lexicon = Lexicon(folder)
    names = lexicon.lemmas()
    assert names == sorted(names)
    assert {"run", "hot dog", "united states", "cat"} <= set(names)
    assert "hot dog" in lexicon
    assert "run" not in lexicon


def test_the_digest_is_of_what_is_read(folder: Path) -> None:
    before = digest_of(str(folder))
    assert before == Lexicon(folder).digest
    (folder / "cntlist.rev").write_text("")
    assert digest_of(str(folder)) != before


def test_without_wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert Lexicon.open("off") is None
    assert digest_of("off") is None
    asked: list[str] = []

    def unreachable(name: str, cache: Path, progress: bool) -> Path:
        asked.append(name)
        raise SourceUnavailable("apt-get is not on PATH")

    monkeypatch.setattr(wordnet, "fetch", unreachable)
    monkeypatch.setenv("XRAY_CACHE", str(tmp_path))
    assert Lexicon.open("auto") is None
    assert digest_of("auto") is None, "all steps of a run go without it"
    assert asked == ["wordnet"]
    assert capfd.readouterr().err == "going on without WordNet: apt-get is not on PATH\n"


def test_auto_reads_what_is_fetched(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordnet, "fetch", lambda name, cache, progress: folder)
    monkeypatch.setenv("XRAY_CACHE", str(tmp_path / "cache"))
    lexicon = Lexicon.open("auto", progress=False)
    assert lexicon is not None
    assert lexicon.digest == digest_of(str(folder))


@pytest.mark.parametrize("harm", ["missing", "index", "counts", "data"])
def test_damaged_files_are_named(harm: str, folder: Path) -> None:
    name, text = {
        "missing": ("noun.exc", None),
        "index": ("index.noun", "cat n\n"),
        "counts": ("noun.exc", "men\n"),
        "data": ("data.noun", "no synsets\n" * 200),
    }[harm]
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(DataError, match="WordNet"):
        Lexicon(folder).canonical("automobile")
