"""Tags: one spelling for one thing, and none that say nothing."""

from __future__ import annotations

from daft import DataFrame

from xray.curate.frame import keeping
from xray.curate.step import Context, Step


def canonical_tags(frame: DataFrame | None, context: Context) -> DataFrame:
    """One spelling."""
    assert frame is not None
    return keeping(frame)


CANONICAL = Step("canonical_tags", canonical_tags)


def stop_tags(frame: DataFrame | None, context: Context) -> DataFrame:
    """Take out tags that say nothing."""
    assert frame is not None
    return keeping(frame)


STOPLIST = Step("stop_tags", stop_tags)
