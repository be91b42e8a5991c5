"""Batches from tar shards read one after the other: for sets that are remote, or larger than an index serves.

What is guaranteed:

* A run has a fixed number of logical readers, each with its own shards of every source, its own shuffle
  buffer and its own random numbers. Slot i of a global batch of B samples comes from reader i * readers // B.
  So the samples of a step follow from the seed, the readers and the shards alone, whatever the number of
  ranks and of worker processes.
* Every batch carries the state of its readers after it, a few kilobytes each (14 bytes a sample of the
  shuffle buffer). A loader given these goes on with bit-equal batches, on any number of ranks and workers.
* An epoch of a source is a permutation of its shards, dealt out to the readers: over the readers' n-th epochs
  every shard is read once. Readers go through their epochs at their own pace.
* Faults are counted and survived: of a shard that is missing, damaged, cut off or stalled, what was read before
  counts, then the reader goes on with its next shard; a sample that cannot be decoded is replaced by the next
  one. Errors of a moment are tried again first. Only a source that gives nothing any more ends the run.
  A shard that stalls in one run and not in another makes these two differ; nothing else does.

A shard is any WebDataset tar, uncompressed: see `records` for what is understood. Where samples say their split,
only those of the wanted one come.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from xray.data.batches import (
    Batch,
    augmentation,
    check_arguments,
    check_weights,
    collate,
    count_skipped,
    kind_of_step,
)
from xray.data.dataset import MEDIA, SPLITS
from xray.data.errors import DataError, DecodeError
from xray.data.readers import VERSION, Bad, Reader
from xray.data.records import EXTENSIONS, Record, read_record
from xray.data.shard_files import ShardError, ShardFile, groups
from xray.data.transforms import Scheduled, Transform, at


def parse_sources(text: str) -> list[str]:
    """Split a comma-separated list of sources; commas within braces belong to their pattern."""
    parts, depth = [""], 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


class Stream:
    """Sources of tar shards, mixed by weight and read by a fixed number of readers; see the module.

    Args:
        sources: each a folder that holds *.tar (packed by this package or not), or a path with braces
            ("pairs-{00000..01242}.tar") or stars; local, or of any fsspec protocol whose package is there.
        weights: how often samples come from each source, relative to the others; None takes them alike. A source
            without samples of a step's kind weighs nothing then.
        seed: of the order and the augmentation, 0 or above.
        readers: parts that are read side by side; each source needs as many shards.
        shuffle_buffer: samples that each reader holds, still encoded, for each kind, and draws the next from.
        split: take only samples of this split, and those that say none; None for all.
        media: "image", "clip", or None for both.
        min_tags: take only samples with at least this many tags.
        captioned: take only samples with a caption.
        read_timeout: seconds without a byte after which a shard is given up.
        max_side: images and clips are shrunk to this many pixels on the longer side when they are decoded.
        max_frames: frames kept of a clip, evenly spread.

    Attributes:
        sources: as given.
        shards: the addresses of each source's shards.
        weights: of the sources, as shares of 1.

    Raises:
        DataError: an argument out of range, a source without shards or with fewer than readers, or a protocol that
            cannot be used.
    """

    def __init__(
        self,
        sources: str | Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        readers: int = 1,
        shuffle_buffer: int = 1000,
        split: str | None = "train",
        media: str | None = None,
        min_tags: int = 0,
        captioned: bool = False,
        read_timeout: float = 60.0,
        max_side: int = 512,
        max_frames: int = 16,
    ) -> None:
        if split is not None and split not in SPLITS:
            raise DataError(f"split is {split!r}; one of {', '.join(SPLITS)} or None is needed")
        if media is not None and media not in MEDIA:
            raise DataError(f"media is {media!r}; one of {', '.join(MEDIA)} or None is needed")
        least: dict[str, tuple[float, float]] = {"seed": (seed, 0), "readers": (readers, 1)}
        least |= {"shuffle_buffer": (shuffle_buffer, 1), "min_tags": (min_tags, 0)}
        least |= {"max_side": (max_side, 8), "max_frames": (max_frames, 1)}
        for name, (value, low) in least.items():
            if value < low:
                raise DataError(f"{name} is {value}; at least {low} is needed")
        if not read_timeout > 0:
            raise DataError(f"read_timeout is {read_timeout}; a number of seconds above 0 is needed")
        self.sources = parse_sources(sources) if isinstance(sources, str) else list(sources)
        if not self.sources:
            raise DataError("sources is empty; a folder, path or address of tar shards is needed")
        self.weights = check_weights([1.0] * len(self.sources) if weights is None else weights, len(self.sources))
        self.seed, self.readers, self.shuffle_buffer = seed, readers, shuffle_buffer
        self.split, self.media, self.min_tags, self.captioned = split, media, min_tags, captioned
        self.read_timeout, self.max_side, self.max_frames = read_timeout, max_side, max_frames
        self.shards = [list_shards(source) for source in self.sources]
        for source, shards in zip(self.sources, self.shards, strict=True):
            if len(shards) < readers:
                raise DataError(
                    f"the source {source} has {len(shards)} shards for {readers} readers; set readers to at most "
                    f"{len(shards)}, or cut the source into more shards"
                )

    @property
    def num_shards(self) -> int:
        """Shards of all sources together."""
        return sum(map(len, self.shards))

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides which samples come; the same where the shards only moved to another folder."""
        names = [[os.path.basename(shard) for shard in shards] for shards in self.shards]
        wanted = (self.split, self.media, self.min_tags, *(["captioned"] if self.captioned else []))
        facts = (VERSION, self.seed, self.readers, self.shuffle_buffer, *wanted, names)
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()

    def __repr__(self) -> str:
        return f"Stream({', '.join(self.sources)}: {self.num_shards} shards, {self.readers} readers)"

    def takes(self, record: Record) -> bool:
        """Whether a sample is of the wanted split and media and has the text that is wanted."""
        return (
            (self.split is None or record.split in ("", self.split))
            and (self.media is None or record.media == self.media)
            and len(record.tags) >= self.min_tags
            and (not self.captioned or record.caption.strip() != "")
        )

    def texts(self, limit: int) -> Iterator[tuple[str, list[str]]]:
        """Caption and tags of the first `limit` samples, taken from the sources in turn, shard after shard. Nothing is
        decoded, but the shards are read whole. Those that cannot be read are counted and passed over.
        """
        queues = [self._records(shards) for shards in self.shards]
        while queues and limit > 0:
            for records in list(queues):
                record = next(records, None)
                if record is None:
                    queues.remove(records)
                elif limit > 0:
                    limit -= 1
                    yield record.caption, record.tags

    def _records(self, shards: list[str]) -> Iterator[Record]:
        for shard in shards:
            file = ShardFile(shard, 0, self.read_timeout)
            try:
                for group in groups(file, EXTENSIONS):
                    try:
                        record = read_record(group)
                    except DecodeError as error:
                        count_skipped([(f"{shard}#{group.key}", str(error))])
                        continue
                    if record is not None and self.takes(record):
                        yield record
            except ShardError as error:
                count_skipped([(shard, str(error))])
            finally:
                file.close()


