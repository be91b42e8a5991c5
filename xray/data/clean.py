"""First cleaning: what stays has a caption, and pixels that nothing else in the set has; and the split
by identity.

Looks are compared by the perceptual hash of the `imagehash` package (64 bits; up to 3 differing bits are
alike), and by coarse colours: pictures of the same shape in other colours share an identity, so they fall on
one side of the split, but both stay.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

TEST_SHARE = 0.1
BANDS = 4  # two hashes with at most 3 differing bits have one of 4 bands in common
MAX_BITS = 3
COLOUR_SIDE = 16
BLANK_RANGE = 8  # of 255; a picture whose channels vary by less shows nothing
MEAN_DIFFERENCE = 2.0  # of 255; near duplicates differ by no more on average ...
MAX_DIFFERENCE = 16.0  # ... and nowhere by more


def split_of(identity: str, seed: int = 0, test_share: float = TEST_SHARE) -> str:
    """The split of an identity: "test" for about `test_share` of identities, "train" for the rest.

    It depends on the identity and the seed only, so all variants of one thing fall on the same side, in every
    dataset.
    """
    digest = hashlib.sha256(f"{seed}:{identity}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < test_share * 2**64 else "train"


@dataclass(frozen=True)
class Looks:
    """What duplicates are found by.

    Attributes:
        pixels: sha256 of all frames.
        shape: perceptual hash of the middle frame, 64 bits.
        colours: uint8, mean colours of a 16 x 16 grid over the first, middle and last frame.
    """

    pixels: str
    shape: int
    colours: np.ndarray


def looks(frames: np.ndarray) -> Looks:
    """Measure frames, uint8 (T, H, W, 3)."""
    import imagehash
    from PIL import Image

    digest = hashlib.sha256(repr(frames.shape).encode())
    digest.update(np.ascontiguousarray(frames).data)
    chosen = sorted({0, len(frames) // 2, len(frames) - 1})
    small = [
        np.asarray(Image.fromarray(frames[index]).resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX))
        for index in chosen
    ]
    bits = imagehash.phash(Image.fromarray(frames[len(frames) // 2])).hash.ravel()
    shape = int.from_bytes(np.packbits(bits).tobytes(), "big")
    return Looks(digest.hexdigest(), shape, np.stack(small))


def is_blank(frames: np.ndarray) -> bool:
    """Whether frames, uint8 (T, H, W, 3), are all of one colour."""
    from PIL import Image

    strip = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
    return all(high - low < BLANK_RANGE for low, high in cast(Any, strip.getextrema()))


@dataclass(frozen=True)
class Verdict:
    """What the cleaner says of a sample: its identity, or the step and reason to drop it."""

    identity: str = ""
    step: str = ""
    reason: str = ""

    @property
    def dropped(self) -> bool:
        """Whether the sample goes."""
        return bool(self.step)


class Cleaner:
    """Judges samples one after another; of duplicates the first stays. The verdicts depend on the
    order only.
    """

    def __init__(self) -> None:
        self._by_pixels: dict[str, str] = {}
        self._by_band: dict[tuple[int, int], list[tuple[int, str]]] = defaultdict(list)  # (hash, identity)
        self._looks: set[tuple[int, str]] = set()  # what the bands hold
        self._kept: dict[str, list[tuple[str, int, np.ndarray]]] = defaultdict(list)  # by identity

    def judge(self, id: str, identity: str, seen: Looks) -> Verdict:
        """Judge one sample.

        Args:
            id: its id, named in the reason when a later one repeats it.
            identity: what it shows, if the source says so; "" takes the identity of what looks like it.
            seen: its measures.
        """
        first = self._by_pixels.setdefault(seen.pixels, id)
        if first != id:
            return Verdict(step="exact_duplicate", reason=f"the same pixels as {first}")
        found = self._identity_by_looks(seen.shape)
        identity = identity or found or f"looks:{seen.shape:016x}"
        for other, shape, colours in self._kept[identity]:
            if alike(seen, shape, colours):
                return Verdict(step="near_duplicate", reason=f"nearly the same picture as {other}")
        self._kept[identity].append((id, seen.shape, seen.colours))
        if (seen.shape, identity) not in self._looks:
            self._looks.add((seen.shape, identity))
            for key in _bands(seen.shape):
                self._by_band[key].append((seen.shape, identity))
        return Verdict(identity=identity)

    def _identity_by_looks(self, shape: int) -> str:
        """The identity of a sample that looks like this, or ""."""
        for key in _bands(shape):
            for other, identity in self._by_band.get(key, ()):
                if (other ^ shape).bit_count() <= MAX_BITS:
                    return identity
        return ""


def _bands(shape: int) -> list[tuple[int, int]]:
    width = 64 // BANDS
    return [(band, shape >> (band * width) & (2**width - 1)) for band in range(BANDS)]


def alike(seen: Looks, shape: int, colours: np.ndarray) -> bool:
    """Whether what was seen is a near duplicate of what has this hash and these colours."""
    if (seen.shape ^ shape).bit_count() > MAX_BITS or seen.colours.shape != colours.shape:
        return False
    return alike_colours(seen.colours, colours)


def alike_colours(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether colours, uint8 of one shape, are those of near duplicates."""
    difference = np.abs(one.astype(np.int16) - other)
    return bool(difference.mean() <= MEAN_DIFFERENCE and difference.max() <= MAX_DIFFERENCE)
