"""From a decoded sample to the float tensor a model takes.

`train` and `evaluate` return callables `(sample, generator) -> tensor`: (3, S, S) for an image and (3, T,
S, S) for a clip, float32, normalised with mean and standard deviation 0.5 per channel, so in [-1, 1]. All
randomness comes from the generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from xray.data.dataset import Sample
from xray.data.errors import DataError

MEAN = 0.5
STD = 0.5
SIDES = {"left", "right", "leftwards", "rightwards", "clockwise", "counterclockwise", "anticlockwise"}

Transform = Callable[[Sample, torch.Generator | None], torch.Tensor]


@dataclass(frozen=True)
class Train:
    """Random resized crop, random mirror image, random choice of frames; see `train`."""

    image_size: int
    num_frames: int = 1
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> torch.Tensor:
        """Augment one sample; the same generator state gives the same tensor."""
        draws = torch.rand(24 + self.num_frames, generator=generator, dtype=torch.float64).tolist()
        height, width = sample.image.shape[-3:-1]
        box = self._box(width, height, draws)
        mirror = self.flip and draws[0] < 0.5 and not _names_a_side(sample)
        frames = _choose_frames(sample, self.num_frames, draws[24:])
        return _to_tensor(frames, box, self.image_size, mirror, clip=sample.media == "clip")

    def _box(self, width: int, height: int, draws: list[float]) -> tuple[float, float, float, float]:
        """A random part of the frame: ten tries for one that fits, then the largest centred square."""
        low, high = (math.log(value) for value in self.ratio)
        for area_draw, ratio_draw in zip(draws[1:21:2], draws[2:22:2], strict=True):
            area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * area_draw)
            aspect = math.exp(low + (high - low) * ratio_draw)
            box_width, box_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if box_width <= width and box_height <= height:
                left, top = (width - box_width) * draws[22], (height - box_height) * draws[23]
                return left, top, left + box_width, top + box_height
        return _center_square(width, height)


@dataclass(frozen=True)
class Scheduled:
    """Transforms that take turns along a run, such as one for each image size.

    Attributes:
        stages: (first step, transform) pairs in order, the first of step 0.
    """

    stages: tuple[tuple[int, Transform], ...]

    def __post_init__(self) -> None:
        firsts = [first for first, _ in self.stages]
        if firsts[:1] != [0] or firsts != sorted(set(firsts)):
            raise DataError(f"stages begin at steps {firsts}; 0 and then increasing steps are needed")


@dataclass(frozen=True)
class Evaluate:
    """Largest centred square, resized; frames evenly spread; see `evaluate`."""

    image_size: int
    num_frames: int = 1

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> torch.Tensor:
        """Transform one sample; nothing is random, the generator is not used."""
        height, width = sample.image.shape[-3:-1]
        frames = _choose_frames(sample, self.num_frames, [0.5] * self.num_frames)
        box = _center_square(width, height)
        return _to_tensor(frames, box, self.image_size, mirror=False, clip=sample.media == "clip")


def train(
    image_size: int,
    num_frames: int = 1,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> Train:
    """The training transform: random resized crop, mirror image, one random frame of each of
    `num_frames` equal parts of a clip.

    Args:
        image_size: side of the result, in pixels.
        num_frames: frames of a clip; a shorter clip repeats frames.
        scale: smallest and largest share of the frame's area that is cropped.
        ratio: smallest and largest width / height of the crop.
        flip: mirror half of the samples, save those whose caption or tags name a side ("left", "right", ...).

    Raises:
        DataError: a size, count or range that cannot be.
    """
    _check(image_size, num_frames)
    if not 0 < scale[0] <= scale[1] <= 1:
        raise DataError(f"scale is {scale}; two shares of the area are needed, 0 < low <= high <= 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise DataError(f"ratio is {ratio}; two positive ratios are needed, low <= high")
    return Train(image_size, num_frames, scale, ratio, flip)


def evaluate(image_size: int, num_frames: int = 1) -> Evaluate:
    """The evaluation transform: the largest centred square, resized, and evenly spread frames.

    Args:
        image_size: side of the result, in pixels.
        num_frames: frames of a clip; a shorter clip repeats frames.

    Raises:
        DataError: a size or count below 1.
    """
    _check(image_size, num_frames)
    return Evaluate(image_size, num_frames)


def at(transform: Transform | Scheduled, step: int) -> Transform:
    """The transform of step `step`, counted from 0."""
    if not isinstance(transform, Scheduled):
        return transform
    return next(one for first, one in reversed(transform.stages) if first <= step)


def denormalize(pixels: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: floats in [-1, 1] to uint8 in [0, 255], of the same shape."""
    return ((pixels.float() * STD + MEAN) * 255.0).round().clamp(0, 255).to(torch.uint8)


def _check(image_size: int, num_frames: int) -> None:
    if image_size < 1 or num_frames < 1:
        raise DataError(f"image_size is {image_size} and num_frames {num_frames}; at least 1 of each is needed")


def _names_a_side(sample: Sample) -> bool:
    words = " ".join([sample.caption, *sample.tags]).lower()
    return not SIDES.isdisjoint(words.replace("-", " ").replace(",", " ").replace(".", " ").split())


def _center_square(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _choose_frames(sample: Sample, num_frames: int, draws: list[float]) -> np.ndarray:
    """uint8 (T, H, W, 3): all of an image; of a clip one frame of each of `num_frames` equal parts,
    placed by `draws` in [0, 1).
    """
    if sample.media != "clip":
        return sample.image[None]
    available = len(sample.image)
    chosen = [int((part + draw) * available / num_frames) for part, draw in enumerate(draws)]
    return sample.image[chosen]


def _to_tensor(
    frames: np.ndarray, box: tuple[float, float, float, float], size: int, mirror: bool, clip: bool
) -> torch.Tensor:
    """Crop and resize frames (T, H, W, 3) to normalised floats: (3, S, S), or (3, T, S, S) for a clip."""
    resized = [
        np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC, box=box)) for frame in frames
    ]
    pixels = torch.from_numpy(np.stack(resized)).permute(3, 0, 1, 2)  # (3, T, S, S)
    if mirror:
        pixels = pixels.flip(-1)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0).sub_(MEAN).div_(STD)
    return pixels if clip else pixels[:, 0]
