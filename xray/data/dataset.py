"""Random access to a packed dataset: one sample is one read at a known offset of a shard."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xray.data.errors import DataError, DecodeError
from xray.data.shards import decode_stored, read_index

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

SPLITS = ("train", "test")
MEDIA = ("image", "clip")
OPEN_SHARDS = 64  # file handles a dataset keeps per process


@dataclass(frozen=True)
class Sample:
    """One captioned image or clip.

    Attributes:
        id: unique in its dataset.
        media: "image" or "clip".
        caption: what is seen, in words.
        tags: short words about it; may be empty.
        label: its category for classification, "" if none.
        image: uint8 RGB, (H, W, 3) for an image and (T, H, W, 3) for a clip.
        source: the set it comes from.
    """

    id: str
    media: str
    caption: str
    tags: list[str]
    label: str
    image: np.ndarray = field(repr=False)
    source: str = ""

    @property
    def frames(self) -> list[Image.Image]:
        """The pixels as Pillow images: one for an image, T for a clip."""
        from PIL import Image

        return [Image.fromarray(frame) for frame in self.image.reshape(-1, *self.image.shape[-3:])]


class Dataset:
    """A packed dataset folder, or the part of it that was asked for, as a map-style dataset.

    It reads nothing but the index until samples are asked for, and can be given to worker processes.

    Args:
        root: a folder with `index.parquet` and its shards.
        split: "train", "test", or None for both.
        media: "image", "clip", or None for both.
        min_tags: keep only samples with at least this many tags.
        source: keep only samples from this source; None for all.
        captioned: keep only samples with a caption.

    Attributes:
        root: the folder.
        index: a pyarrow Table with the rows kept, in index order (see `shards.Entry` for the columns).

    Raises:
        DataError: an unknown split or media, a folder without a readable index, or a dataset without media.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = "train",
        media: str | None = None,
        min_tags: int = 0,
        *,
        source: str | None = None,
        captioned: bool = False,
    ) -> None:
        import pyarrow.compute as pc

        if split is not None and split not in SPLITS:
            raise DataError(f"split is {split!r}; one of {', '.join(SPLITS)} or None is needed")
        if media is not None and media not in MEDIA:
            raise DataError(f"media is {media!r}; one of {', '.join(MEDIA)} or None is needed")
        self.root = Path(root)
        table = read_index(self.root)
        if pc.any(pc.equal(table["shard"], "")).as_py():
            raise DataError(f"{self.root} holds no media, only what is said of it; a source with media is needed")
        for column, wanted in (("split", split), ("media", media), ("source", source)):
            if wanted is not None:
                table = table.filter(pc.equal(table[column], wanted))
        if min_tags > 0:
            table = table.filter(pc.greater_equal(pc.list_value_length(table["tags"]), min_tags))
        if captioned:
            table = table.filter(pc.not_equal(pc.utf8_trim_whitespace(table["caption"]), ""))
        self.index: pa.Table = table.combine_chunks()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.index.num_rows

    def __repr__(self) -> str:
        return f"Dataset({str(self.root)!r}, {len(self)} samples)"

    def __getitem__(self, position: int) -> Sample:
        """Read and decode one sample.

        Raises:
            IndexError: position out of range.
            DecodeError: the shard is missing or cut off, or the media is damaged.
        """
        if not -len(self) <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)} does not exist")
        row = self.index.slice(position % len(self), 1).to_pylist()[0]
        frames = decode_stored(self._read(row["shard"], row["offset"], row["size"]), max(1, row["frames"]))
        return Sample(
            id=row["id"],
            media=row["media"],
            caption=row["caption"],
            tags=row["tags"],
            label=row["label"],
            image=frames if row["media"] == "clip" else frames[0],
            source=row["source"],
        )

    def column(self, name: str) -> list[Any]:
        """One column of the index as a list, for example `dataset.column("caption")`."""
        return self.index[name].to_pylist()

    def _read(self, shard: str, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._file(shard), size, offset)
        except OSError as error:
            raise DecodeError(f"{self.root / shard} cannot be read: {error.strerror or error}") from error
        if len(data) < size:
            raise DecodeError(f"{self.root / shard} is truncated: bytes {offset} to {offset + size} are not there")
        return data

    def _file(self, shard: str) -> int:
        """A descriptor of the shard; reads give their offset, so forked processes can share it."""
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self.root / shard, os.O_RDONLY)
                if len(self._files) > OPEN_SHARDS:
                    os.close(self._files.popitem(last=False)[1])
            self._files.move_to_end(shard)
            return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _files=OrderedDict(), _lock=threading.Lock())

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)
