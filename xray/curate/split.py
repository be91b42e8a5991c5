"""The split by identity."""

from __future__ import annotations

from daft import DataFrame

from xray.curate.frame import keeping
from xray.curate.step import Context, Step


def split_by_identity(frame: DataFrame | None, context: Context) -> DataFrame:
    """Split."""
    assert frame is not None
    return keeping(frame)


STEP = Step("split", split_by_identity)