def list_shards(source: str) -> list[str]:
    """The addresses of a source's shards, in order.

    Raises:
        DataError: there are none, or the address cannot be used.
    """
    import braceexpand
    import fsspec

    try:
        local_folder = "://" not in source and os.path.isdir(source)
        patterns = [source] if local_folder else list(braceexpand.braceexpand(source))
        shards: list[str] = []
        for number, pattern in enumerate(patterns):
            if pattern.endswith(".tar") and "*" not in pattern:
                if number == 0:
                    fsspec.url_to_fs(pattern)  # is the protocol known, and its package here?
                shards.append(pattern)
            else:
                shards += _find_shards(pattern)
    except DataError:
        raise
    except Exception as error:  # each file system has errors of its own
        words = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the source {source} cannot be listed: {words}") from error
    if not shards:
        raise DataError(f"the source {source} holds no shards; a folder with *.tar or a pattern of them is needed")
    return shards


def _find_shards(pattern: str) -> list[str]:
    """The *.tar files of a folder or of a pattern with stars."""
    import fsspec

    file_system, path = fsspec.url_to_fs(pattern)
    if "*" in pattern:
        found = sorted(file_system.glob(path))
        return [file_system.unstrip_protocol(name) if "://" in pattern else name for name in found]
    names = sorted(os.path.basename(name) for name in file_system.ls(path, detail=False) if name.endswith(".tar"))
    return [f"{pattern.rstrip('/')}/{name}" for name in names]


