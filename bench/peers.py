"""Losses and models of other projects, loaded for comparison."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
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


def _stand_in(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _StandInClass(name, (), {})


class _StandInClass(type):
    """A class that has every attribute, each again such a class."""

    def __getattr__(cls, name: str) -> Any:
        return _stand_in(name)


class _StandIn(MetaPathFinder, Loader):
    """Finds every torchvision module; anything imported from one is a class that does nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = _stand_in


def import_without_torchvision(name: str) -> ModuleType:
    """Import ``name``, of timm, open_clip or what trains it.

    They import torchvision for transforms, data sets and a frozen batch norm that nothing here uses. PyPI's torchvision
    pulls another torch, so where it is absent or does not load, stand-ins take its place during this one import.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    package = name.split(".")[0]
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        _forget(package, "torchvision")
    finder = _StandIn()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        _forget("torchvision")


def _forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]
