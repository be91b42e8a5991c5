"""Generated rows of a pairs table, with the dirt of the web, and the seconds and bytes that their curation takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

WORDS, TAGS, CHUNK = 60_000, 4_000, 100_000
BOILERPLATE = ["click to enlarge", "photo of the day", "untitled document", "product image 1", "IMG_0001"]
ENDINGS = [" https://example.com/p?id=17", " | Example.com - free pictures", " <b>NEW!</b>", " ★★★"]


def vocabulary(size: int) -> np.ndarray:
    """Distinct words that can be spoken, such as "kodila"."""
    syllables = np.array([first + second for first in "bcdfghklmnprstvz" for second in "aeiou"])
    numbers = np.arange(size) + len(syllables)
    parts = [syllables[numbers // len(syllables) ** power % len(syllables)] for power in range(3)]
    return np.char.add(np.char.add(parts[0], parts[1]), np.where(numbers >= len(syllables) ** 2, parts[2], ""))


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Write a Parquet table of id, caption, tags and phash; the first rows are the same for any number of rows.

    Words and tags follow Zipf's law. Of the captions 2% are boilerplate, 2% repeat another's words, 8% end in an
    address, a site's name, markup or symbols; of the tags a part is in upper case or plural; 5% of the hashes differ
    from another's in up to three bits.
    """
    words, tags = vocabulary(WORDS), vocabulary(TAGS)
    tags = np.concatenate([tags, np.char.upper(tags[: TAGS // 10]), np.char.add(tags[: TAGS // 10], "s")])
    tags = np.random.default_rng(0).permutation(tags)
    with pq.ParquetWriter(path, _chunk(words, tags, 0, 1, seed).schema) as writer:
        for start in range(0, rows, CHUNK):
            writer.write_table(_chunk(words, tags, start, min(CHUNK, rows - start), seed))


def write_entries(path: Path, entries: int) -> None:
    """Write a list of metadata: words of `write_rows`, and one pair of them to every three."""
    words, draw = vocabulary(WORDS), np.random.default_rng(0)
    singles = words[: 3 * entries // 4]
    first, second = draw.integers(0, 3000, (2, 2 * entries))
    pairs = dict.fromkeys(f"{words[a]} {words[b]}" for a, b in zip(first, second, strict=True))
    path.write_text("\n".join([*singles, *list(pairs)[: entries - len(singles)]]) + "\n", encoding="utf-8")


def _chunk(words: np.ndarray, tags: np.ndarray, start: int, rows: int, seed: int) -> pa.Table:
    draw = np.random.default_rng((seed, start))
    captions = pc.binary_join(_zipf_lists(draw, words, draw.integers(4, 13, CHUNK)), " ")
    repeats = np.where(draw.random(CHUNK) < 0.02, draw.integers(0, CHUNK, CHUNK), np.arange(CHUNK))
    captions = pc.binary_join_element_wise(captions.take(pa.array(repeats)), _some(draw, ENDINGS, 0.08), "")
    boilerplate = pa.array(draw.choice(BOILERPLATE, CHUNK))
    captions = pc.if_else(pa.array(draw.random(CHUNK) < 0.02), boilerplate, captions)
    hashes = draw.integers(0, 2**64, CHUNK, dtype=np.uint64)
    copied = np.flatnonzero(draw.random(CHUNK) < 0.05)
    flips = np.bitwise_or.reduce(np.uint64(1) << draw.integers(0, 64, (3, len(copied)), dtype=np.uint64), axis=0)
    hashes[copied] = hashes[draw.integers(0, CHUNK, len(copied))] ^ flips
    table = {
        "id": pc.binary_join_element_wise("r", pa.array(np.arange(start, start + CHUNK)).cast(pa.string()), ""),
        "caption": captions,
        "tags": _zipf_lists(draw, tags, draw.integers(0, 6, CHUNK)),
        "phash": hashes,
    }
    return pa.table(table).slice(0, rows)


def _zipf_lists(draw: np.random.Generator, values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Lists of such lengths, of values that are the rarer the later they come."""
    shares = np.cumsum(1 / np.arange(1, len(values) + 1))
    chosen = np.searchsorted(shares, draw.random(lengths.sum()) * shares[-1])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values).take(pa.array(np.minimum(chosen, len(values) - 1))))


def _some(draw: np.random.Generator, values: list[str], share: float) -> pa.Array:
    """One of the values in a share of the rows, else nothing."""
    return pc.if_else(pa.array(draw.random(CHUNK) < share), pa.array(draw.choice(values, CHUNK)), "")


@dataclass(frozen=True)
class Cost:
    """What a curation took: seconds of each step and of all, the most bytes its processes held at once, and the
    processor seconds they used."""

    steps: dict[str, float]
    seconds: float
    memory: int
    processor: float


def curate(source: Path, out: Path, metadata: Path) -> Cost:
    """Run `xray curate` in a process of its own.

    Raises:
        RuntimeError: it fails; its last words.
    """
    command = [sys.executable, "-m", "xray", "curate", str(source), str(out)]
    started, before = time.perf_counter(), os.times()
    log = out.with_suffix(".log")
    with log.open("w") as words:
        settings = [f"metadata={metadata}", "wordnet=auto", "progress=False"]
        process = subprocess.Popen([*command, *settings], stdout=words, stderr=subprocess.STDOUT)
        memory = 0
        while process.poll() is None:
            memory = max(memory, held_by(process.pid))
            time.sleep(0.2)
    seconds, after = time.perf_counter() - started, os.times()
    if process.returncode:
        raise RuntimeError(f"xray curate failed: {log.read_text()[-2000:]}")
    records = [json.loads(file.read_text()) for file in sorted(out.glob("steps/*/done.json"))]
    processor = sum(after[2:4]) - sum(before[2:4])
    return Cost({record["name"]: record["seconds"] for record in records}, seconds, memory, processor)


def held_by(process: int) -> int:
    """Resident bytes of a process and of all that it started; Linux only, else 0."""
    family, resident = {process}, 0
    for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
        try:
            number, rest = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if number in family or int(rest[1]) in family:
            family.add(number)
            resident += int(rest[21]) * os.sysconf("SC_PAGE_SIZE")
    return resident
