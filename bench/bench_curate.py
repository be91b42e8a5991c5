"""What curation costs, by step, at two sizes one after the other: seconds a million rows, and how they scale.

Rows are generated: caption, tags and perceptual hash, no pixels; captions are matched against a list of 100,000
entries. Sizes are those of $XRAY_BENCH_ROWS ("1000000,10000000" takes some 20 minutes and 40 GB of disk).
"""

from __future__ import annotations

import os
import shutil
import timeit
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import curation, results
from bench.harness import Bench, Work, copy_of, matmul_for
from bench.results import GREEN, Target, Timing

pytest.importorskip("daft", reason="curation needs Daft")

SIZES = tuple(int(size) for size in os.environ.get("XRAY_BENCH_ROWS", "20000,200000").split(","))
SMOKE = (600,)
ENTRIES = 100_000
MILLION = 1_000_000
SCALES = 0.7  # of the smaller table's speed


def test_curate(bench: Bench, tmp_path: Path) -> None:
    sizes = SIZES if bench.full else SMOKE
    metadata, source = tmp_path / "entries.txt", tmp_path / "rows.parquet"
    curation.write_entries(metadata, ENTRIES if bench.full else 1000)
    before = results.processor_seconds()
    costs = {}
    for rows in sizes:
        curation.write_rows(source, rows)
        costs[rows] = curation.curate(source, tmp_path / "out", metadata)
        shutil.rmtree(tmp_path / "out")
    if not bench.full:
        return
    seconds = {name: [cost.steps[name] for cost in costs.values()] for name in costs[sizes[0]].steps}
    seconds["all steps"] = [cost.seconds for cost in costs.values()]
    work = Work("curate", "", torch.uint8, "a million rows", source.stat().st_size * MILLION // sizes[-1], 0, MILLION)
    copied, multiplied = copy_of(work.bytes), matmul_for(torch.float32)
    copies, products = ([timeit.timeit(limit, number=1) for _ in range(3)] for limit in (copied, multiplied))
    if before is not None:  # the curations' processes are no others
        before = (before[0], before[1] + sum(cost.processor for cost in costs.values()), before[2])
    names = [f"{rows:,} rows" for rows in sizes]
    for step, taken in seconds.items():
        timings = [
            Timing(name, GREEN, [took * MILLION / rows], ours=True, default=name == names[-1], memory=memory)
            for name, rows, took, memory in zip(
                names, sizes, taken, [cost.memory * (step == "all steps") for cost in costs.values()], strict=True
            )
        ]
        wanted = [Target(names[0], SCALES)] if len(names) > 1 else []
        bench.record(replace(work, case=step), timings, copies, products, before, {}, wanted)
