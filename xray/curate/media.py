"""Media: fetched, decoded, measured, shrunk and encoded anew, by processes of their own."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import daft
import numpy as np
import pyarrow as pa
from daft import DataFrame, DataType, Series, col, lit

from xray.curate.files import Place, fetch_all
from xray.curate.frame import MEASURES, drop, keeping
from xray.curate.settings import Settings
from xray.curate.step import SCRATCH, Context, Step
from xray.data.clean import MEAN_DIFFERENCE, Looks, alike, is_blank, looks
from xray.data.decoding import decode as decode_file
from xray.data.decoding import shrink, spread
from xray.data.errors import DataError, DecodeError
from xray.data.shards import decode_stored, encode

BATCH = 16  # files that a process takes at a time: fetched together, decoded one after the other
PARTITION = 4096  # files of a task on a cluster
HASHES = 8  # frames of a clip that are hashed
EXAMPLES = 20
PROGRESS_SECONDS = 0.5

UNFETCHED = "the file cannot be fetched"
UNDECODED = "the file cannot be decoded"
BLANK = "the picture is of one colour"
MISSING = "there is no file"

# what a process answers for each file
ANSWER = pa.struct(
    [
        ("why", pa.string()),
        ("note", pa.string()),
        ("media", pa.string()),
        ("extension", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("frames", pa.int32()),
        ("pixels", pa.string()),
        ("phash", pa.uint64()),
        ("data", pa.binary()),
        ("data_size", pa.int64()),
        ("colours", pa.binary()),
        ("frame_hashes", pa.list_(pa.uint64())),
        ("stopped", pa.bool_()),
    ]
)
FIELDS = tuple(field.name for field in ANSWER if field.name not in ("why", "note"))


def decode(frame: DataFrame | None, context: Context) -> DataFrame:
    """Replace each sample's file by small frames, encoded as the shards hold them.

    Dropped are files that cannot be fetched or decoded, pictures of one colour, and samples without a file. An
    animation whose sample says that it is an image gives its first frame. A clip in which nothing moves becomes an
    image: `facts["static_clips"]` counts them and names some. A source without media passes, its measures null.

    Columns set: `media`, `phash`, those of `frame.MEASURES`, and, in this step's table only, `data`, `colours` and
    `frame_hashes`.

    Raises:
        DataError: a decoding process was killed.
    """
    assert frame is not None
    if not context.facts_of("read")["has_media"]:
        return keeping(frame.with_columns({name: lit(None).cast(kind) for name, kind in MEASURES.items()}))
    whole = context.table("read")
    if "bytes" in whole.column_names:  # too heavy to be passed on by the step before
        frame = whole.where(col("reason").is_null()).exclude("reason", "detail")
    settings, rows = context.settings, frame.count_rows()
    if settings.engine == "ray":
        frame = frame.into_partitions(-(-rows // PARTITION))
    counters = context.folder / SCRATCH / "decoded"
    counters.mkdir(parents=True)
    with _progress(counters, rows, settings.progress), _killed_processes():
        answered = context.keep(_answered(frame, settings, counters), "answers")
    stopped = answered.where(col("stopped"))
    context.facts["static_clips"] = {
        "count": stopped.count_rows(),
        "examples": stopped.select("id", "key").sort(["key", "id"]).limit(EXAMPLES).to_pydict()["id"],
    }
    return answered.exclude("stopped")


def _answered(frame: DataFrame, settings: Settings, counters: Path) -> DataFrame:
    """The frame with what the decoding processes found, and reasons."""
    present = [name for name in ("url", "offset", "size", "strip", "media", "bytes") if name in frame.column_names]
    processes = settings.num_workers
    decoder = daft.cls(use_process=processes != 0, max_concurrency=processes or None)(Decoder)
    answers = decoder(settings, str(counters), present).decode(*(col(name) for name in present))
    frame = frame.with_column("answer", answers)
    frame = frame.exclude(*(name for name in ("bytes", "media", "phash", *MEASURES) if name in frame.column_names))
    answer = col("answer")
    frame = keeping(frame.with_columns({name: answer.get(name) for name in FIELDS}))
    for reason in (UNFETCHED, UNDECODED, BLANK, MISSING):
        frame = drop(frame, answer.get("why") == lit(reason), reason, answer.get("note"))
    return frame.exclude("answer")


class Decoder:
    """What a decoding process does.

    Args:
        settings: of the run.
        counters: a folder for files that grow by a byte for each file that is done.
        names: of the columns that `decode` is given.
    """

    def __init__(self, settings: Settings, counters: str, names: list[str]) -> None:
        self.settings, self.names = settings, names
        self.counter = Path(counters) / f"{socket.gethostname()}-{os.getpid()}"

    @daft.method.batch(return_dtype=DataType.from_arrow_type(ANSWER), batch_size=BATCH)
    def decode(self, *columns: Series) -> pa.Array:
        """Answers of type `ANSWER`, of columns `names`."""
        values = dict(zip(self.names, (column.to_pylist() for column in columns), strict=True))
        count = len(values["url"])
        inside = values.get("bytes", [None] * count)
        places = [
            Place(url, offset, size) if url and data is None else None
            for url, offset, size, data in zip(values["url"], values["offset"], values["size"], inside, strict=True)
        ]
        fetched = fetch_all(places, self.settings.retries)
        answers = [
            self._answer(place is not None or data is not None, data or found, media, strip or 0)
            for place, data, found, media, strip in zip(
                places, inside, fetched, values["media"], values["strip"], strict=True
            )
        ]
        with contextlib.suppress(OSError), open(self.counter, "ab") as file:  # only the progress bar misses it
            file.write(bytes(count))
        return pa.array(answers, ANSWER)

    def _answer(self, present: bool, data: bytes | str, media: str, strip: int) -> dict[str, Any]:
        if not present:
            return {"why": MISSING}
        if isinstance(data, str):
            return {"why": UNFETCHED, "note": data}
        try:
            measured = measure(data, media, strip, self.settings)
        except DecodeError as error:
            return {"why": UNDECODED, "note": str(error).removeprefix(f"{UNDECODED}: ")}
        return {"why": BLANK} if measured is None else measured


def measure(data: bytes, media: str, strip: int, settings: Settings) -> dict[str, Any] | None:
    """Decode a file: its frames, encoded, and their measures, as `ANSWER` has them; None if there is one colour only.

    Args:
        data: the file.
        media: "image" takes the first frame of what moves.
        strip: number of frames that stand one below the other in an image, 0 if there is none.
        settings: max_side, max_frames and max_pixels are used.

    Raises:
        DecodeError: it is no image or clip, or damaged.
    """
    if strip:
        frames = decode_stored(data, strip)
        frames = shrink(frames[spread(strip, settings.max_frames)], settings.max_side)
    else:
        limits = {name: getattr(settings, name) for name in ("max_side", "max_frames", "max_pixels")}
        frames = decode_file(data, still=media == "image", trim=True, **limits).frames
    frames = frames[:1] if media == "image" else frames
    if is_blank(frames):
        return None
    each = [looks(frame[None]) for frame in frames]
    stopped = len(frames) > 1 and is_static(frames, each)
    frames = frames[:1] if stopped else frames
    kind = "clip" if len(frames) > 1 else "image"
    encoded, extension = encode(frames, kind)
    seen = looks(frames) if len(frames) > 1 else each[0]
    height, width = frames.shape[1:3]
    return {
        "media": kind,
        "extension": extension,
        "width": width,
        "height": height,
        "frames": len(frames),
        "pixels": seen.pixels,
        "phash": seen.shape,
        "data": encoded,
        "data_size": len(encoded),
        "colours": seen.colours[[0, len(seen.colours) // 2, -1]].tobytes(),
        "frame_hashes": [each[index].shape for index in spread(len(frames), HASHES)],
        "stopped": stopped,
    }


def is_static(frames: np.ndarray, each: Sequence[Looks]) -> bool:
    """Whether nothing moves in a clip, uint8 (T, H, W, 3): no frame differs from the first by more than noise.

    Frames are alike by the mean difference of their pixels, by their perceptual hashes, and by the colours of each
    part, which a small thing that moves changes most.

    Args:
        frames: of the clip.
        each: the looks of every frame.
    """
    first = frames[0].astype(np.int16)
    return all(
        seen.pixels == each[0].pixels
        or (alike(each[0], seen.shape, seen.colours) and np.abs(first - frame).mean() <= MEAN_DIFFERENCE)
        for frame, seen in zip(frames[1:], each[1:], strict=True)
    )


@contextlib.contextmanager
def _progress(counters: Path, total: int, shown: bool) -> Iterator[None]:
    """A bar on stderr that follows the counters of the decoding processes, wherever these run."""
    from tqdm import tqdm

    with tqdm(total=total, desc="decode", unit="file", disable=None if shown else True) as bar:
        done = threading.Event()

        def follow() -> None:
            while True:
                ended = done.wait(PROGRESS_SECONDS)
                with contextlib.suppress(OSError):
                    bar.update(sum(path.stat().st_size for path in counters.iterdir()) - bar.n)
                if ended:
                    return

        thread = threading.Thread(target=follow, name="progress of decoding", daemon=True)
        if shown:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if shown:
                thread.join()


@contextlib.contextmanager
def _killed_processes() -> Iterator[None]:
    """Name the likely cause where Daft only says that a process of its own is gone."""
    try:
        yield
    except Exception as error:
        if "UDF process" in str(error) and ("unexpectedly" in str(error) or "terminated" in str(error)):
            raise DataError(
                "a decoding process was killed, most likely for memory; lower max_pixels or num_workers"
            ) from error
        raise


STEP = Step("decode", decode, reads=("retries", "max_side", "max_frames", "max_pixels"))
