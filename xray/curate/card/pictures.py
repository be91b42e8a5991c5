"""Small pictures of samples, for the data card."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection

from daft import DataFrame, col
from PIL import Image

from xray.data.errors import DecodeError
from xray.data.shards import decode_stored

SIDE = 96
QUALITY = 82


def thumbnail(data: bytes, frames: int) -> str:
    """A media file of `xray.data.shards.encode`, its middle frame, as a WebP data URI.

    Raises:
        DecodeError: the bytes are damaged.
    """
    picture = Image.fromarray(decode_stored(data, frames)[frames // 2])
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


class Album:
    """Pictures to be put into one page.

    Args:
        decoded: the table of the step that decodes; without its column `data` there are no pictures.
        ids: of the samples to be shown.
        budget: characters that all pictures may take; what comes later goes without.
    """

    def __init__(self, decoded: DataFrame, ids: Collection[str], budget: int) -> None:
        self.left = budget
        self._uris: dict[str, str] = {}
        if not ids or "data" not in decoded.column_names:
            return
        found = decoded.where(col("id").is_in(sorted(ids)) & col("data").not_null()).select("id", "data", "frames")
        for batch in found.to_arrow_iter():
            for row in batch.to_pylist():
                try:
                    self._uris[row["id"]] = thumbnail(row["data"], row["frames"] or 1)
                except DecodeError:
                    continue

    def picture(self, id: str) -> str | None:
        """The address of a sample's picture, if there is one and room for it."""
        uri = self._uris.get(id)
        if uri is None or len(uri) > self.left:
            return None
        self.left -= len(uri)
        return uri
