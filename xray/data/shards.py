"""The dataset on disk: tar shards of media files, `index.parquet`, and `ledger.parquet` with
everything that was dropped.

Each sample is two tar members, `<key>.<extension>` and `<key>.json`, so plain WebDataset readers can
stream the shards; the index holds the byte offset of every media member, so that this package reads
single samples at random.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from xray.data.decoding import MAX_PIXELS, decode
from xray.data.errors import DataError, DecodeError

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "index.parquet"
LEDGER = "ledger.parquet"
COPIED = "copied"  # the ledger's reason for a sample that is written more than once
SHARD_BYTES = 256 * 2**20
LOSSLESS_SIDE = 128  # up to this side PNG is small and fast to decode; above, JPEG of quality 95
WEBP_SIDE = 16_383  # the format's limits
JPEG_SIDE = 65_500
STRIP_PIXELS = 4 * MAX_PIXELS


@dataclass(frozen=True)
class Entry:
    """What the index says of a sample, less its place in the shards; one row of `index.parquet`.

    `probability` is the number of copies that balancing expects of a sample; a sampler that divides by it undoes the
    balancing.
    """

    id: str
    media: str
    extension: str
    caption: str
    tags: list[str] = field(default_factory=list)
    label: str = ""
    split: str = "train"
    source: str = ""
    identity: str = ""
    width: int = 0
    height: int = 0
    frames: int = 1
    probability: float = 1.0


def index_schema() -> pa.Schema:
    """The columns of `index.parquet`."""
    import pyarrow as pa

    text, number = pa.string(), pa.int32()
    columns = [("id", text), ("shard", text), ("offset", pa.int64()), ("size", pa.int64())]
    columns += [("media", text), ("extension", text), ("caption", text), ("tags", pa.list_(text))]
    columns += [("label", text), ("split", text), ("source", text), ("identity", text)]
    columns += [("width", number), ("height", number), ("frames", number)]
    columns += [("probability", pa.float64())]
    return pa.schema(columns)


def ledger_schema() -> pa.Schema:
    """The columns of `ledger.parquet`."""
    import pyarrow as pa

    return pa.schema([("id", pa.string()), ("step", pa.string()), ("reason", pa.string())])


def encode(frames: np.ndarray, kind: str) -> tuple[bytes, str]:
    """Encode frames as a media file that decodes fast; a clip becomes a strip, its frames one below
    the other.

    Small frames stay lossless: PNG for an image, WebP for a strip; above `LOSSLESS_SIDE` both are JPEG.
    On a 2-core machine a strip of 8 frames of 72 pixels decodes in 1.3 ms as WebP and 1.9 ms as PNG; an
    animated WebP takes 1.8 ms, merges equal frames, and most image readers show only its first frame.

    Args:
        frames: uint8 (T, H, W, 3).
        kind: "image" or "clip".

    Returns:
        The file's bytes and its extension, without a dot.
    """
    from PIL import Image

    strip = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
    extension = extension_of(frames, kind)
    buffer = io.BytesIO()
    if extension == "jpg":
        strip.save(buffer, "JPEG", quality=95, subsampling=0)
    elif extension == "webp":
        strip.save(buffer, "WEBP", lossless=True, method=0)
    else:
        strip.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue(), extension


def extension_of(frames: np.ndarray, kind: str) -> str:
    """The extension, without a dot, of the file that `encode` makes of these frames."""
    if max(frames.shape[1:3]) > LOSSLESS_SIDE or frames.shape[0] * frames.shape[1] > WEBP_SIDE:
        return "jpg"
    return "webp" if kind == "clip" else "png"


def decode_stored(data: bytes, num_frames: int) -> np.ndarray:
    """The frames of a file made by `encode`: uint8 (T, H, W, 3).

    Raises:
        DecodeError: the bytes are damaged or cut off, or do not hold that many frames.
    """
    pixels = decode(data, max_pixels=STRIP_PIXELS, still=True).frames[0]
    height, rest = divmod(len(pixels), num_frames)
    if rest:
        raise DecodeError(f"a strip of {len(pixels)} rows does not hold {num_frames} frames of equal height")
    return pixels.reshape(num_frames, height, *pixels.shape[1:])


@contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one-sentence `DataError`s that name `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(f"no space is left to write {folder}; free some or name another folder") from error
        if error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EEXIST,
            errno.ENOTEMPTY,
        ):
            raise DataError(
                f"{folder} cannot be written ({error.strerror}); name a folder that can be made and written"
            ) from error
        raise


def shard_name(number: int) -> str:
    """The file name of a dataset's shard."""
    return f"shard-{number:05d}.tar"