def stream_loader(
    stream: Stream,
    batch_size: int,
    transform: Transform | Scheduled,
    *,
    start_step: int = 0,
    state: Mapping[int, bytes] | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    clip_fraction: float = 0.0,
) -> Iterator[Batch]:
    """Batches of step `start_step`, `start_step` + 1, ... of a stream, without end; each carries its `state`.

    A step holds images or clips, by the rule of `loader`, and its samples are augmented as there.

    Args:
        stream: what to read.
        batch_size: samples per batch and rank.
        transform: `(sample, generator) -> tensor`, see `transforms`, or one for each part of the run; its generator
            is seeded by (seed, step, place).
        start_step: the first step to make.
        state: the states of the readers after `start_step` steps, as `Batch.state` of all ranks together; needed
            to start at any step but 0.
        num_workers: processes that read and decode ahead; 0 does so in this process. Each has some of this rank's
            readers, so more than those are not started.
        rank: this process's part of each global batch, 0 to world_size - 1.
        world_size: number of parts.
        clip_fraction: share of the steps that are clips, 0 to 1; a stream of one kind gives that kind.

    Raises:
        DataError: an argument that cannot be, or a state that is not this stream's; later, when reading: a source
            cannot be read any more or lacks a kind, or a worker process died.
    """
    check_arguments(batch_size, start_step, num_workers, rank, world_size, clip_fraction)
    batch, readers = batch_size * world_size, stream.readers
    if batch % readers or readers % world_size:
        raise DataError(
            f"batch_size is {batch} over {world_size} ranks for {readers} readers; the number of readers must divide "
            f"batch_size, and the number of ranks must divide that of readers"
        )
    share = readers // world_size
    numbers = range(rank * share, (rank + 1) * share)
    missing = [number for number in numbers if number not in (state or {})]
    if missing and (start_step or state):
        raise DataError(
            f"the state of reader {missing[0]} after step {start_step} is missing; a stream goes on only from the "
            f"states that its batch carried"
        )
    if stream.media is not None:
        clip_fraction = float(stream.media == "clip")
    states = {number: state[number] for number in numbers} if state else {}
    steps = _Steps(stream, numbers, batch // readers, transform, start_step, states, clip_fraction)
    return _iterate(steps, min(num_workers, share))


class _Steps(torch.utils.data.IterableDataset):
    """A rank's batches, or in a worker process the part that this worker's readers have in them."""

    def __init__(
        self,
        stream: Stream,
        readers: range,
        slots: int,
        transform: Transform | Scheduled,
        start_step: int,
        states: dict[int, bytes],
        clip_fraction: float,
    ) -> None:
        self.stream, self.readers, self.slots, self.transform = stream, readers, slots, transform
        self.start_step, self.states, self.clip_fraction = start_step, states, clip_fraction

    def __iter__(self) -> Iterator[Batch | DataError]:
        worker = torch.utils.data.get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        first, last = (len(self.readers) * part // count for part in (index, index + 1))
        try:
            readers = [
                Reader(self.stream, number, self.start_step, self.states.get(number))
                for number in self.readers[first:last]
            ]
            for step in itertools.count(self.start_step):
                yield self._part(step, readers)
        except DataError as error:
            yield DataError(str(error))  # raised again by the process that waits, without this one's traceback

    def _part(self, step: int, readers: list[Reader]) -> Batch:
        media, _ = kind_of_step(step, self.clip_fraction)
        transform = at(self.transform, step)
        samples, pixels, state = [], [], {}
        bad: Bad = []
        for reader in readers:
            for slot in range(reader.number * self.slots, (reader.number + 1) * self.slots):
                sample = reader.sample(media)
                samples.append(sample)
                pixels.append(transform(sample, augmentation(self.stream.seed, step, slot)))
            state[reader.number] = reader.state(step + 1)
            bad += reader.bad
            reader.bad.clear()
        batch = collate(samples, pixels, bad)
        batch.state = state
        return batch


def _iterate(steps: _Steps, num_workers: int) -> Iterator[Batch]:
    loader = torch.utils.data.DataLoader(
        steps,
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # so that none of the process's random numbers is taken
    )
    parts = iter(loader)  # of worker 0, 1, ..., 0, 1, ...: the readers' order
    while True:
        batch = _join([_next(parts) for _ in range(max(1, num_workers))])
        count_skipped(batch.skipped)
        yield batch


def _next(parts: Iterator[Any]) -> Batch:
    try:
        part = next(parts)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads the stream died ({error}); if memory ran out, lower num_workers or shuffle_buffer"
        ) from error
    if isinstance(part, DataError):
        raise part
    return part


def _join(parts: list[Batch]) -> Batch:
    """One batch of its parts, its pixels in pinned memory where there is a GPU to copy them to."""
    if len(parts) == 1 and not torch.cuda.is_available():
        return parts[0]
    first = parts[0].pixels
    count = sum(len(part) for part in parts)
    pixels = torch.empty(count, *first.shape[1:], dtype=first.dtype, pin_memory=torch.cuda.is_available())
    batch = Batch(torch.cat([part.pixels for part in parts], out=pixels), [], [], [], [], parts[0].media)
    for part in parts:
        batch.captions += part.captions
        batch.tags += part.tags
        batch.labels += part.labels
        batch.ids += part.ids
        batch.skipped += part.skipped
        batch.state |= part.state
    return batch
