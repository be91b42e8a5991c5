"""The first step."""

from __future__ import annotations

from daft import DataFrame

from xray.curate.frame import keeping
from xray.curate.step import Context, Step


def read(frame: DataFrame | None, context: Context) -> DataFrame:
    """Read the source."""
    assert frame is not None
    return keeping(frame)


STEP = Step("read", read)
