"""A deterministic set of coloured shapes, still and in motion, with captions, tags and labels: no
download, seconds to make.

It serves the tests, and machines with no registry at hand.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from xray.data.clean import split_of
from xray.data.errors import DataError
from xray.data.shards import SHARD_BYTES, Entry, ShardWriter, encode, extension_of

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 210, 40),
    "green": (45, 150, 70),
    "cyan": (60, 200, 210),
    "blue": (40, 80, 200),
    "purple": (130, 60, 170),
    "pink": (245, 140, 180),
    "brown": (125, 80, 45),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
    "gray": (130, 130, 130),
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "diamond",
    "cross",
    "ring",
    "heart",
    "crescent",
    "hexagon",
    "arrow",
    "arch",
)
SIZES = {
    "small": 0.16,
    "medium": 0.24,
    "large": 0.34,
}  # half the shape's side, as a share of the image's side
PLACES = {
    "in the center": (0.0, 0.0),
    "at the top": (0.0, -1.0),
    "at the bottom": (0.0, 1.0),
    "on the left": (-1.0, 0.0),
    "on the right": (1.0, 0.0),
    "at the top left": (-1.0, -1.0),
    "at the top right": (1.0, -1.0),
    "at the bottom left": (-1.0, 1.0),
    "at the bottom right": (1.0, 1.0),
}
MOTIONS = {
    "moving left": (-1.0, 0.0),
    "moving right": (1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
    "moving up left": (-1.0, -1.0),
    "moving up right": (1.0, -1.0),
    "moving down left": (-1.0, 1.0),
    "moving down right": (1.0, 1.0),
}

MAX_SIZE = 20_000  # there are 42,768 still scenes and 38,016 moving ones


def generated(
    root: str | Path,
    size: int = 600,
    seed: int = 0,
    *,
    image_size: int = 32,
    num_frames: int = 4,
    clip_share: float = 1 / 3,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the set of coloured shapes as a dataset folder.

    A caption reads "a large red circle at the top on a blue background" or "... moving left on a blue
    background"; the tags are its words, the label is the shape (one of 12), and no two samples share a
    caption.

    Args:
        root: the dataset folder to make; new or empty.
        size: number of samples, images and clips together.
        seed: another seed, another set; the same seed, the same bytes.
        image_size: side of the square frames, in pixels.
        num_frames: frames of a clip.
        clip_share: share of the samples that are clips.
        shard_bytes: a shard is closed once it holds this many bytes.

    Returns:
        `root` as a path.

    Raises:
        DataError: an argument out of range, or `root` cannot be written.
    """
    if size < 1:
        raise DataError(f"size is {size}; at least 1 sample is needed")
    facts = {"generated_size": str(size), "generated_seed": str(seed), "image_size": str(image_size)}
    made = samples(size, seed, image_size=image_size, num_frames=num_frames, clip_share=clip_share)
    with ShardWriter(root, shard_bytes=shard_bytes, facts=facts) as writer:
        for entry, frames in made:
            writer.add(entry, encode(frames, entry.media)[0])
    return Path(root)


def samples(
    size: int, seed: int = 0, *, image_size: int = 32, num_frames: int = 4, clip_share: float = 1 / 3
) -> Iterator[tuple[Entry, np.ndarray]]:
    """The samples of `generated`, one by one, as (entry, frames); frames are uint8 (T, image_size,
    image_size, 3).

    Raises:
        DataError: an argument out of range.
    """
    if not 0 <= size <= MAX_SIZE:
        raise DataError(f"size is {size}; 0 to {MAX_SIZE} samples can be generated")
    if image_size < 8 or num_frames < 2 or not 0 <= clip_share <= 1:
        raise DataError(
            f"image_size, num_frames and clip_share are {image_size}, {num_frames} and {clip_share}; "
            "at least 8, at least 2 and 0 to 1 are needed"
        )
    return _samples(size, seed, image_size, num_frames, clip_share)


def _samples(
    size: int, seed: int, image_size: int, num_frames: int, clip_share: float
) -> Iterator[tuple[Entry, np.ndarray]]:
    rng = random.Random(seed)
    num_clips = round(size * clip_share)
    scenes = [("image", words) for words in _combinations(rng, list(PLACES), size - num_clips)]
    scenes += [("clip", words) for words in _combinations(rng, list(MOTIONS), num_clips)]
    rng.shuffle(scenes)
    for number, (kind, words) in enumerate(scenes):
        size_word, colour, shape, ground, where = words
        frames = _draw(rng, kind, words, image_size, num_frames)
        caption = f"a {size_word} {colour} {shape} {where} on a {ground} background"
        entry = Entry(
            id=f"generated-{number:05d}",
            media=kind,
            extension=extension_of(frames, kind),
            caption=caption,
            tags=[shape, colour, size_word, f"{ground} background", where],
            label=shape,
            split=split_of(caption, seed),
            source="generated",
            identity=caption,
            width=image_size,
            height=image_size,
            frames=len(frames),
        )
        yield entry, frames


