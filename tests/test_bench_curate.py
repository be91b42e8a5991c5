"""The rows that curation is measured with, and what measures it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench import curation


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    curation.write_rows(path, 30_000)
    return pq.read_table(path).to_pylist()


def test_fewer_rows_are_the_first_of_more(rows: list[dict[str, object]], tmp_path: Path) -> None:
    curation.write_rows(tmp_path / "few.parquet", 70)
    assert pq.read_table(tmp_path / "few.parquet").to_pylist() == rows[:70]
    curation.write_rows(tmp_path / "other.parquet", 70, seed=1)
    assert pq.read_table(tmp_path / "other.parquet")["caption"].to_pylist() != [row["caption"] for row in rows[:70]]


def test_chunks_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation, "CHUNK", 500)
    curation.write_rows(tmp_path / "rows.parquet", 1200)
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table["id"].to_pylist() == [f"r{number}" for number in range(1200)]
    captions = table["caption"].to_pylist()
    assert len({*captions}) > 1100
    assert captions[:500] != captions[500:1000]


def test_the_dirt_is_there(rows: list[dict[str, object]]) -> None:
    captions = [str(row["caption"]) for row in rows]
    shares = {
        "boilerplate": np.mean([caption in curation.BOILERPLATE for caption in captions]),
        "endings": np.mean([caption.endswith(tuple(curation.ENDINGS)) for caption in captions]),
        "upper": np.mean([any(tag.isupper() for tag in row["tags"]) for row in rows]),  # type: ignore[attr-defined]
    }
    assert shares["boilerplate"] == pytest.approx(0.02, abs=0.005)
    assert shares["endings"] == pytest.approx(0.08, abs=0.01)
    assert shares["upper"] > 0.05
    lengths = [len(caption.split()) for caption in captions if caption.isalpha() or " " in caption]
    assert 7.5 < np.mean(lengths) < 8.7


def test_entries(tmp_path: Path) -> None:
    curation.write_entries(tmp_path / "entries.txt", 4000)
    entries = (tmp_path / "entries.txt").read_text().splitlines()
    assert len(entries) == len(set(entries)) == 4000
    assert sum(" " in entry for entry in entries) == 1000
    assert len(set(curation.vocabulary(60_000))) == 60_000


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
def test_the_memory_of_a_process_and_its_children() -> None:
    hold = "import sys; b = bytearray(60 << 20); print(flush=True); sys.stdin.read()"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    before = curation.held_by(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert 60 << 20 < curation.held_by(os.getpid()) - before < 140 << 20
    process.communicate()
    assert abs(curation.held_by(os.getpid()) - before) < 30 << 20


def test_a_curation_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"none\.parquet"):
        curation.curate(tmp_path / "none.parquet", tmp_path / "out", tmp_path / "entries.txt")
