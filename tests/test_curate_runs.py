"""Whole curations by the command line: killed at any step, or on a Ray cluster, they end in the same bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from curate_frames import engine
from PIL import Image

from xray.curate import STEPS
from xray.data import Dataset, generated

HERE = Path(__file__).parent
SETTINGS = ("max_side=32", "max_frames=4", "wordnet=off", "shard_bytes=30000", "threshold=4", "num_workers=1")
assert engine  # curate_frames skips this file where Daft is missing


def write_source(folder: Path) -> Path:
    """Images and clips with captions, and some dirt of every kind that is cheap to make."""
    everything = Dataset(generated(folder / "set", size=60, image_size=32), None)
    source = folder / "source"
    source.mkdir()
    rows = ["file_name,caption,tags"]
    for number in range(len(everything)):
        sample = everything[number]
        name = f"{number:02d}.webp"
        first, *more = sample.frames
        first.save(source / name, save_all=True, append_images=more, lossless=True, duration=100)
        rows.append(f'{name},"{sample.caption}","{";".join(sample.tags)}"')
    (source / "again.webp").write_bytes((source / "00.webp").read_bytes())
    (source / "torn.webp").write_bytes((source / "01.webp").read_bytes()[:50])
    Image.new("RGB", (32, 32), "white").save(source / "blank.png")
    (source / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    return source


def command(source: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "xray", "curate", str(source), str(out), *SETTINGS, "progress=false"]


def digests(out: Path) -> dict[str, str]:
    """The bytes of all that is meant to be the same."""
    names = ["index.parquet", "ledger.parquet", *sorted(path.name for path in out.glob("*.tar"))]
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("curate"))


@pytest.fixture(scope="module")
def undisturbed(source: Path) -> dict[str, str]:
    out = source.parent / "undisturbed"
    subprocess.run(command(source, out), check=True, capture_output=True, timeout=300)
    found = digests(out)
    assert len(found) > 3, "one shard alone would prove little"
    return found


def test_killed_at_any_step_the_next_run_goes_on(source: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in ("decode", "near_duplicates", "shards"):
        number = [step.name for step in STEPS].index(step)
        process = subprocess.Popen(command(source, out), stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while not (out / "steps" / f".{number:02d}-{step}").is_dir():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert len(list((out / "steps").glob("[0-9]*"))) == number, "finished steps stay"
        assert not (out / "index.parquet").exists()
    said = subprocess.run(command(source, out), check=True, capture_output=True, text=True, timeout=300).stdout
    assert digests(out) == undisturbed, said


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_two_workers_of_a_ray_cluster_write_the_same_bytes(
    source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    script = [sys.executable, str(HERE / "curate_ray.py"), *command(source, tmp_path / "out")[4:]]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert digests(tmp_path / "out") == undisturbed
