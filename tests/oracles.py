"""Import timm or open_clip as a test oracle, where no torchvision that matches this torch is installed."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from bench.peers import import_without_torchvision


def import_oracle(name: str) -> ModuleType:
    """Import ``name``, or skip the test by its name where its package is not installed."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return import_without_torchvision(name)
