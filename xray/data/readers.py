"""The logical readers of a stream, and their state.

    Reader -> per kind, Shuffle (a buffer over several sources) -> per source, Cursor (shard, byte) -> groups

A reader's samples follow from the stream's seed, its number and its state alone. The state holds places and
random numbers, never media bytes: going on reads the buffer's samples again.
"""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from xray.data.dataset import Sample
from xray.data.errors import DataError, DecodeError
from xray.data.records import EXTENSIONS, Record, decode_record, read_record
from xray.data.shard_files import Group, ShardError, ShardFile, groups

if TYPE_CHECKING:
    from xray.data.streams import Stream

VERSION = 1  # of the state
FAILED = 16  # shards of a source that fail without a sample between them before the run ends
LOOK = 8  # shards without the kind after which a source is taken for having none, if other sources have some
SEARCH = 64  # if none has: so many shards of each, or a reader's part of an epoch if that is more, are searched
CORRUPT = 1000  # samples in a row that cannot be decoded before the run ends
GAP = 8 * 2**20  # bytes between two samples of the buffer from which seeking is taken for cheaper than reading
PLACE = np.dtype([("source", "<u2"), ("shard", "<u4"), ("offset", "<i8")])  # of a sample: 14 bytes
SHARDS, SAMPLES = 1, 2  # what random numbers are for, as part of their seeds

Bad = list[tuple[str, str]]  # (sample id or shard, reason)


