"""What is in use: op x device -> implementation, measured or not; and what was built, how, and what failed to load."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
from pathlib import Path

import torch

from xray_kernels import _library

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def build_info() -> dict[str, str]:
    """Facts of the compiled modules; the reason when there are none."""
    try:
        host = importlib.import_module("xray_kernels._host")
    except ImportError as error:
        return {"_host": f"not usable: {error}"}
    return {**host.build_info(), "processor": host.cpu_capability()}


def measured() -> dict[tuple[str, str], list[str]]:
    """(op family, "cpu" or "cuda") -> the devices that have a committed result file; only in a source checkout."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted(RESULTS.glob("*/*.json")):
        kind = json.loads(file.read_text()).get("device_type", "cpu")
        found.setdefault((file.stem, kind), []).append(file.parent.name)
    return found


def report() -> str:
    """The whole picture as text: build facts, then a table of ops."""
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, XRAY_KERNELS={_library.choice()}",
        *(f"{name}: {value}" for name, value in build_info().items()),
        *(f"{name}: loaded, {file.name}" for name, file in _library.LOADED.items()),
        *(f"{name}: {why}" for name, why in _library.FAILED.items()),
        f"triton: {importlib.metadata.version('triton') if _library.has_triton() else 'not installed'}",
        f"instruction sets: {', '.join(_library.cpu_capabilities()) or 'none compiled'}",
        "",
        f"{'op':34}{'cpu':12}{'cuda':12}measured on",
    ]
    results = measured()
    for name, function in _library.REFERENCES.items():
        family = function.__module__.split(".")[1]
        devices = sorted({device for (stem, _), names in results.items() if stem == family for device in names})
        row = f"{name:34}{_library.implementation(name, 'cpu'):12}{_library.implementation(name, 'cuda'):12}"
        lines.append(row + (", ".join(devices) or "not measured"))
    return "\n".join(lines)
