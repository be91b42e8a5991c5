"""Result files, bench/results/<device>/<op>.json: what was measured, where, and what follows from the raw samples."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1
GREEN = "green"
"""The verdict of a peer that agrees with the float64 oracle; any other verdict is the sentence that says why not."""


@dataclass(frozen=True)
class Timing:
    """One peer in one comparison: its parity verdict, and its samples in seconds (none unless parity is green).

    `ours` marks the implementations of this project, `default` the one that runs when nothing is chosen. `memory` is
    the most bytes that it held, where that was looked at: on a GPU, weights included; of processes, all together.
    """

    name: str
    parity: str
    samples: list[float]
    ours: bool = False
    default: bool = False
    memory: int = 0


COPY = "copy"
"""As the `against` of a target: the share of the speed at which `copy_` moves the same bytes."""
MATMUL = "matmul"
"""As the `against` of a target: the share of the rate of the matrix product that ran beside."""


@dataclass(frozen=True)
class Target:
    """What our default implementation, or the peer `of`, is meant to reach: `at_least` times the speed of another peer,
    or of COPY or MATMUL."""

    against: str
    at_least: float
    of: str = ""


@dataclass(frozen=True)
class Comparison:
    """Peers timed side by side on the same inputs. The first peer is the baseline.

    Attributes:
        function: the public function of `xray.ops`.
        case: the inputs, in words.
        dtype: their dtype, such as "float32".
        direction: "forward" or "forward+backward".
        bytes: least bytes that must be moved, each operand once.
        flops: floating-point operations.
        copy_samples: seconds of `copy_` moving the same bytes, timed between the peers.
        matmul_samples: seconds of a square matrix product of `matmul_flops` operations, timed between the peers; in the
            dtype itself, or in float32 where that is faster.
        others: processor cores that other processes took while this was timed; None where it can not be told.
        peers: one timing a peer.
        skipped: peers that are not here, with the reason.
        targets: what our default implementation is meant to reach here.
        samples: images or pairs that one call takes, where that says something; else 0.
    """

    function: str
    case: str
    dtype: str
    direction: str
    bytes: int
    flops: int
    copy_samples: list[float]
    matmul_samples: list[float]
    matmul_flops: int
    others: float | None
    peers: list[Timing]
    skipped: dict[str, str]
    targets: list[Target] = field(default_factory=list)
    samples: int = 0


@dataclass(frozen=True)
class Row:
    """What the tables show of one timing. `ratio` is the baseline's median over this one's: above 1 is faster."""

    timing: Timing
    median: float
    low: float
    high: float
    ratio: float | None
    gb_per_s: float
    roofline: float


def row(comparison: Comparison, timing: Timing) -> Row | None:
    """The derived numbers of a timing, or None where parity is red: what is wrong has no speed.

    The spread is the interquartile range. The roofline is the longer of moving the bytes at `copy_`'s speed and doing
    the arithmetic at the matrix product's; its share is that time over the median.
    """
    if timing.parity != GREEN:
        return None
    baseline = comparison.peers[0]
    median = statistics.median(timing.samples)
    low = high = median  # of one sample
    if len(timing.samples) > 1:
        low, _, high = statistics.quantiles(timing.samples, n=4, method="inclusive")
    least = max(
        statistics.median(comparison.copy_samples),
        statistics.median(comparison.matmul_samples) * comparison.flops / comparison.matmul_flops,
    )
    return Row(
        timing,
        median,
        low,
        high,
        ratio=statistics.median(baseline.samples) / median if baseline.parity == GREEN else None,
        gb_per_s=comparison.bytes / median / 1e9,
        roofline=least / median,
    )


def reached(comparison: Comparison, target: Target) -> float | None:
    """How many times the speed of the target's peer, or limit, was reached; None where one was not timed."""
    wanted = (peer for peer in comparison.peers if (peer.name == target.of if target.of else peer.default))
    meant = next((peer for peer in wanted if peer.samples), None)
    samples = comparison.copy_samples
    if target.against == MATMUL:  # what that product would take for as many operations
        share = comparison.flops / comparison.matmul_flops
        samples = [share * seconds for seconds in comparison.matmul_samples]
    elif target.against != COPY:
        samples = next((peer.samples for peer in comparison.peers if peer.name == target.against), [])
    if meant is None or not samples:
        return None
    return statistics.median(samples) / statistics.median(meant.samples)


def device_name(device: torch.device) -> str:
    """The processor's own name, such as "AMD EPYC 7763 64-Core Processor"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def device_slug(device: torch.device) -> str:
    """The folder of a device's results: kind, model and, on a CPU, threads, such as "cpu-amd-epyc-2-threads"."""
    words = re.sub(r"\((?:r|tm)\)|\bprocessor\b|\bcpu\b|@.*", " ", device_name(device).lower())
    model = re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "unknown"
    threads = f"-{torch.get_num_threads()}-threads" if device.type == "cpu" else ""
    return f"{device.type}-{model}{threads}"


def processor_seconds() -> tuple[float, float, float] | None:
    """The clock, the processor time of all processes and what the host withholds, and that of this one; Linux only."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
    except (OSError, ValueError):
        return None
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, time.process_time()


def cores_of_others(
    before: tuple[float, float, float] | None, after: tuple[float, float, float] | None
) -> float | None:
    """Processor cores that others took on average between two `processor_seconds()`."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    clock, busy, own = (late - early for early, late in zip(before, after, strict=True))
    return round(max(0.0, (busy - own) / clock), 2)


def commit() -> str | None:
    """The commit of the checkout, with "+changes" where sources differ from it; None outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "xray_kernels", "csrc", "setup.py", "bench/*.py")
    return f"{head}+changes" if head and changed else head


def record(op: str, device: torch.device, comparisons: list[Comparison]) -> dict[str, Any]:
    """Everything a result file holds."""
    return {
        "schema": SCHEMA,
        "op": op,
        "device": device_slug(device),
        "device_name": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "parity": GREEN if all(p.parity == GREEN for c in comparisons for p in c.peers if p.ours) else "red",
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Write a record to `folder`/<device>/<op>.json, lists of numbers on one line each."""
    file = folder / content["device"] / f"{content['op']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, default=str)
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m.group(1)) + "]", text)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def read(file: Path) -> tuple[dict[str, Any], list[Comparison]]:
    """The facts and the comparisons of a result file.

    Raises:
        ValueError: it is not JSON, or not of this schema; the message names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']}, this code reads {SCHEMA}")
        facts = {key: content[key] for key in FACTS}
        comparisons = [
            Comparison(
                **{
                    **entry,
                    "peers": [Timing(**peer) for peer in entry["peers"]],
                    "targets": [Target(**target) for target in entry["targets"]],
                }
            )
            for entry in content["comparisons"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a result file of this project: {error}") from error
    return facts, comparisons


FACTS = (
    "op",
    "device",
    "device_name",
    "device_type",
    "threads",
    "torch",
    "python",
    "commit",
    "date",
    "parity",
)