class Cursor:
    """The samples of one kind of one source, as one reader meets them: endless, epoch by epoch.

    An epoch is a permutation of the source's shards, dealt out to the readers. Shards that turned out to hold
    nothing of the kind are passed over later, so a reader comes soon to those that do, however few they are.
    """

    def __init__(self, stream: Stream, source: int, reader: int, media: str, bad: Bad) -> None:
        self.stream, self.source, self.reader, self.media, self.bad = stream, source, reader, media, bad
        self.shards = stream.shards[source]
        self.epoch = self.position = self.offset = 0  # the offset is that of the next group in the shard
        self.shard = -1  # the number of the one that is open
        self.seen = self.in_shard = 0  # samples of the kind: in all, in this shard
        self.barren: set[int] = set()  # shards without this kind
        self.failed: list[int] = []  # shards that gave nothing but an error, since the last sample
        self.empty = False  # the source is taken for having none of this kind
        self.searches = False  # no source of the reader has shown this kind yet
        self._file: ShardFile | None = None
        self._groups: Iterator[Group] = iter(())
        self._order: tuple[int, np.ndarray] | None = None

    def next(self) -> tuple[int, int, Record] | None:
        """Shard, offset and record of the next sample; None when the source has none of this kind.

        Raises:
            DataError: none of the source's shards can be read.
        """
        while not self.empty:
            if self._file is None:
                self._open()
            try:
                for group in self._groups:
                    self.offset = group.end
                    record = self._wanted(group)
                    if record is not None:
                        self.seen, self.in_shard = self.seen + 1, self.in_shard + 1
                        self.failed.clear()
                        return self.shard, group.offset, record
                cause = ""
            except ShardError as error:
                cause = str(error)
                self.bad.append((self.shards[self.shard], cause))
            if cause and not self.in_shard:
                self.failed.append(self.shard)
            elif not self.in_shard:
                self.barren.add(self.shard)
            self._leave()
            self._check_progress(cause)
        return None

    def state(self) -> dict[str, Any]:
        """Its place, as JSON can hold it."""
        numbers = (self.epoch, self.position, self.offset, self.seen, self.in_shard)
        return {
            "at": numbers,
            "flags": (self.empty, self.searches),
            "barren": sorted(self.barren),
            "failed": self.failed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a place given by `state`."""
        self.epoch, self.position, self.offset, self.seen, self.in_shard = state["at"]
        self.empty, self.searches = state["flags"]
        self.barren, self.failed = set(state["barren"]), list(state["failed"])

    def search(self) -> bool:
        """Take up the source again, to look longer than before; whether that has not been done yet."""
        again = not self.searches and len(self.barren) < len(self.shards)
        self.searches, self.empty = True, not again
        return again

    def _wanted(self, group: Group) -> Record | None:
        try:
            record = read_record(group)
        except DecodeError as error:
            self.bad.append((f"{self.shards[self.shard]}#{group.key}", str(error)))
            return None
        if record is None or record.media != self.media or not self.stream.takes(record):
            return None
        return record

    def _open(self) -> None:
        """Open the shard at the position, or the next one that may hold this kind."""
        order = self._epoch_order()
        while self.position >= len(order) or int(order[self.position]) in self.barren:
            self.position += 1
            if self.position >= len(order):
                self.epoch, self.position = self.epoch + 1, 0
                order = self._epoch_order()
        self.shard = int(order[self.position])
        self._file = ShardFile(self.shards[self.shard], self.offset, self.stream.read_timeout)
        self._groups = groups(self._file, EXTENSIONS)

    def _leave(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._groups = None, iter(())
        self.position, self.offset, self.in_shard = self.position + 1, 0, 0

    def _check_progress(self, cause: str) -> None:
        """End the search where going on is hopeless: every shard fails, or none holds the kind."""
        tried, count = len(self.barren.union(self.failed)), len(self.shards)
        patience = max(SEARCH, count // self.stream.readers) if self.searches else LOOK
        enough = count if self.seen else min(count, patience)
        hopeless = tried == count and (self.seen or not self.barren)
        source = self.stream.sources[self.source]
        if cause and (hopeless or len(self.failed) >= FAILED):
            raise DataError(
                f"the source {source} cannot be read: {len(self.failed)} shards failed without a sample between them, "
                f"the last, {self.bad[-1][0]}, because {cause}"
            )
        self.empty = tried >= enough and bool(self.barren) and not (self.seen and self.failed)
        if self.empty and tried < count:
            self.bad.append((source, f"no {self.media} is in {tried} of its {count} shards, so none is looked for"))

    def _epoch_order(self) -> np.ndarray:
        """The numbers of the shards that this reader reads in the present epoch, in order."""
        if self._order is None or self._order[0] != self.epoch:
            random = np.random.default_rng([self.stream.seed, SHARDS, self.source, self.epoch])
            order = random.permutation(len(self.shards))
            self._order = (self.epoch, order[self.reader :: self.stream.readers])
        return self._order[1]


class Shuffle:
    """Samples of one kind in random order: each is drawn from a buffer, and the next of the stream takes its
    place; the source of the next one is drawn by weight.
    """

    def __init__(self, stream: Stream, reader: int, media: str, bad: Bad) -> None:
        self.stream, self.reader, self.media, self.bad = stream, reader, media, bad
        self.random = np.random.default_rng([stream.seed, SAMPLES, reader, media == "clip"])
        sources = range(len(stream.sources))
        self.cursors = [Cursor(stream, source, reader, media, bad) for source in sources]
        self.places = np.zeros(stream.shuffle_buffer, PLACE)
        self.records: list[Record] = []  # as many as are filled of the places
        self._bounds: list[float] | None = None

    def draw(self) -> Record:
        """The next sample.

        Raises:
            DataError: no source has any sample of this kind, or one cannot be read at all.
        """
        while len(self.records) < len(self.places):
            self.records.append(self._read_into(len(self.records)))
        place = int(self.random.random() * len(self.records))
        drawn = self.records[place]
        self.records[place] = self._read_into(place)
        return drawn

    def state(self) -> tuple[dict[str, Any], bytes]:
        """What JSON can hold of its state, and the places of the buffer."""
        numbers = self.random.bit_generator.state["state"]
        facts = {
            "random": [numbers["state"], numbers["inc"]],
            "filled": len(self.records),
            "cursors": [cursor.state() for cursor in self.cursors],
        }
        return facts, self.places[: len(self.records)].tobytes()

    def restore(self, facts: dict[str, Any], places: np.ndarray) -> None:
        """Go to a state given by `state`, reading the buffer's samples again; those that cannot be read any more
        are counted and left out.
        """
        number, increment = facts["random"]
        generator = self.random.bit_generator
        generator.state = {**generator.state, "state": {"state": number, "inc": increment}}
        for cursor, state in zip(self.cursors, facts["cursors"], strict=True):
            cursor.restore(state)
        found: dict[int, Record] = {}
        order = np.lexsort((places["offset"], places["shard"], places["source"])).tolist()
        for (source, shard), part in groupby(order, key=lambda place: places[place].tolist()[:2]):
            numbers = list(part)
            url = self.stream.shards[source][shard]
            try:
                offsets = places["offset"][numbers].tolist()
                for place, record in zip(numbers, _reread(url, offsets, self.stream.read_timeout), strict=True):
                    found[place] = record
            except (ShardError, DecodeError) as error:
                self.bad.append((url, f"samples of the shuffle buffer are lost: {error}"))
        kept = sorted(found)
        self.places[: len(kept)] = places[kept]
        self.records = [found[place] for place in kept]

    def _read_into(self, place: int) -> Record:
        while True:
            source = self._draw_source()
            found = self.cursors[source].next()
            if found is not None:
                self.places[place] = (source, *found[:2])
                return found[2]
            self._bounds = None

    def _draw_source(self) -> int:
        if self._bounds is None:
            weights = [
                0.0 if cursor.empty else weight
                for cursor, weight in zip(self.cursors, self.stream.weights, strict=True)
            ]
            if not any(weights):
                # A source that weighs nothing is never searched.
                wanted = [cursor for cursor in self.cursors if self.stream.weights[cursor.source]]
                taken_up = [cursor.search() for cursor in wanted]
                if any(taken_up):
                    return self._draw_source()
                raise DataError(
                    f"reader {self.reader} finds no {self.media} in {', '.join(self.stream.sources)}; choose other "
                    f"sources or another clip_fraction, or loosen split, media, min_tags and captioned"
                )
            self._bounds = np.cumsum(weights).tolist()
        return bisect(self._bounds, self.random.random() * self._bounds[-1])


class Reader:
    """One logical reader of a stream: the samples of its slots of every batch.

    Args:
        stream: what to read.
        number: which reader, 0 to stream.readers - 1.
        state: where to go on, given by `state`; None starts at the beginning.

    Raises:
        DataError: the state is damaged, or of another stream, reader or step.
    """

    def __init__(self, stream: Stream, number: int, start_step: int = 0, state: bytes | None = None) -> None:
        self.stream, self.number = stream, number
        self.bad: Bad = []
        self._shuffles: dict[str, Shuffle] = {}
        if state is not None:
            self._restore(state, start_step)

    def sample(self, media: str) -> Sample:
        """The next sample of a kind that can be decoded; those that cannot are noted in `bad`.

        Raises:
            DataError: there is none.
        """
        shuffle = self._shuffle(media)
        for _ in range(CORRUPT):
            record = shuffle.draw()
            try:
                return decode_record(record, self.stream.max_side, self.stream.max_frames)
            except DecodeError as error:
                self.bad.append((record.id, str(error)))
        raise DataError(
            f"{CORRUPT} {media}s in a row cannot be decoded, the last, {self.bad[-1][0]}, because {self.bad[-1][1]}"
        )

    def state(self, step: int) -> bytes:
        """Its state when `step` steps are done: JSON, a zero byte, and the places of the buffers."""
        header: dict[str, Any] = {"version": VERSION, "step": step, "reader": self.number}
        header |= {"readers": self.stream.readers, "stream": self.stream.fingerprint, "kinds": {}}
        buffers = []
        for media, shuffle in self._shuffles.items():
            header["kinds"][media], places = shuffle.state()
            buffers.append(places)
        return b"\0".join((json.dumps(header).encode(), b"".join(buffers)))

    def _shuffle(self, media: str) -> Shuffle:
        if media not in self._shuffles:
            self._shuffles[media] = Shuffle(self.stream, self.number, media, self.bad)
        return self._shuffles[media]

    def _restore(self, state: bytes, start_step: int) -> None:
        text, _, buffers = state.partition(b"\0")
        try:
            header = json.loads(text)
            if header["version"] != VERSION:
                raise ValueError(f"version {header['version']}")
            self._check(header, start_step)
            places = np.frombuffer(buffers, PLACE)
            if len(places) != sum(facts["filled"] for facts in header["kinds"].values()):
                raise ValueError(f"{len(places)} places of the shuffle buffer")
            for media, facts in header["kinds"].items():
                self._shuffle(media).restore(facts, places[: facts["filled"]])
                places = places[facts["filled"] :]
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"the state of reader {self.number} is damaged or of another version: {error}") from error

    def _check(self, header: dict[str, Any], start_step: int) -> None:
        if header["readers"] != self.stream.readers:
            raise DataError(
                f"the state is of a stream of {header['readers']} readers and this one has {self.stream.readers}; the "
                f"number is fixed for a run"
            )
        if header["stream"] != self.stream.fingerprint:
            raise DataError(
                "the state is of another stream: to go on, sources and their shards, seed, shuffle_buffer, split, "
                "media, min_tags and captioned must be those it began with"
            )
        if (header["reader"], header["step"]) != (self.number, start_step):
            raise DataError(
                f"the state is of reader {header['reader']} after step {header['step']}; that of reader {self.number} "
                f"after step {start_step} is needed"
            )


def _reread(url: str, offsets: list[int], timeout: float) -> Iterator[Record]:
    """The samples at ascending offsets of a shard, each as often as its offset comes.

    Raises:
        ShardError: the shard cannot be read, or has changed.
        DecodeError: a sample's JSON is damaged, so the shard has changed.
    """
    file, group = None, None
    found: Iterator[Group] = iter(())
    try:
        for offset in offsets:
            if group is None or group.offset != offset:
                if file is None or offset - file.tell() > GAP:
                    if file is not None:
                        file.close()
                    file = ShardFile(url, offset, timeout)
                    found = groups(file, EXTENSIONS)
                group = next((group for group in found if group.offset >= offset), None)
            record = read_record(group) if group is not None and group.offset == offset else None
            if record is None:
                raise ShardError(f"there is no sample at byte {offset} any more")
            yield record
    finally:
        if file is not None:
            file.close()
