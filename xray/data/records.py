"""Samples of tar shards before they are decoded: what WebDataset members say about them.

A sample is a media member with `json` (the fields of `shards.Entry`, or any object with "caption"), `txt`
(the caption) and `cls` (the label) beside it, each of them optional; so shards of this package, of
img2dataset and of WebDataset's TarWriter are read alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from xray.data.dataset import MEDIA, Sample
from xray.data.decoding import decode
from xray.data.errors import DecodeError
from xray.data.shard_files import Group
from xray.data.shards import decode_stored

IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
VIDEOS = ("mp4", "webm", "mkv", "avi", "mov", "m4v")
EXTENSIONS = frozenset((*IMAGES, *VIDEOS, "json", "txt", "cls"))


@dataclass(frozen=True, slots=True)
class Record:
    """A sample as it is stored.

    Attributes:
        id: the json's "id", else the key in the shard.
        media: "image" or "clip": the json's, else by extension; an animation without json is an image.
        extension: of the media member, lower-case, without a dot.
        caption: the json's, else the txt member.
        tags: the json's list or comma-separated string.
        label: the json's, else the cls member.
        split: the json's, "" if none.
        source: the json's, "" if none.
        identity: the json's, "" if none.
        frames: the json's, 1 if none.
        data: the bytes of the media member.
    """

    id: str
    media: str
    extension: str
    caption: str
    tags: list[str]
    label: str
    split: str
    source: str
    identity: str
    frames: int
    data: bytes = field(repr=False)

    @property
    def is_strip(self) -> bool:
        """Whether its frames stand one below the other in an image, as `shards.encode` stores a clip."""
        return self.media == "clip" and self.frames > 1 and self.extension in ("png", "jpg", "webp")


def read_record(group: Group) -> Record | None:
    """The sample that a group of members holds, None if there is no media among them.

    Raises:
        DecodeError: its text or JSON is damaged.
    """
    members = group.members
    extension = next((name for name in members if name in IMAGES or name in VIDEOS), None)
    if extension is None:
        return None
    try:
        facts = json.loads(members["json"]) if "json" in members else {}
        caption, label = (members[name].decode().strip() if name in members else "" for name in ("txt", "cls"))
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise DecodeError(f"its text or JSON is damaged: {error}") from error
    if not isinstance(facts, dict):
        facts = {}
    media = facts.get("media")
    frames = facts.get("frames")
    return Record(
        id=_text(facts.get("id")) or group.key,
        media=media if media in MEDIA else "clip" if extension in VIDEOS else "image",
        extension=extension,
        caption=_text(facts.get("caption")) or caption,
        tags=_tags(facts.get("tags")),
        label=_text(facts.get("label")) or label,
        split=_text(facts.get("split")),
        source=_text(facts.get("source")),
        identity=_text(facts.get("identity")),
        frames=frames if isinstance(frames, int) and frames > 0 else 1,
        data=members[extension],
    )


def decode_record(record: Record, max_side: int, max_frames: int) -> Sample:
    """Decode a sample: a strip written by `shards.encode` as it is, other media shrunk to `max_side` pixels
    and `max_frames` evenly spread frames.

    Raises:
        DecodeError: the media is damaged.
    """
    is_clip = record.media == "clip"
    if record.is_strip:
        frames = decode_stored(record.data, record.frames)
    else:
        count = max_frames if is_clip else 1
        frames = decode(record.data, max_side=max_side, max_frames=count, still=not is_clip).frames
    return Sample(
        id=record.id,
        media=record.media,
        caption=record.caption,
        tags=record.tags,
        label=record.label,
        image=frames if is_clip else frames[0],
        source=record.source,
    )


def _text(value: Any) -> str:
    """Text and numbers as text that can be encoded (JSON can hold half a character), "" for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return str(value).encode(errors="replace").decode()


def _tags(value: Any) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [tag for part in parts if (tag := _text(part).strip())]
