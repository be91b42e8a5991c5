"""How much memory something takes: by what PyTorch's allocator counts, or by the system's account of a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

needs_account = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
"""For tests that call `run_measured`."""

MEASURE = """
import ctypes, sys, torch
ctypes.CDLL(None).mallopt(-3, 128 << 10)  # blocks of 128 KiB and more go back to the system when freed

def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

def peak_of(run):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
    before = status("VmRSS")
    result = run()
    return status("VmHWM") - before, result
"""


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator held inside `run`, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler
    changes = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def run_measured(script: str, *arguments: str) -> list[str]:
    """What a script prints, line by line, in a process of its own.

    It has `peak_of(run)`: the bytes that the process grew by inside `run`, at most, and what that returned.
    """
    command = [sys.executable, "-c", MEASURE + script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
