"""What resembles an evaluation set goes."""

from __future__ import annotations

from daft import DataFrame

from xray.curate.frame import keeping
from xray.curate.step import Context, Step


def decontaminate(frame: DataFrame | None, context: Context) -> DataFrame:
    """Drop what resembles."""
    assert frame is not None
    return keeping(frame)


STEP = Step("decontaminate", decontaminate)
