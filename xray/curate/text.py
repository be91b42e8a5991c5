"""Captions: what is no language about the picture goes."""

from __future__ import annotations

from daft import DataFrame

from xray.curate.frame import keeping
from xray.curate.step import Context, Step


def clean_text(frame: DataFrame | None, context: Context) -> DataFrame:
    """Clean captions."""
    assert frame is not None
    return keeping(frame)


STEP = Step("clean_text", clean_text)
