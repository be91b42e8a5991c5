"""Small media files and folders made on the spot, for the tests of the data package."""

from __future__ import annotations

import io
import json
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, side: int = 24) -> Image.Image:
    """A smooth random picture; other seeds look different."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def video(num_frames: int, container: str = "mp4", side: int = 32) -> bytes:
    """A video of 10 frames a second whose red rises from frame to frame."""
    import av

    codec = {"mp4": "mpeg4", "webm": "libvpx", "avi": "mpeg4", "matroska": "mpeg4"}[container]
    buffer = tempfile.NamedTemporaryFile()  # noqa: SIM115 -- MP4 moves its index to the front of a real file
    options = {"movflags": "faststart"} if container == "mp4" else {}
    with av.open(buffer.name, "w", format=container, options=options) as output:
        stream: Any = output.add_stream(codec, rate=10)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            frame = np.zeros((side, side, 3), np.uint8)
            frame[..., 0] = 250 * index // max(1, num_frames - 1)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        output.mux(stream.encode())
    with buffer:
        return Path(buffer.name).read_bytes()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def make_folder(root: Path, rows: Sequence[Mapping[str, Any]], files: dict[str, bytes]) -> Path:
    """A folder in the image-folder convention with metadata.jsonl."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def pictures_folder(root: Path, count: int) -> Path:
    names = [f"p{number:03d}.png" for number in range(count)]
    rows = [{"file_name": name, "caption": f"picture {name}", "tags": "a;b"} for name in names]
    return make_folder(root, rows, {name: encoded(picture(number), "PNG") for number, name in enumerate(names)})
