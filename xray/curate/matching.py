"""Which entries of the metadata a caption holds."""

from __future__ import annotations

from daft import DataFrame

from xray.curate.frame import keeping
from xray.curate.step import Context, Step


def match(frame: DataFrame | None, context: Context) -> DataFrame:
    """Find entries."""
    assert frame is not None
    return keeping(frame)


STEP = Step("match", match)
