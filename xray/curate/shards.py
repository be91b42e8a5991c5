"""The last step: tar shards and their index."""

from __future__ import annotations

from daft import DataFrame

from xray.curate.frame import keeping
from xray.curate.step import Context, Step


def write_shards(frame: DataFrame | None, context: Context) -> DataFrame:
    """Write shards."""
    assert frame is not None
    return keeping(frame)


STEP = Step("shards", write_shards)
