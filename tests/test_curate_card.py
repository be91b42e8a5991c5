"""The data card: its numbers, its charts, and that it shows hostile data harmlessly and misses nothing it needs."""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curate_finished import STEPS, finished_run
from curate_frames import frame_of
from PIL import Image

from xray.curate import Curated, Settings, card, pipeline
from xray.curate.card import charts, figures, pictures
from xray.curate.frame import keeping
from xray.curate.step import ROWS, stored
from xray.data.shards import encode

VOID = ("meta", "img", "line", "br")


class Page(HTMLParser):
    """The elements of a page, which are all closed, its text, addresses and anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.elements: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.bare: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(self.html)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.elements[tag] += 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        self.ids += [named["id"] or ""] if "id" in named else []
        assert not [name for name in named if name.startswith("on")]
        if (tag == "img" and not named.get("alt")) or (tag == "svg" and not named.get("aria-label")):
            self.bare.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Curated:
    with pytest.MonkeyPatch.context() as patch:
        return finished_run(tmp_path_factory.mktemp("run") / "out", patch)


@pytest.fixture(scope="module")
def page(done: Curated) -> Page:
    return Page(done.out / pipeline.CARD)


def test_nothing_on_the_card_runs_or_is_fetched(page: Page) -> None:
    assert page.elements["script"] == 0
    assert "<script" not in page.html
    assert page.text.count("<script>alert('caption')</script> \"quoted\" & co") >= 6, "captions, tags, facts, details"
    anchors = [address for address in page.addresses if address.startswith("#")]
    assert {anchor[1:] for anchor in anchors} == set(page.ids)
    assert all(a.startswith("data:image/webp;base64,") for a in page.addresses if a not in anchors)
    assert not re.search(r"url\(|@import|https?://", page.html)
    assert not page.bare, "pictures and charts have a text"
    assert page.elements["img"] > 10


def test_the_card_shows_what_happened(page: Page) -> None:
    for heading in ("The steps", "Captions", "Tags", "Duplicates", "Balance", "Sets, clips, splits", "What is kept"):
        assert f">{heading}</h2>" in page.html
    for text in (
        "12 rows went in, 7 samples are in the shards, and each of the 5 others has its reason",
        "decode 12 11 1 not an image",
        "exact duplicates 11 9 2 the same pixels as another",
        "balance 2 copied",
        "1 changed, 1 replaced, 0 emptied",
        "see www.example.com a dog \\u200b a dog",
        "hash 12 \u2013",
        "tag source count share told hash set 11 1 0.01",
        "words cut off at the set samples <script>",
        "By a CLIP model, 8 pairs",
        "What stays reaches 0.50",
        "1 clips in which nothing moves became images",
        "Dogs now dog 1 1",
        "6 spellings became 5 tags",
        "Dogs dog 1",
        "long captions <script>alert('caption')</script> \"quoted\" & co 70 60 5",
        "exact duplicates: 1 groups, the largest of 3",
        "t = 4",
        "entries matched 8 7",
        "test image 1",
        "set 11 6 9",
        "other 1 1 1",
        "clip kept 1 3",
        "image not an image 1 \u2013",
        "caption from text",
        "xray curate 'the source' out",
    ):
        assert text in page.text, text
    assert page.elements["svg"] == 4


def test_the_one_that_stays_is_marked(page: Page) -> None:
    group = page.html.split('class="group"')[1].split("</div>\n</div>")[0]
    figures_ = group.split("<figure")[1:]
    assert ['class="right"' in figure.split(">")[0] for figure in figures_] == [True, False, False]


def test_a_card_without_media_tags_and_balance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = finished_run(tmp_path / "out", monkeypatch, skipped=tuple(name for name in STEPS if name != "clean_text"))
    page = Page(done.out / pipeline.CARD)
    assert page.elements["img"] == 0
    assert "12 rows went in, 12 samples are in the shards" in page.text
    for heading in ("What was left out", "Duplicates", "Balance"):
        assert heading not in page.text


def test_a_card_of_nearly_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"id": "000", "media": "", "caption": "", "tags": []}
    monkeypatch.setattr("curate_finished.source_rows", lambda: [row])
    done = finished_run(tmp_path / "out", monkeypatch, skipped=tuple(STEPS))
    page = Page(done.out / pipeline.CARD)
    assert "1 rows went in" in page.text
    assert ">Tags</h2>" not in page.html


def test_pictures_and_captions_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"media": "image", "caption": "x" * 100_000, "tags": ["y" * 10_000] * 20} for _ in range(30)]
    monkeypatch.setattr("curate_finished.source_rows", lambda: rows)
    monkeypatch.setattr(card, "BUDGET", 2000)
    finished_run(tmp_path / "out", monkeypatch, skipped=tuple(name for name in STEPS if name != "decode"))
    page = Page(tmp_path / "out" / pipeline.CARD)
    assert len(page.html) < 60_000
    assert 0 < page.elements["img"] < 30
    assert sum(len(a) for a in page.addresses if a.startswith("data:")) <= 2000
    assert "x" * 200 not in page.html


def test_a_thumbnail_is_the_middle_frame_with_its_shape() -> None:
    frames = np.zeros((3, 100, 300, 3), np.uint8)
    frames[1] = (255, 0, 0)
    data, _ = encode(frames, "clip")
    uri = pictures.thumbnail(data, 3)
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
        assert image.size == (96, 32)
        red, green, _ = image.convert("RGB").getpixel((48, 16))  # type: ignore[misc]
    assert red > 200
    assert green < 60


def test_damaged_pictures_are_left_out(tmp_path: Path) -> None:
    good, _ = encode(np.zeros((1, 8, 8, 3), np.uint8), "image")
    rows: list[dict[str, Any]] = [
        {"id": "a", "data": good, "frames": 1},
        {"id": "b", "data": b"no", "frames": 1},
        {"id": "c", "data": None},
    ]
    keeping(frame_of(rows)).write_parquet(str(tmp_path / ROWS))
    album = pictures.Album(stored(tmp_path / ROWS), {"a", "b", "c"}, 10**6)
    assert album.picture("a")
    assert [album.picture(id) for id in ("b", "c", "d")] == [None, None, None]


def test_secrets_of_a_url_are_not_shown(tmp_path: Path) -> None:
    assert card.public("https://me:pass@host/a.parquet?X-Signature=1") == "https://host/a.parquet"
    assert card.public("s3://bucket/a*.parquet") == "s3://bucket/a*.parquet"
    assert card.public("what is this?/a@b") == "what is this?/a@b"
    assert card.public("s3://a/b?key=1,https://u:p@c/d") == "s3://a/b,https://c/d"
    settings = Settings(seed=3, address="ray://me@host", test_share=0.2, against="s3://u:p@set")
    line = card.command("https://me:pass@host/a b", tmp_path / "out", settings)
    assert line == "xray curate 'https://host/a b' out seed=3 against=s3://set test_share=0.2"


def spectrum(*tags: list[str], copies: list[int] | None = None) -> figures.Spectrum:
    rows = [{"tags": own} | ({"copies": copies[n]} if copies else {}) for n, own in enumerate(tags)]
    return figures.spectrum(frame_of(rows), "tags", copies=True)


def test_figures_of_frequencies() -> None:
    found = spectrum(["a", "b"], ["a", "c"], ["a"], [], ["a"])
    assert found.counts == [(4, 1), (1, 2)]
    assert (found.items, found.total) == (3, 6)
    assert found.entropy == pytest.approx(-(4 / 6) * math.log2(4 / 6) - 2 / 6 * math.log2(1 / 6))
    assert (found.head(0.01), found.head(0.67), found.head(1)) == pytest.approx((4 / 6, 5 / 6, 1))
    assert (found.above(1), found.above(4), found.above(0.5)) == (4, 0, 6)
    assert found.points() == [(1, 4), (2, 1), (3, 1)]
    assert spectrum(["a", "b"], ["a"], ["c"], copies=[2, 1, 0]).counts == [(3, 1), (2, 1)]
    nothing = spectrum([], [])
    assert (nothing.items, nothing.total, nothing.entropy, nothing.head(0.01), nothing.points()) == (0, 0, 0, 0, [])
    even = spectrum(*[[letter] for letter in "abcdefgh"])
    assert even.entropy == pytest.approx(3)


def test_figures_of_samples() -> None:
    frame = frame_of(
        [
            {"caption": "", "tags": ["b", "a"], "identity": "x", "copies": 2},
            {"caption": "äöü", "tags": ["b", "c"], "identity": "x", "copies": 1},
            {"caption": "e" * 10**5, "tags": [], "source": "other", "copies": 1},
        ]
    )
    assert figures.most_frequent(frame, "tags", 2) == [("b", 2), ("a", 1)]
    assert figures.occurrences(frame, "tags", ["c", "b", "z"]) == {"b": 2, "c": 1}
    assert figures.occurrences(frame, "tags", []) == {}
    shares = dict(zip(figures.EDGES, figures.caption_lengths(frame), strict=True))
    assert {name: share for name, share in shares.items() if share} == pytest.approx({0: 1 / 3, 1: 1 / 3, 4096: 1 / 3})
    assert figures.numbers(frame, "source", most=2) == [
        {"source": "set", "samples": 2, "drawn": 3, "identities": 1},
        {"source": "other", "samples": 1, "drawn": 1, "identities": 0},
    ]
    assert [row["source"] for row in figures.numbers(frame, "source", most=1)] == ["set"]


def test_rank_charts_have_logarithmic_axes() -> None:
    chart = charts.rank_chart([("a <b>", [(1, 1000), (10, 100), (100, 10), (1000, 1)])], description="d <e>")
    points = re.search(r'points="([^"]+)"', chart)
    assert points
    places = [tuple(map(float, place.split(","))) for place in points[1].split()]
    steps = {(round(b[0] - a[0], 0), round(b[1] - a[1], 0)) for a, b in pairwise(places)}
    assert len(steps) == 1, "a power law is a straight line"
    assert places[0] == (charts.LEFT, charts.TOP)
    assert places[-1] == (charts.WIDTH - charts.RIGHT, charts.HEIGHT - charts.BOTTOM)
    assert chart.count(">1k<") == 2
    assert 'aria-label="d &lt;e&gt;"' in chart
    two = charts.rank_chart([("a <b>", [(1, 5)]), ("c", [])], description="", mark=("t = 2", 2))
    assert "a &lt;b&gt;" in two
    assert "t = 2" in two
    assert "t = 9" not in charts.rank_chart([("a", [(1, 5)])], description="", mark=("t = 9", 9))
    assert "nothing to draw" in charts.rank_chart([("a", [])], description="")
    assert "nan" not in charts.rank_chart([("a", [(1, 1)])], description="")


def test_histograms_scale_to_the_tallest() -> None:
    chart = charts.histogram(["0", "1"], [("a", [0.5, 0.0]), ("b", [0.25, 0.25])], description="", name="x")
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"', chart)]
    full = charts.HEIGHT - charts.TOP - charts.BOTTOM
    assert heights == pytest.approx([full, full / 2, 0, full / 2], abs=0.1)
    assert ">50%<" in chart
    assert ">60%<" not in chart
    assert "nothing to draw" in charts.histogram(["0"], [("a", [0.0])], description="", name="x")


def test_what_changed_in_a_text_is_marked() -> None:
    assert card.marked("a big  dog", "a dog") == (
        [("a ", False), ("big ", True), ("dog", False)],
        [("a ", False), ("dog", False)],
    )
    was, now = card.marked("x" * 10**6 + "\u200b", "")
    assert (len(was), len(was[0][0]), now) == (1, 110, [])


def test_numbers_and_long_texts() -> None:
    assert [charts._number(value) for value in (1, 10, 1000, 10**6, 10**9)] == ["1", "10", "1k", "1M", "1G"]
    assert card.shorten("a  b\n c") == "a b c"
    assert card.shorten("x" * 10**6) == "x" * 109 + "…"
    assert card.shorten("x" * 110) == "x" * 110
