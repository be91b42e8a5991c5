"""Settings that must stand before torch is imported, and the order of the files."""

import os

import pytest

# OpenMP threads that wait sleep instead of spinning, so that tests which start processes do not starve them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LONG = (
    "distributed",
    "triton",
    "extension",
    "curate_runs",
    "train",
    "demo",
    "chaos",
    "cuda_emulation",
    "checkpoint_ranks",
    "optimizer",
)
"""Files that take a minute and more, the longest first: begun last, one would keep a single worker busy in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order within a file stays."""
    names = [f"test_{name}" for name in LONG]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))
