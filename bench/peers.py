"""Losses of other projects, loaded for comparison."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def open_clip_losses() -> Any:
    """open_clip's `loss.py` alone, as its package imports torchvision; None where it is not installed.

    Each call gives a copy of its own, so that one can be patched and another be compared with.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        return None
    file = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
