"""Debian's openclipart packages: pictures from one, titles and tags from the SVG files of the other."""

from __future__ import annotations

import html
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from xray.data.archives import files, open_deb, unpack
from xray.data.folder import clean_tags, write_metadata

PICTURES = PurePosixPath("usr/share/openclipart/png")
TEXTS = PurePosixPath("usr/share/openclipart/svg")
NOT_CLASSES = {"unsorted", "special", "logos"}  # folders that say nothing about what a picture shows
REPEATED_TITLE = 10  # a title on more pictures than this names a collection, not a picture
TAGS_IN_CAPTION = 5
COMMON_TAG = 0.05  # a tag on more than this share of the pictures, and on more than 20 ...
NAMED_BY_TAG = 0.01  # ... of which fewer than this share name it in title or path, says nothing

_TITLE = re.compile(rb"<dc:title[^>]*>(.*?)</dc:title>", re.DOTALL)
_TAG = re.compile(rb"<rdf:li[^>]*>(.*?)</rdf:li>", re.DOTALL)


def convert(images: Path, texts: Path, folder: Path) -> None:
    """Unpack the pictures into `folder` and write `metadata.jsonl`.

    Args:
        images: the package openclipart-png.
        texts: the package openclipart-svg.
        folder: new and empty.

    Raises:
        DataError: a damaged package.
        SourceUnavailable: `dpkg-deb` is missing.
    """
    with open_deb(texts) as tar:
        known = {
            path.relative_to(TEXTS).with_suffix(""): _title_and_tags(data)
            for path, data in files(tar)
            if path.is_relative_to(TEXTS) and path.suffix == ".svg"
        }
    with open_deb(images) as tar:
        unpack(tar, folder, _place)
    stems = sorted(path.relative_to(folder).with_suffix("") for path in folder.rglob("*.png"))
    rows = [(PurePosixPath(stem), *known.get(PurePosixPath(stem), ("", []))) for stem in stems]
    write_metadata(folder, describe(rows))


def describe(rows: list[tuple[PurePosixPath, str, list[str]]]) -> list[dict[str, object]]:
    """Metadata rows from (path without suffix, title, tags).

    The caption is the title and up to five tags; where the title is shared by many pictures, the words of
    the file's name stand in for it. The label is the top folder.
    """
    titles = Counter(title for _, title, _ in rows)
    noise = _noise_tags(rows)
    described: list[dict[str, object]] = []
    for stem, title, tags in rows:
        tags = [tag for tag in tags if tag not in noise and tag not in NOT_CLASSES]
        if not title or titles[title] > REPEATED_TITLE:
            title = " ".join(_words(stem.name))
        spoken = title.lower()
        more = [tag for tag in tags if tag not in spoken][:TAGS_IN_CAPTION]
        category = stem.parts[0] if len(stem.parts) > 1 else ""
        described.append(
            {
                "file_name": f"{stem}.png",
                "caption": ", ".join(part for part in (title, *more) if part),
                "tags": tags,
                "label": "" if category in NOT_CLASSES else category.replace("_", " "),
                "source": "openclipart",
            }
        )
    return described


def _place(path: PurePosixPath) -> PurePosixPath | None:
    if not path.is_relative_to(PICTURES) or path.suffix != ".png":
        return None
    return path.relative_to(PICTURES)


def _title_and_tags(svg: bytes) -> tuple[str, list[str]]:
    """By pattern, not by XML parser: many files are not well-formed, and entities could be made to
    explode.
    """
    found = _TITLE.search(svg)
    title = " ".join(_text(found.group(1)).replace("_", " ").split()) if found else ""
    return title, clean_tags([_text(tag) for tag in _TAG.findall(svg)])


def _text(raw: bytes) -> str:
    text = re.sub(r"<[^>]*>", " ", raw.decode("utf-8", errors="replace"))
    return html.unescape(html.unescape(text))  # some files hold entities of entities


def _words(name: str) -> list[str]:
    """Words of three letters or more in a file name; numbers and initials go."""
    return [word for word in re.findall(r"[a-z]+", name.lower()) if len(word) >= 3]


def _noise_tags(rows: list[tuple[PurePosixPath, str, list[str]]]) -> set[str]:
    """Tags that so many pictures carry, with so few naming them otherwise, that they were put on by a
    machine.
    """
    carried: Counter[str] = Counter()
    named: Counter[str] = Counter()
    for stem, title, tags in rows:
        text = f"{stem} {title}".lower().replace("_", " ")
        carried.update(tags)
        named.update(tag for tag in tags if tag in text)
    return {
        tag
        for tag, count in carried.items()
        if count > max(20, COMMON_TAG * len(rows)) and named[tag] < NAMED_BY_TAG * count
    }
