"""Debian's openclipart packages: pictures from one, titles and tags, as they are, from the SVG files of the other."""

from __future__ import annotations

import html
import re
from pathlib import Path, PurePosixPath

from xray.data.archives import files, open_deb, unpack
from xray.data.folder import write_metadata

PICTURES = PurePosixPath("usr/share/openclipart/png")
TEXTS = PurePosixPath("usr/share/openclipart/svg")
NOT_CLASSES = {"unsorted", "special", "logos"}  # folders that say nothing about what a picture shows

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
    stems = sorted(PurePosixPath(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.png"))
    write_metadata(folder, [_row(stem, *known.get(stem, ("", []))) for stem in stems])


def _row(stem: PurePosixPath, title: str, tags: list[str]) -> dict[str, object]:
    """The metadata of a picture as its makers left it, noise and all: to clean it is for curation."""
    category = stem.parts[0] if len(stem.parts) > 1 else ""
    return {
        "file_name": f"{stem}.png",
        "caption": title,
        "tags": tags,
        "label": "" if category in NOT_CLASSES else category.replace("_", " "),
        "source": "openclipart",
    }


def _place(path: PurePosixPath) -> PurePosixPath | None:
    if not path.is_relative_to(PICTURES) or path.suffix != ".png":
        return None
    return path.relative_to(PICTURES)


def _title_and_tags(svg: bytes) -> tuple[str, list[str]]:
    """By pattern, not by XML parser: many files are not well-formed, and entities could be made to
    explode.
    """
    found = _TITLE.search(svg)
    tags = (_text(tag) for tag in _TAG.findall(svg))
    return _text(found.group(1)) if found else "", [tag for tag in tags if tag]


def _text(raw: bytes) -> str:
    text = re.sub(r"<[^>]*>", " ", raw.decode("utf-8", errors="replace"))
    return " ".join(html.unescape(html.unescape(text)).split())  # some files hold entities of entities
