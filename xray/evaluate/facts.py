"""What a result was made from and on: data, machine, versions; for metrics.json and the report."""

import os
import platform
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from xray.data import Dataset
from xray.data.dataset import SPLITS
from xray.data.shards import COPIED, read_ledger

PACKAGES = ("torch", "numpy", "pillow", "av", "pyarrow", "tokenizers", "safetensors", "triton")


def dataset(folder: str | Path, missing: Sequence[str] = ()) -> dict[str, Any]:
    """What a packed or curated dataset holds and what was left out of it.

    Args:
        folder: of the dataset.
        missing: public sets that could not be reached.

    Returns:
        Samples as ``train``, ``test``, ``train_clips``, ``test_clips``; ``dropped``, ``dropped_by_reason``;
        and ``sources``, a list of ``{"name", "used", "train", "test", "reason"}`` that also names what is missing.
    """
    everything = Dataset(folder, None)
    splits, media = everything.column("split"), everything.column("media")
    kinds = Counter(zip(splits, media, strict=True))
    sources = Counter(zip(everything.column("source"), splits, strict=True))
    ledger = read_ledger(folder)
    dropped = Counter(
        step.replace("_", " ")
        for step, reason in zip(ledger["step"].to_pylist(), ledger["reason"].to_pylist(), strict=True)
        if reason != COPIED
    )
    rows = [
        {"name": name, "used": True, "reason": "", **{split: sources[name, split] for split in SPLITS}}
        for name in sorted({name for name, _ in sources})
    ]
    reason = "could not be reached; generated shapes stand in"
    rows += [{"name": name, "used": False, "reason": reason, "train": 0, "test": 0} for name in missing]
    return {
        "train": splits.count("train"),
        "test": splits.count("test"),
        "train_clips": kinds["train", "clip"],
        "test_clips": kinds["test", "clip"],
        "dropped": dropped.total(),
        "dropped_by_reason": dict(dropped.most_common()),
        "sources": rows,
    }


def hardware() -> dict[str, Any]:
    """Processor, cores, threads that PyTorch uses, memory in GiB, GPU (absent if there is none), system."""
    facts: dict[str, Any] = {
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    facts["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    return facts


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it computes with, as far as installed."""
    import xray

    found = {"python": platform.python_version(), "xray": xray.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's name: Linux keeps it in /proc/cpuinfo, other systems in platform."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "an unknown processor"
