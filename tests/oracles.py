"""Import timm or open_clip as a test oracle, where no torchvision that matches this torch is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest


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


def import_oracle(name: str) -> ModuleType:
    """Import ``name``, or skip the test by its name where its package is not installed.

    timm and open_clip import torchvision for transforms, data sets and a frozen batch norm that no oracle
    uses. PyPI's torchvision pulls another torch, so where it is absent or does not load, stand-ins take its
    place during this one import.
    """
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
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