def _combinations(rng: random.Random, wheres: list[str], count: int) -> list[tuple[str, str, str, str, str]]:
    """`count` distinct (size, colour, shape, background, where), evenly spread over the shapes."""
    scenes = [
        (size, colour, ground, where)
        for size, colour, ground, where in itertools.product(SIZES, COLOURS, COLOURS, wheres)
        if colour != ground
    ]
    per_shape = {shape: rng.sample(scenes, min(len(scenes), -(-count // len(SHAPES)))) for shape in SHAPES}
    rounds = itertools.chain.from_iterable(
        ((size, colour, shape, ground, where) for shape, (size, colour, ground, where) in zip(SHAPES, row, strict=True))
        for row in zip(*per_shape.values(), strict=True)
    )
    return list(itertools.islice(rounds, count))


def _draw(
    rng: random.Random, kind: str, words: tuple[str, str, str, str, str], side: int, num_frames: int
) -> np.ndarray:
    """The frames of one sample, uint8 (T, side, side, 3)."""
    size_word, colour, shape, ground, where = words
    mask = _mask(shape, size_word, side)
    room = (side - len(mask)) / 2  # how far the shape can go from the centre, in pixels
    jitter = [rng.uniform(-0.06, 0.06) * side for _ in range(2)]
    if kind == "image":
        path = [PLACES[where]]
    else:
        dx, dy = MOTIONS[where]
        path = [(dx * t, dy * t) for t in np.linspace(-1.0, 1.0, num_frames)]
    ink = [min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLOURS[colour]]
    paper = [min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLOURS[ground]]
    frames = np.empty((len(path), side, side, 3), np.float32)
    frames[:] = paper
    for frame, (x, y) in zip(frames, path, strict=True):
        column = round(min(2 * room, max(0.0, room * (1 + 0.9 * x) + jitter[0])))
        row = round(min(2 * room, max(0.0, room * (1 + 0.9 * y) + jitter[1])))
        patch = frame[row : row + len(mask), column : column + len(mask)]
        patch += mask[:, :, None] * (np.asarray(ink, np.float32) - patch)
    return np.rint(frames).astype(np.uint8)


@cache
def _mask(shape: str, size_word: str, side: int) -> np.ndarray:
    """How much each pixel of the shape's box is covered: float32 (n, n) in [0, 1]."""
    pixels = max(4, round(2 * SIZES[size_word] * side))
    fine = 8 * pixels
    axis = (np.arange(fine) + 0.5) / fine * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    inside = _inside(shape, x, y).astype(np.float32)
    return inside.reshape(pixels, 8, pixels, 8).mean(axis=(1, 3))


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of [-1, 1] x [-1, 1], y downward, lie in the shape; boolean."""
    radius = np.hypot(x, y)
    match shape:
        case "circle":
            return radius <= 0.95
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.85
        case "triangle":
            return (y <= 0.85) & (abs(x) <= 0.52 * (y + 0.95))
        case "star":
            angle = np.arctan2(x, -y)
            turn = (angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5
            # The edge from an outer point (radius 1) to an inner one (radius 0.4, 36 degrees on).
            inner_x, inner_y = 0.4 * math.cos(math.pi / 5), 0.4 * math.sin(math.pi / 5)
            along, across = radius * np.cos(turn), radius * abs(np.sin(turn))
            return (along - 1) * inner_y - across * (inner_x - 1) <= 0
        case "diamond":
            return abs(x) * 1.3 + abs(y) <= 0.98
        case "cross":
            return (np.minimum(abs(x), abs(y)) <= 0.28) & (np.maximum(abs(x), abs(y)) <= 0.92)
        case "ring":
            return (radius <= 0.95) & (radius >= 0.55)
        case "heart":
            u, v = 1.15 * x, -1.15 * y + 0.15
            return (u**2 + v**2 - 0.7) ** 3 <= 1.6 * u**2 * v**3
        case "crescent":
            return (radius <= 0.95) & (np.hypot(x - 0.45, y) >= 0.75)
        case "hexagon":
            return (abs(x) <= 0.82) & (abs(x) * 0.5 + abs(y) * 0.866 <= 0.82)
        case "arrow":
            head = (y <= 0.0) & (abs(x) <= 0.85 * (y + 0.95))
            return head | ((y > 0.0) & (y <= 0.92) & (abs(x) <= 0.3))
        case "arch":
            hollow = (np.hypot(x, y + 0.0) <= 0.45) | ((y > 0) & (abs(x) <= 0.45))
            full = ((y <= 0) & (radius <= 0.92)) | ((y > 0) & (y <= 0.9) & (abs(x) <= 0.92))
            return full & ~hollow
    raise DataError(f"the shape {shape!r} is unknown; one of {', '.join(SHAPES)} is needed")
