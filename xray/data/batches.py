"""Batches for training: the batch of step s is a pure function of (seed, s).

Nothing is remembered between steps, so a run resumes from the integer s alone, and the number of worker
processes changes nothing. An unreadable sample is counted, named once, and replaced by the next readable
one of the same epoch's order; so a truncated shard and a corrupt image are survived. A read that never
returns, as on a network file system that has gone, is not: the operating system gives no way to leave it.
`streams` reads such storage in bounded time.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from xray.data.dataset import Dataset, Sample
from xray.data.errors import DataError, DecodeError
from xray.data.transforms import Scheduled, Transform, at

NAMED = 20  # unreadable samples named in the log; the rest are only counted

_log = logging.getLogger("xray.data")
_skipped: dict[str, str] = {}


@dataclass
class Batch:
    """Samples of one kind, images or clips.

    Attributes:
        pixels: float32 (B, 3, H, W) for images, (B, 3, T, H, W) for clips.
        captions: B captions.
        tags: B lists of tags.
        labels: B labels, "" where there is none.
        ids: B sample ids.
        media: "image" or "clip".
        skipped: (id, reason) of samples that could not be read while this batch was made; of a stream also
            (address, reason) of shards that were given up.
        state: of a stream, the state of each of this rank's readers after this batch, by number; see `streams`.
    """

    pixels: torch.Tensor
    captions: list[str]
    tags: list[list[str]]
    labels: list[str]
    ids: list[str]
    media: str = "image"
    skipped: list[tuple[str, str]] = field(default_factory=list)
    state: dict[int, bytes] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


def skipped() -> dict[str, str]:
    """What could not be read in this process so far, and in its workers: id of a sample, or address of a shard of a
    stream, -> reason.
    """
    return dict(_skipped)


def loader(
    datasets: Dataset | Sequence[Dataset],
    batch_size: int,
    transform: Transform | Scheduled,
    seed: int = 0,
    start_step: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    clip_fraction: float = 0.0,
    weights: Sequence[float] | None = None,
) -> Iterator[Batch]:
    """Batches of step `start_step`, `start_step` + 1, ... without end.

    Each epoch is one permutation of the samples, cut into global batches; what is left over is dropped.
    Images and clips have their own permutations; clip batches are spread evenly over the steps. With `weights`
    an epoch has as many samples, but the dataset of each is drawn by weight: a dataset that is drawn more often
    than it has samples comes several times, one that is drawn less often in part, another part each epoch.

    Args:
        datasets: one dataset, or several that are read as one.
        batch_size: samples per batch and rank.
        transform: `(sample, generator) -> tensor`, see `transforms`, or one for each part of the run; its generator
            is seeded by (seed, step, place).
        seed: of the order and the augmentation.
        start_step: the first step to make.
        num_workers: processes that decode ahead; 0 decodes in this process.
        rank: this process's part of each global batch, 0 to world_size - 1.
        world_size: number of parts; a global batch holds batch_size * world_size samples.
        clip_fraction: share of the steps that are clips, 0 to 1; datasets with only one kind give that kind.
        weights: how often samples come from each dataset, relative to the others that have the step's kind; None
            takes each sample once an epoch.

    Raises:
        DataError: no samples, or an argument out of range; later, when reading: nothing readable is left.
    """
    datasets = [datasets] if isinstance(datasets, Dataset) else list(datasets)
    check_arguments(batch_size, start_step, num_workers, rank, world_size, clip_fraction)
    if weights is not None:
        shares = check_weights(weights, len(datasets))
        datasets = [dataset for dataset, share in zip(datasets, shares, strict=True) if share]
        weights = [share for share in shares if share]
    places = {media: _places(datasets, media) for media in ("image", "clip")}
    if not len(places["image"]) and not len(places["clip"]):
        raise DataError(
            "the datasets hold no sample to make batches of; name others or loosen split, media, min_tags and captioned"
        )
    if not len(places["image"]):
        clip_fraction = 1.0
    if not len(places["clip"]):
        clip_fraction = 0.0
    steps = _Steps(datasets, places, weights, batch_size, transform, seed, rank, world_size, clip_fraction)
    return _iterate(steps, start_step, num_workers)


def sequential(dataset: Dataset, batch_size: int, transform: Transform) -> Iterator[Batch]:
    """Every sample of `dataset` once, in order, in batches of one kind each; for evaluation.

    Unreadable samples are counted and left out, so a batch may be smaller than `batch_size`.

    Args:
        dataset: what to read.
        batch_size: the most samples of a batch.
        transform: `(sample, generator) -> tensor`; the generator is None.

    Raises:
        DataError: batch_size below 1.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; at least 1 is needed")
    for media in ("image", "clip"):
        places = _places([dataset], media)[:, 1]
        for start in range(0, len(places), batch_size):
            samples, pixels = [], []
            for place in places[start : start + batch_size]:
                try:
                    sample = dataset[int(place)]
                except DecodeError as error:
                    count_skipped([(dataset.index["id"][int(place)].as_py(), str(error))])
                    continue
                samples.append(sample)
                pixels.append(transform(sample, None))
            if samples:
                yield collate(samples, pixels, [])


