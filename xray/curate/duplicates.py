"""Duplicates, by pixels, by looks and by text."""

from __future__ import annotations

from daft import DataFrame

from xray.curate.frame import keeping
from xray.curate.step import Context, Step


def exact_duplicates(frame: DataFrame | None, context: Context) -> DataFrame:
    """Equal pixels."""
    assert frame is not None
    return keeping(frame)


EXACT = Step("exact_duplicates", exact_duplicates)


def near_duplicates(frame: DataFrame | None, context: Context) -> DataFrame:
    """Alike."""
    assert frame is not None
    return keeping(frame)


NEAR = Step("near_duplicates", near_duplicates)


def text_duplicates(frame: DataFrame | None, context: Context) -> DataFrame:
    """Alike captions."""
    assert frame is not None
    return keeping(frame)


TEXT = Step("text_duplicates", text_duplicates)
