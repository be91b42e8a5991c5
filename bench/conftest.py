"""`pytest bench/ --benchmark` measures, prints one table and writes result files; otherwise it is a smoke test."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from bench import harness, results, table
from bench.results import Comparison

MEASURED: dict[str, list[Comparison]] = defaultdict(list)
"""op -> what this session measured."""
COLLECTED: Counter[str] = Counter()
"""op -> benchmarks of this session."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        dest="run_benchmarks",
        help="Measure on real shapes and write bench/results; otherwise benchmarks are a smoke test.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    if config.getoption("run_benchmarks", False):
        harness.keep_freed_memory()
    config.option.benchmark_quiet = True  # its table would mix the peers, whose turns it timed as one series
    logging.getLogger("torch.__trace").propagate = False  # torch.compile's trace would drown the report of a failure


def op_of(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("bench_")


def pytest_collection_finish(session: pytest.Session) -> None:
    COLLECTED.update(op_of(item) for item in session.items if item.path.name.startswith("bench_"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What says by itself that it can not be measured here does not make a run partial."""
    if report.skipped:
        COLLECTED[Path(report.nodeid.split("::")[0]).stem.removeprefix("bench_")] -= 1


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any) -> harness.Bench:
    """Compares peers; see `harness.Bench`."""
    full = request.config.getoption("run_benchmarks", False)
    return harness.Bench(benchmark, full, MEASURED[op_of(request.node)])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    comparisons = [comparison for found in MEASURED.values() for comparison in found]
    if not comparisons:
        return
    chosen = bool(config.option.keyword) or any("::" in argument for argument in config.args)
    lines = []  # files first: they took long to measure
    for op, found in MEASURED.items():
        if chosen or len(found) < COLLECTED[op]:
            lines.append(f"{op}: only a part ran, so its result file is left as it was")
        else:
            file = results.write(results.RESULTS, results.record(op, harness.DEVICE, found))
            lines.append(f"{op}: wrote {file.relative_to(results.ROOT)}")
    terminalreporter.section(f"benchmarks on {results.device_name(harness.DEVICE)}")
    terminalreporter.write_line(table.terminal(comparisons))
    for line in lines:
        terminalreporter.write_line(line)