class Shard:
    """A tar file that is being written; it has its name once the `with` block ends without an error.

    The same samples in the same order give the same bytes.

    Args:
        path: the file to make, in a folder that is there; what has the name already is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        self._tar = tarfile.open(self._draft, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._tar.offset

    def add(self, key: str, entry: Entry, data: bytes) -> int:
        """Append one sample: its media bytes, and its entry as JSON beside them.

        Returns:
            The offset of the media bytes in the file.
        """
        offset = self._append(f"{key}.{entry.extension}", data)
        self._append(f"{key}.json", json.dumps(asdict(entry), sort_keys=True, ensure_ascii=False).encode())
        return offset

    def close(self) -> None:
        """Give the file its name."""
        self._tar.close()
        os.replace(self._draft, self.path)

    def discard(self) -> None:
        """Remove what is not closed."""
        with contextlib.suppress(OSError):
            self._tar.close()
        self._draft.unlink(missing_ok=True)

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.discard()

    def _append(self, name: str, data: bytes) -> int:
        """Add a member and return the offset of its bytes in the shard."""
        member = tarfile.TarInfo(name)  # owner, group and time stay 0: the bytes depend on the input only
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        return self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class ShardWriter:
    """Writes a dataset folder that appears complete or not at all.

    Everything goes to a hidden folder beside `out`, which takes the name `out` when the `with` block ends
    without an error. The same entries in the same order give the same bytes.

    Args:
        out: the dataset folder; it must not hold anything yet.
        shard_bytes: a shard is closed once it holds this many bytes.
        facts: settings to keep in the index, as strings; see `read_facts`.

    Raises:
        DataError: `out` holds something already or cannot be written, or the disk is full.
    """

    def __init__(
        self, out: str | Path, *, shard_bytes: int = SHARD_BYTES, facts: Mapping[str, str] | None = None
    ) -> None:
        self.out = Path(out)
        self.shard_bytes = shard_bytes
        self.facts = dict(facts or {})
        self.entries: list[tuple[Entry, str, int, int]] = []
        self.dropped: list[tuple[str, str, str]] = []
        self._shard: Shard | None = None
        self._shards = 0

    def __enter__(self) -> ShardWriter:
        with folder_errors(self.out):
            if self.out.is_dir() and any(self.out.iterdir()):
                raise DataError(f"{self.out} holds files already; name a new or empty folder, or remove it first")
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._partial = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".partial", dir=self.out.parent))
        return self

    def add(self, entry: Entry, data: bytes) -> None:
        """Append one sample: its media bytes, and its entry as JSON beside them."""
        with folder_errors(self.out):
            if self._shard is None:
                self._shard = Shard(self._partial / shard_name(self._shards))
                self._shards += 1
            offset = self._shard.add(f"{len(self.entries):08d}", entry, data)
            self.entries.append((entry, self._shard.path.name, offset, len(data)))
            if self._shard.size >= self.shard_bytes:
                self._shard.close()
                self._shard = None

    def drop(self, id: str, step: str, reason: str) -> None:
        """Note in the ledger that the sample `id` was dropped, at which step and why."""
        self.dropped.append((id, step, reason))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with folder_errors(self.out):
                if self._shard is not None:
                    self._shard.close()
                if kind is None:
                    self._write_tables()
                    os.chmod(self._partial, 0o755)  # mkdtemp makes private folders
                    os.replace(self._partial, self.out)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _write_tables(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {**asdict(entry), "shard": shard, "offset": offset, "size": size}
            for entry, shard, offset, size in self.entries
        ]
        schema = index_schema().with_metadata(self.facts)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), self._partial / INDEX)
        ledger = [dict(zip(("id", "step", "reason"), row, strict=True)) for row in self.dropped]
        pq.write_table(pa.Table.from_pylist(ledger, schema=ledger_schema()), self._partial / LEDGER)


def read_index(root: str | Path) -> pa.Table:
    """Read and check `root/index.parquet`. Samples without media have the shard "".

    Raises:
        DataError: no such folder, no index, an index that is damaged, lacks columns or names shards
            outside `root`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    root = Path(root)
    path = root / INDEX
    try:
        if not root.is_dir():
            raise DataError(f"{root} is no folder; a packed dataset is needed (`xray data pack` makes one)")
        if not path.is_file():
            raise DataError(f"{root} holds no {INDEX}; a packed dataset is needed (`xray data pack` makes one)")
        table = pq.read_table(path, memory_map=False)
    except DataError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); pack the dataset again") from error
    if "probability" not in table.column_names:  # written before there was balancing
        table = table.append_column("probability", pa.array([1.0] * len(table), pa.float64()))
    missing = [name for name in index_schema().names if name not in table.column_names]
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}; pack the dataset again")
    for name in pc.unique(table["shard"]).to_pylist():
        if name != "" and (not name or name != Path(name).name or name in (".", "..")):
            raise DataError(f"{path} names a shard {name!r} outside its folder; pack the dataset again")
    return table.combine_chunks()


def read_facts(root: str | Path) -> dict[str, str]:
    """The settings a dataset was packed with, as written by `ShardWriter(facts=...)`."""
    metadata = read_index(root).schema.metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items() if not key.startswith(b"ARROW")}


def read_ledger(root: str | Path) -> pa.Table:
    """What was dropped when `root` was packed: columns id, step, reason."""
    import pyarrow.parquet as pq

    return pq.read_table(Path(root) / LEDGER)
