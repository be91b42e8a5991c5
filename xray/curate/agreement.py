"""Pairs whose text does not fit the picture, by a CLIP model."""

from __future__ import annotations

from daft import DataFrame

from xray.curate.frame import keeping
from xray.curate.step import Context, Step


def agree(frame: DataFrame | None, context: Context) -> DataFrame:
    """Drop what agrees least."""
    assert frame is not None
    return keeping(frame)


STEP = Step("agreement", agree)
