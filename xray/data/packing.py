"""From folders of images and clips to a dataset: decode, shrink, clean, split, write shards.

Decoding runs in worker processes; verdicts and writing happen in the order of the records, so the result
depends on the input only.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from xray.data.clean import Cleaner, Looks, is_blank, looks, split_of
from xray.data.decoding import MAX_PIXELS, decode
from xray.data.errors import DataError, DecodeError
from xray.data.folder import Record, read_folder
from xray.data.shapes import samples as generated_samples
from xray.data.shards import JPEG_SIDE, SHARD_BYTES, Entry, ShardWriter, encode

CHUNK = 16  # records a worker takes at a time


@dataclass
class Packed:
    """What packing did.

    Attributes:
        out: the dataset folder.
        kept: samples by (split, media).
        dropped: samples by step: "read", "decode", "blank", "caption", "exact_duplicate", "near_duplicate".
    """

    out: Path
    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        kept = ", ".join(f"{count} {split} {media}s" for (split, media), count in sorted(self.kept.items()))
        dropped = ", ".join(f"{count} {step.replace('_', ' ')}" for step, count in sorted(self.dropped.items()))
        return f"{self.out}: {kept or 'nothing'}; dropped: {dropped or 'nothing'}"


@dataclass(frozen=True)
class Prepared:
    """A record decoded, measured and encoded, or the step and reason why not."""

    data: bytes = b""
    extension: str = ""
    media: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    looks: Looks | None = None
    step: str = ""
    reason: str = ""


def pack(
    source_dir: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    max_side: int = 256,
    max_frames: int = 16,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
    num_workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    generated_size: int = 0,
    facts: dict[str, str] | None = None,
    progress: bool = True,
) -> Packed:
    """Pack folders of images and clips into one dataset folder, which appears complete or not at all.

    Args:
        source_dir: one folder or several, in the image-folder convention (see `folder.read_folder`).
        out: the dataset folder to make; new or empty.
        max_side: shrink so that the longer side has at most this many pixels; smaller pictures keep their
            size. Fully transparent margins are cut before; other transparency becomes white.
        max_frames: frames kept of a clip, evenly spread.
        seed: of the split by identity.
        max_pixels: files with larger frames are dropped before they are decoded.
        num_workers: decoding processes; None takes one per core, 0 decodes in this process.
        shard_bytes: size at which a shard is closed.
        generated_size: also add this many generated samples, of max_side pixels.
        facts: settings to keep in the index, beside those of packing.
        progress: show a progress bar.

    Returns:
        `Packed` counts; what was dropped and why is in `out/ledger.parquet`.

    Raises:
        DataError: a folder without media, a bad argument, nothing left to pack, or `out` cannot be written.
    """
    if max_side < 8 or max_frames < 1 or max_side * max_frames > JPEG_SIDE:
        raise DataError(
            f"max_side and max_frames are {max_side} and {max_frames}; at least 8 and 1 are needed, "
            f"and a product of at most {JPEG_SIDE}"
        )
    folders = [source_dir] if isinstance(source_dir, str | Path) else list(source_dir)
    contents = [read_folder(folder) for folder in folders]
    records = [record for content in contents for record in content.records]
    repeated = [id for id, count in Counter(record.id for record in records).items() if count > 1]
    if repeated:
        raise DataError(f"two folders both hold {repeated[0]}; rename one folder or its source")
    workers = os.cpu_count() or 1 if num_workers is None else num_workers
    all_facts = {"max_side": str(max_side), "max_frames": str(max_frames), "seed": str(seed), **(facts or {})}
    done = Packed(Path(out))
    with ShardWriter(out, shard_bytes=shard_bytes, facts=all_facts) as writer:

        def drop(id: str, step: str, reason: str) -> None:
            writer.drop(id, step, reason)
            done.dropped[step] += 1

        def keep(entry: Entry, data: bytes) -> None:
            writer.add(entry, data)
            done.kept[entry.split, entry.media] += 1

        for content in contents:
            for id, reason in content.unusable:
                drop(id, "read", reason)
        cleaner = Cleaner()
        limits = _Limits(max_side, max_frames, max_pixels)
        for record, prepared in _prepare_all(records, limits, workers, progress):
            if prepared.looks is None:
                drop(record.id, prepared.step, prepared.reason)
                continue
            verdict = cleaner.judge(record.id, record.identity, prepared.looks)
            if verdict.dropped:
                drop(record.id, verdict.step, verdict.reason)
                continue
            keep(_entry(record, prepared, verdict.identity, split_of(verdict.identity, seed)), prepared.data)
        for entry, frames in generated_samples(
            generated_size, seed, image_size=max_side, num_frames=max(2, max_frames)
        ):
            keep(entry, encode(frames, entry.media)[0])
        if not done.kept:
            raise DataError(f"nothing of {', '.join(map(str, folders))} can be packed; {_why(done, writer)}")
    return done


def _why(done: Packed, writer: ShardWriter) -> str:
    counts = ", ".join(f"{count} dropped at step {step}" for step, count in sorted(done.dropped.items()))
    return f"{counts}, the first ({writer.dropped[0][0]}) because {writer.dropped[0][2]}"


def _entry(record: Record, prepared: Prepared, identity: str, split: str) -> Entry:
    return Entry(
        id=record.id,
        media=prepared.media,
        extension=prepared.extension,
        caption=record.caption or ", ".join(record.tags),
        tags=record.tags,
        label=record.label,
        split=split,
        source=record.source,
        identity=identity,
        width=prepared.width,
        height=prepared.height,
        frames=prepared.frames,
    )


@dataclass(frozen=True)
class _Limits:
    max_side: int
    max_frames: int
    max_pixels: int


def _prepare_all(
    records: list[Record], limits: _Limits, workers: int, progress: bool
) -> Iterator[tuple[Record, Prepared]]:
    """Every record with its preparation, in order, a few chunks ahead of the reader."""
    from tqdm import tqdm

    with tqdm(total=len(records), desc="pack", unit="file", disable=not progress) as bar:
        for chunk, prepared in _chunks(records, limits, workers):
            for pair in zip(chunk, prepared, strict=True):
                yield pair
                bar.update()


def _chunks(records: list[Record], limits: _Limits, workers: int) -> Iterator[tuple[list[Record], list[Prepared]]]:
    chunks = (records[start : start + CHUNK] for start in range(0, len(records), CHUNK))
    if workers == 0:
        yield from ((chunk, _prepare_chunk(chunk, limits)) for chunk in chunks)
        return
    # Forked workers start at once and need no guarded main module; they touch only Pillow, PyAV and numpy.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method))
    try:
        pending: deque[tuple[list[Record], Future[list[Prepared]]]] = deque()
        while True:
            for chunk in islice(chunks, 4 * workers - len(pending)):
                pending.append((chunk, pool.submit(_prepare_chunk, chunk, limits)))
            if not pending:
                return
            chunk, future = pending.popleft()
            yield chunk, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a decoding process was killed near {chunk[0].path}, most likely for memory; "
            "lower max_pixels or num_workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare_chunk(chunk: list[Record], limits: _Limits) -> list[Prepared]:
    return [_prepare(record, limits) for record in chunk]


def _prepare(record: Record, limits: _Limits) -> Prepared:
    """Decode, measure and encode one file."""
    if not record.caption and not record.tags:
        return Prepared(step="caption", reason="there is neither a caption nor a tag")
    try:
        data = record.path.read_bytes()
    except OSError as error:
        return Prepared(step="read", reason=f"the file cannot be read ({error.strerror})")
    try:
        media = decode(
            data,
            max_side=limits.max_side,
            max_frames=limits.max_frames,
            max_pixels=limits.max_pixels,
            trim=True,
        )
    except DecodeError as error:
        return Prepared(step="decode", reason=str(error))
    frames, kind = media.frames, media.kind
    if is_blank(frames):
        return Prepared(step="blank", reason="the picture is of one colour")
    if kind == "clip" and (frames[1:] == frames[:1]).all():  # nothing moves: a picture
        frames, kind = frames[:1], "image"
    encoded, extension = encode(frames, kind)
    height, width = frames.shape[1:3]
    return Prepared(encoded, extension, kind, width, height, len(frames), looks(frames))