def check_arguments(
    batch_size: int, start_step: int, num_workers: int, rank: int, world_size: int, clip_fraction: float
) -> None:
    """Refuse what no loader can do.

    Raises:
        DataError: an argument is out of range.
    """
    if batch_size < 1 or start_step < 0 or num_workers < 0:
        raise DataError(
            f"batch_size, start_step and num_workers are {batch_size}, {start_step} and {num_workers}; "
            "at least 1, 0 and 0 are needed"
        )
    if not 0 <= rank < world_size:
        raise DataError(f"rank is {rank} of world_size {world_size}; 0 to world_size - 1 is needed")
    if not 0 <= clip_fraction <= 1:
        raise DataError(f"clip_fraction is {clip_fraction}; a share from 0 to 1 is needed")


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights of `count` datasets or sources as shares of 1.

    Raises:
        DataError: another number of them, or not finite and at least 0, or all 0.
    """
    values = np.asarray(weights, np.float64)
    if values.shape != (count,) or not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise DataError(f"weights are {tuple(weights)} for {count} sources; one number from 0 up for each is needed")
    return tuple((values / values.sum()).tolist())


def kind_of_step(step: int, clip_fraction: float) -> tuple[str, int]:
    """ "image" or "clip", and how many steps of that kind came before `step`; clip steps are spread evenly."""
    clips_before = math.floor(step * clip_fraction)
    is_clip = math.floor((step + 1) * clip_fraction) > clips_before
    return ("clip", clips_before) if is_clip else ("image", step - clips_before)


def augmentation(seed: int, step: int, slot: int) -> torch.Generator:
    """The generator that augments the sample in this slot of the global batch of a step."""
    return torch.Generator().manual_seed(_mix(seed, step, slot))


def collate(samples: list[Sample], pixels: list[torch.Tensor], bad: list[tuple[str, str]]) -> Batch:
    """One batch of transformed samples of one kind; in a worker process its pixels are in shared memory."""
    return Batch(
        pixels=torch.utils.data.default_collate(pixels),
        captions=[sample.caption for sample in samples],
        tags=[sample.tags for sample in samples],
        labels=[sample.label for sample in samples],
        ids=[sample.id for sample in samples],
        media=samples[0].media,
        skipped=bad,
    )


def count_skipped(bad: list[tuple[str, str]]) -> None:
    """Add to `skipped()`, naming the first ones in the log."""
    for id, reason in bad:
        if id not in _skipped:
            _skipped[id] = reason
            if len(_skipped) <= NAMED:
                _log.warning("skipped %s: %s", id, reason)
            if len(_skipped) == NAMED:
                _log.warning("what is skipped from here on is only counted, in xray.data.skipped()")


def _iterate(steps: _Steps, start_step: int, num_workers: int) -> Iterator[Batch]:
    batches = torch.utils.data.DataLoader(
        steps,
        batch_size=None,
        sampler=itertools.count(start_step),
        num_workers=num_workers,
        persistent_workers=False,
    )
    for batch in batches:
        count_skipped(batch.skipped)
        yield batch


def _places(datasets: Sequence[Dataset], media: str) -> np.ndarray:
    """(n, 2) int64: number of the dataset and row in it, of every sample of one kind."""
    rows = []
    for number, dataset in enumerate(datasets):
        found = np.flatnonzero(dataset.index["media"].to_numpy(zero_copy_only=False) == media)
        rows.append(np.stack([np.full_like(found, number), found], axis=1))
    return np.concatenate(rows) if rows else np.empty((0, 2), np.int64)


class _Steps(torch.utils.data.Dataset):
    """Maps a step to its batch, keeping nothing but a cache of the epoch's permutation."""

    def __init__(
        self,
        datasets: list[Dataset],
        places: dict[str, np.ndarray],
        weights: Sequence[float] | None,
        batch_size: int,
        transform: Transform | Scheduled,
        seed: int,
        rank: int,
        world_size: int,
        clip_fraction: float,
    ) -> None:
        self.datasets, self.places, self.transform = datasets, places, transform
        self.shares = {media: _shares(places[media], weights) for media in places}
        self.batch_size, self.seed, self.rank = batch_size, seed, rank
        self.global_batch, self.clip_fraction = batch_size * world_size, clip_fraction

    def __getitem__(self, step: int) -> Batch:
        media, turn = kind_of_step(step, self.clip_fraction)
        places = self.places[media]
        steps_per_epoch = max(1, len(places) // self.global_batch)
        order = _order(len(places), self.shares[media], self.seed, media, turn // steps_per_epoch)
        first = turn % steps_per_epoch * self.global_batch + self.rank * self.batch_size
        bad: list[tuple[str, str]] = []
        samples, pixels = [], []
        transform = at(self.transform, step)
        for place in range(first, first + self.batch_size):
            sample = self._read(places, order, place, bad)
            slot = place - first + self.rank * self.batch_size
            samples.append(sample)
            pixels.append(transform(sample, augmentation(self.seed, step, slot)))
        return collate(samples, pixels, bad)

    def _read(self, places: np.ndarray, order: np.ndarray, place: int, bad: list[tuple[str, str]]) -> Sample:
        """The sample at `place` of the order, or the same place of the next global batch that can be read.

        Going on by whole global batches keeps a replacement from meeting itself within its batch.
        """
        count = len(order)
        stride = self.global_batch if count > self.global_batch else 1
        for attempt in range(count):
            # After a full turn of the stride the start moves on by one, so that every sample is tried once.
            turns = attempt * stride // count if stride > 1 else 0
            number, row = places[order[(place + attempt * stride + turns) % count]]
            dataset = self.datasets[number]
            try:
                return dataset[int(row)]
            except DecodeError as error:
                bad.append((dataset.index["id"][int(row)].as_py(), str(error)))
        raise DataError(f"none of {count} samples can be read, the last because {bad[-1][1]}; pack the dataset again")


def _shares(places: np.ndarray, weights: Sequence[float] | None) -> tuple[tuple[int, float], ...]:
    """Size and weight of each dataset that has samples of a kind; nothing without weights."""
    if weights is None:
        return ()
    sizes = np.bincount(places[:, 0], minlength=len(weights)).tolist()
    return tuple((size, weight) for size, weight in zip(sizes, weights, strict=True) if size)


@lru_cache(maxsize=8)
def _order(count: int, shares: tuple[tuple[int, float], ...], seed: int, media: str, epoch: int) -> np.ndarray:
    """The places of an epoch in order: a permutation of `count`, or with shares a mixture by weight."""
    random = np.random.default_rng([seed, media == "clip", epoch])
    if not shares:
        return random.permutation(count)
    sizes, weights = np.array([size for size, _ in shares]), np.array([weight for _, weight in shares])
    chosen = random.choice(len(shares), size=count, p=weights / weights.sum())
    order = np.empty(count, np.int64)
    for number, (size, start) in enumerate(zip(sizes, np.cumsum(sizes) - sizes, strict=True)):
        slots = np.flatnonzero(chosen == number)
        rounds = [random.permutation(size) for _ in range(-(-len(slots) // size))]
        order[slots] = start + np.concatenate([*rounds, np.empty(0, np.int64)])[: len(slots)]
    return order


def _mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
