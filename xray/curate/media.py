"""Media: decoded, measured, shrunk and encoded anew."""

from __future__ import annotations

from daft import DataFrame

from xray.curate.frame import keeping
from xray.curate.step import Context, Step


def decode(frame: DataFrame | None, context: Context) -> DataFrame:
    """Decode every file."""
    assert frame is not None
    return keeping(frame)


STEP = Step("decode", decode)
