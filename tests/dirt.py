"""Dirt for a clean set of images: what crawled pairs suffer from, put there on purpose, with the truth beside it.

What the pipeline is meant to find, and what counts as found:

    boilerplate      a caption that many samples carry and that says nothing: it is in no caption that comes out
    constant tags    a tag put on samples whatever they show: it is among no sample's tags that come out
    near duplicates  a copy, re-encoded, resized, brighter or a little cropped: of the two only one comes out
    truncated files  the end of the file is missing: the sample is dropped
    swapped          the caption of another sample: the sample is dropped, given a CLIP checkpoint

Each kind has its own share of the samples, no sample has two kinds, and a copy is a sample more.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from xray.data.folder import read_folder, write_metadata
from xray.data.shapes import samples

KINDS = ("swapped", "boilerplate", "constant tag", "near duplicate", "truncated")
BOILERPLATE = (
    "Clip art from the open collection",
    "Untitled drawing",
    "Image uploaded by a user, all rights waived",
    "free vector graphics download",
)
CONSTANT_TAG = "webcollect"


Rows = dict[str, dict[str, object]]


@dataclass
class Truth:
    """What was done to a set.

    Attributes:
        kind: of every file name that is not as it was, one of `KINDS`; for "near duplicate" those of the copies.
        original: file name of every copy to that of the file it shows again.
        change: file name of every copy to how it differs: a name of `COPIES`.
    """

    kind: dict[str, str] = field(default_factory=dict)
    original: dict[str, str] = field(default_factory=dict)
    change: dict[str, str] = field(default_factory=dict)

    def of(self, kind: str) -> set[str]:
        """The file names with this kind of dirt."""
        return {name for name, own in self.kind.items() if own == kind}


def shapes_folder(folder: Path, size: int, seed: int = 0, image_size: int = 96) -> Path:
    """The generated shapes, images only, as a folder of PNG files with captions and tags: a clean set."""
    folder.mkdir(parents=True)
    rows = []
    for entry, frames in samples(size, seed, image_size=image_size, clip_share=0.0):
        name = f"{entry.id}.png"
        Image.fromarray(frames[0]).save(folder / name)
        rows.append({"file_name": name, "caption": entry.caption, "tags": entry.tags})
    write_metadata(folder, rows)
    return folder


def soil(clean: Path, dirty: Path, *, share: float = 0.1, seed: int = 0, kinds: Iterable[str] = KINDS) -> Truth:
    """Write a folder of images anew with dirt in it.

    Args:
        clean: an image folder with `metadata.jsonl`, as `read_folder` takes it.
        dirty: the folder to make.
        share: of the samples, for each kind.
        seed: decides which.
        kinds: of `KINDS`.

    Returns:
        What was done, by file name; `read` makes an id of it as "<name of dirty>:<file name>".
    """
    records = sorted(read_folder(clean).records, key=lambda record: record.id)
    rng = random.Random(seed)
    names = [record.path.relative_to(clean).as_posix() for record in records]
    rows: Rows = {
        name: {"file_name": name, "caption": record.caption, "tags": list(record.tags), "identity": record.identity}
        for name, record in zip(names, records, strict=True)
    }
    dirty.mkdir(parents=True)
    for name in names:
        (dirty / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clean / name, dirty / name)
    truth = Truth()
    shuffled = rng.sample(names, len(names))
    count = round(share * len(names))
    for place, kind in enumerate(kinds):
        chosen = shuffled[place * count : (place + 1) * count]
        _DIRT[kind](dirty, rows, chosen, truth, rng)
    write_metadata(dirty, [dict(rows[name]) for name in sorted(rows)])
    return truth


def _swapped(dirty: Path, rows: Rows, chosen: list[str], truth: Truth, rng: random.Random) -> None:
    """Each takes the next one's caption; a sample that gets its own words from another is as it was."""
    captions = [rows[name]["caption"] for name in chosen]
    for name, caption in zip(chosen, [*captions[1:], *captions[:1]], strict=True):
        if caption != rows[name]["caption"]:
            rows[name]["caption"] = caption
            truth.kind[name] = "swapped"


def _boilerplate(dirty: Path, rows: Rows, chosen: list[str], truth: Truth, rng: random.Random) -> None:
    for name in chosen:
        rows[name]["caption"] = rng.choice(BOILERPLATE)
        truth.kind[name] = "boilerplate"


def _constant_tag(dirty: Path, rows: Rows, chosen: list[str], truth: Truth, rng: random.Random) -> None:
    for name in chosen:
        tags = rows[name]["tags"]
        assert isinstance(tags, list)
        tags.insert(rng.randint(0, len(tags)), CONSTANT_TAG)
        truth.kind[name] = "constant tag"


def _near_duplicate(dirty: Path, rows: Rows, chosen: list[str], truth: Truth, rng: random.Random) -> None:
    for number, name in enumerate(chosen):
        change = list(COPIES)[number % len(COPIES)]
        path = PurePosixPath(name)
        with Image.open(dirty / name) as image:
            copied = COPIES[change](_on_white(image))
        suffix = ".jpg" if change == "re-encoded" else ".png"
        copy = str(path.with_name(f"{path.stem}-copy{suffix}"))
        copied.save(dirty / copy, quality=80)
        rows[copy] = {**rows[name], "file_name": copy}
        truth.kind[copy], truth.original[copy], truth.change[copy] = "near duplicate", name, change


def _truncated(dirty: Path, rows: Rows, chosen: list[str], truth: Truth, rng: random.Random) -> None:
    for name in chosen:
        data = (dirty / name).read_bytes()
        (dirty / name).write_bytes(data[: int(len(data) * rng.uniform(0.3, 0.9))])
        truth.kind[name] = "truncated"


Soiler = Callable[[Path, Rows, list[str], Truth, random.Random], None]
_DIRT: dict[str, Soiler] = dict(
    zip(KINDS, (_swapped, _boilerplate, _constant_tag, _near_duplicate, _truncated), strict=True)
)


def _on_white(image: Image.Image) -> Image.Image:
    """What is seen of a picture, less transparent margins: a copy of a screen."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    return ground.convert("RGB")


def _re_encoded(image: Image.Image) -> Image.Image:
    """As it will be after JPEG of quality 80."""
    return image


def _resized(image: Image.Image) -> Image.Image:
    """To nine tenths of its side."""
    return image.resize((max(1, round(0.9 * image.width)), max(1, round(0.9 * image.height))))


def _brighter(image: Image.Image) -> Image.Image:
    """By 2%."""
    return image.point(lambda value: min(255, round(1.02 * value)))


def _cropped(image: Image.Image) -> Image.Image:
    """By 1% of each side, at least a pixel."""
    x, y = max(1, round(0.01 * image.width)), max(1, round(0.01 * image.height))
    return image.crop((x, y, image.width - x, image.height - y))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "re-encoded": _re_encoded,
    "resized": _resized,
    "brighter": _brighter,
    "cropped": _cropped,
}


@dataclass(frozen=True)
class Found:
    """How well one kind was found."""

    recall: float
    precision: float
    count: int

    def __str__(self) -> str:
        return f"recall {self.recall:.3f}, precision {self.precision:.3f} of {self.count}"


def found(wanted: Set[Any], named: Set[Any]) -> Found:
    """Recall and precision of what was named against what there is; both 1 where there is nothing to say."""
    both = len(wanted & named)
    return Found(both / len(wanted) if wanted else 1.0, both / len(named) if named else 1.0, len(wanted))
