"""Emoji: pictures and clips named by code points, and emojibase's names, tags and groups for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from xray.data.archives import open_tar, unpack
from xray.data.errors import DataError
from xray.data.folder import clean_tags, write_metadata

NAMES = ("en/data.json", "en/messages.json")
TAGS_IN_CAPTION = 4
SKIN_TONES = {f"{code:04X}" for code in range(0x1F3FB, 0x1F400)}
UNSEEN = {
    "FE0F",
    "FE0E",
    "E007F",
}  # variation selectors and the end of a tag sequence: files leave them out at will
SIGNS = {"200D", "2640", "2642"}  # joiner, female and male sign
PERSON = {"1F468": "1F9D1", "1F469": "1F9D1"}  # man and woman share the person's identity


@dataclass(frozen=True)
class Name:
    """What emojibase says of one emoji."""

    caption: str
    tags: list[str]
    group: str


def unpack_names(tarball: Path, folder: Path) -> None:
    """Unpack the two files of emojibase-data that are used."""
    wanted = {PurePosixPath("package", name): PurePosixPath(name) for name in NAMES}
    with open_tar(tarball) as tar:
        unpack(tar, folder, wanted.get)
    read_names(folder)


def read_names(folder: Path) -> dict[str, Name]:
    """Names by code points (see `code_points`), skin tones included.

    Raises:
        DataError: the files are missing or not as expected.
    """
    try:
        emojis = json.loads((folder / NAMES[0]).read_text(encoding="utf-8"))
        messages = json.loads((folder / NAMES[1]).read_text(encoding="utf-8"))
        groups = {group["order"]: group["message"] for group in messages["groups"]}
        names = {}
        for emoji in emojis:
            tags = clean_tags(emoji.get("tags"))
            group = groups.get(emoji.get("group"), "")
            for variant in (emoji, *emoji.get("skins", [])):
                label = variant["label"]
                more = [tag for tag in tags if tag not in label.lower()][:TAGS_IN_CAPTION]
                names[code_points(variant["hexcode"])] = Name(", ".join([label, *more]), tags, group)
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder} holds no emojibase names as expected ({error!r}); remove it and fetch again"
        ) from error


def convert(tarballs: list[Path], names: Path, folder: Path) -> None:
    """Unpack the emoji files of npm tarballs into `folder` and write `metadata.jsonl`.

    Args:
        tarballs: packages with `assets/<code points>.webp`.
        names: the folder of emojibase.
        folder: new and empty.

    Raises:
        DataError: a damaged tarball.
    """
    for tarball in tarballs:
        with open_tar(tarball) as tar:
            unpack(tar, folder, _place)
    known = read_names(names)
    rows = []
    for path in sorted(folder.glob("*.webp")):
        name = known.get(code_points(path.stem), Name("", [], ""))
        rows.append(
            {
                "file_name": path.name,
                "caption": name.caption,
                "tags": name.tags,
                "label": name.group,
                "identity": f"emoji:{identity(path.stem)}",
                "source": "fluent-emoji-anim",
            }
        )
    write_metadata(folder, rows)


def code_points(name: str) -> str:
    """The canonical form of hexadecimal code points: upper case, four digits at least, "-" between, none
    that nobody sees.
    """
    points = (point.zfill(4) for point in name.upper().replace("_", "-").split("-"))
    return "-".join(point for point in points if point not in UNSEEN)


def identity(name: str) -> str:
    """What an emoji shows, whatever its skin tone, gender and presentation."""
    points = code_points(name).split("-")
    kept = [PERSON.get(point, point) for point in points if point not in SIGNS | SKIN_TONES]
    return "-".join(kept or points)


def _place(path: PurePosixPath) -> PurePosixPath | None:
    return PurePosixPath(path.name) if path.suffix == ".webp" else None
