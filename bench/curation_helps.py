"""Does curation help? The demo's recipes on curated and on uncleaned openclipart, judged by hand-described pictures.

    python -m bench.curation_helps OUT [--seeds 3] [--arms uncleaned curated unbalanced] [--cache FOLDER]

The evaluation set is `openclipart_by_hand.json`: pictures drawn at random, one for each look, at most five of the 1,375
star polygons, each with a caption and one to four tags in our own words of what is seen (pictures that could not be
named are left out). Neither training set holds them, nor what looks like them. From the same raw files come

    uncleaned    all that decodes, with title and tags as they are; tags stand in for a missing title
    curated      `xray curate` with its default settings
    unbalanced   the same without balancing, which is what `xray demo` trains on

and on each, for each seed, the demo's CLIP from random weights and its tag classifier are trained, of equal steps and
batches. All of a set trains: the split is not needed. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import results
from xray import data, demo, evaluate, models, train
from xray.curate import Settings, curate
from xray.curate.wordnet import Lexicon
from xray.data import DecodeError
from xray.data.clean import is_blank, looks
from xray.data.decoding import decode
from xray.data.folder import METADATA, read_folder, write_metadata
from xray.data.shards import INDEX, Entry, ShardWriter, encode

BY_HAND = Path(__file__).with_name("openclipart_by_hand.json")
RESULT = results.RESULTS / "curation_helps.json"
LOOK_ALIKE = 6  # pictures whose perceptual hashes differ in fewer than this many of 64 bits ...
SIDE = 72  # the demo's
SETTINGS = Settings(max_side=SIDE, test_share=0.0)
ARMS = ("uncleaned", "curated", "unbalanced")
TASKS = ("clip_only", "tags")
COMMON = 3  # pictures that carry a tag for it to count in the mean average precision


def main() -> None:
    parser = argparse.ArgumentParser(description="Curated against uncleaned openclipart.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--cache", default=None)
    parser.add_argument("--steps", type=float, default=1.0, help="share of the recipes' steps, for all alike")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode")
    given = parser.parse_args()
    hand = json.loads(BY_HAND.read_text(encoding="utf-8"))
    raw = data.fetch("openclipart", given.cache)
    sets = prepare(raw, hand, given.out, given.arms)
    lexicon = Lexicon.open("auto")
    canonical = lexicon.canonical if lexicon else str
    runs = []
    for seed in range(given.seeds):
        for arm in given.arms:
            for task in TASKS:
                out = given.out / f"{arm}-{task}-{seed}"
                run = trained(sets[arm], out, task, seed, given.steps, given.workers)
                measures = measured(out, given.out / "hand", canonical)
                runs.append({"arm": arm, "task": task, "seed": seed, **run, "measures": measures})
                write(runs, sets, given.out)
    print(table(runs))


def prepare(raw: Path, hand: dict[str, Any], out: Path, arms: Sequence[str]) -> dict[str, Path]:
    """The evaluation set, and the training sets by name; what is there already is kept."""
    pool, split = out / "raw", out / "hand"
    if not (pool / METADATA[1]).is_file():
        near = look_alikes(raw, set(hand))
        copy_folder(raw, pool, lambda name: name not in near, None)
        (out / "left_out.json").write_text(json.dumps(sorted(near)))
    if not (split / INDEX).is_file():
        copy_folder(raw, out / "hand_raw", hand.__contains__, hand)
        data.pack(out / "hand_raw", split, max_side=SIDE, progress=False)
        held = data.Dataset(split, None)
        if len(held) != len(hand):
            raise ValueError(f"{len(held)} of {len(hand)} pictures are left of {BY_HAND.name}, and all are needed")
    if "uncleaned" in arms and not (out / "uncleaned" / INDEX).is_file():
        uncleaned(pool, out / "uncleaned")
    if "curated" in arms:
        print(curate(pool, out / "curated", SETTINGS))
    if "unbalanced" in arms:
        print(curate(pool, out / "unbalanced", replace(SETTINGS, balance="none")))
    return {arm: out / arm for arm in arms}


def look_alikes(raw: Path, hand: set[str]) -> set[str]:
    """Names of the files that look like those of the evaluation set, and these themselves."""
    names = sorted(path.relative_to(raw).as_posix() for path in raw.rglob("*.png"))
    with ProcessPoolExecutor() as pool:
        seen = dict(zip(names, pool.map(_shape, [raw / name for name in names], chunksize=32), strict=True))
    held = np.array([seen[name] for name in hand], np.uint64)
    return hand | {
        name
        for name, shape in seen.items()
        if shape is not None and int(np.bitwise_count(held ^ np.uint64(shape)).min()) < LOOK_ALIKE
    }


def _shape(path: Path) -> int | None:
    try:
        return looks(decode(path.read_bytes(), max_side=SIDE, trim=True).frames).shape
    except DecodeError:
        return None


def copy_folder(raw: Path, to: Path, keep: Callable[[str], bool], said: dict[str, Any] | None) -> None:
    """The files that `keep` names, as links, with their rows of the metadata, replaced by what is `said` of them."""
    shutil.rmtree(to, ignore_errors=True)
    rows = [json.loads(line) for line in (raw / METADATA[1]).read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if keep(row["file_name"])]
    for row in kept:
        path = to / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to((raw / row["file_name"]).absolute())
    if said is not None:
        kept = [{"file_name": row["file_name"], **said[row["file_name"]]} for row in kept]
    write_metadata(to, kept)


def uncleaned(folder: Path, out: Path) -> None:
    """All that decodes, less pictures of one colour, which have nothing to learn from."""
    records = read_folder(folder).records
    with ShardWriter(out, facts={"max_side": str(SIDE)}) as writer:
        for record in records:
            try:
                frames = decode(record.path.read_bytes(), max_side=SIDE, trim=True).frames[:1]
            except DecodeError as error:
                writer.drop(record.id, "decode", str(error))
                continue
            caption = record.caption or ", ".join(record.tags)
            if is_blank(frames) or not caption:
                writer.drop(record.id, "decode", "the picture is of one colour, or nothing is said of it")
                continue
            encoded, extension = encode(frames, "image")
            height, width = frames.shape[1:3]
            writer.add(Entry(record.id, "image", extension, caption, record.tags, width=width, height=height), encoded)


def trained(folder: Path, out: Path, task: str, seed: int, share: float, workers: int) -> dict[str, Any]:
    """Train one of the demo's recipes on a set, or find it trained."""
    recipe = demo.recipes(False, seed)[task]
    recipe = replace(
        recipe,
        data=str(folder),
        out=str(out),
        clip_fraction=0.0,
        steps=round(share * recipe.steps),
        warmup_steps=round(share * recipe.warmup_steps),
        keep_rate_warmup=round(share * recipe.keep_rate_warmup),
        num_workers=workers,
        tensorboard=False,
        progress=False,
        peak_tflops=1.0,
        resume="auto",
    )
    if not (out / "model.safetensors").is_file():
        print(f"{out.name}: {recipe.steps} steps of {recipe.batch_size}", flush=True)
        train.run(recipe)
    last = train.read_metrics(out)[-1]
    return {"steps": recipe.steps, "batch_size": recipe.batch_size, "seconds": last["seconds"], "loss": last["loss"]}


def measured(run: Path, hand: Path, canonical: Callable[[str], str]) -> dict[str, float]:
    """What a trained model knows of the evaluation set."""
    model, header = models.load(run / "model.safetensors")
    pictures = data.Dataset(hand, None)
    if isinstance(model, models.Clip):
        found = evaluate.retrieval(model, data.Tokenizer.load(header["tokenizer"]), pictures, progress=False)
        ways = ("text_to_image", "image_to_text")
        return {f"{way} {name}": found[way][name] for way in ways for name in ("r@1", "r@5", "r@10", "median_rank")}
    tags = json.loads(header["tags"])
    embedded = evaluate.embed_dataset(model, pictures, progress=False)
    return tag_measures(embedded.features.numpy(), tags, embedded.tags, canonical)


def tag_measures(
    logits: np.ndarray, tags: Sequence[str], truth: Sequence[Sequence[str]], canonical: Callable[[str], str]
) -> dict[str, float]:
    """How well tags (V,) with logits (N, V) are those of N pictures; words are the same if `canonical` says so.

    Returns:
        * ``tag top1`` and ``tag top5``: share of pictures whose likeliest tag, or one of the five, is theirs;
        * ``tag mAP``: mean over the tags of at least three pictures of the average precision of the pictures ranked by
          it; a tag that the vocabulary lacks ranks them at random;
        * ``tags known``: share of these tags that the vocabulary has.
    """
    places: dict[str, list[int]] = {}
    for place, tag in enumerate(tags):
        places.setdefault(canonical(tag), []).append(place)
    own = [{canonical(tag) for tag in some} for some in truth]
    right = np.zeros(logits.shape, bool)
    for row, some in enumerate(own):
        right[row, [place for tag in some for place in places.get(tag, [])]] = True
    ranked = np.argsort(-logits, axis=1, kind="stable")
    hits = np.take_along_axis(right, ranked, axis=1)
    common = sorted(tag for tag in set().union(*own) if sum(tag in some for some in own) >= COMMON)
    precisions = []
    for tag in common:
        wanted = np.array([tag in some for some in own])
        known = tag in places
        score = logits[:, places[tag]].max(axis=1) if known else None
        precisions.append(float(wanted.mean()) if score is None else _average_precision(wanted, score))
    return {
        "tag top1": float(hits[:, 0].mean()),
        "tag top5": float(hits[:, :5].any(axis=1).mean()),
        "tag mAP": statistics.fmean(precisions),
        "tags known": sum(tag in places for tag in common) / len(common),
    }


def _average_precision(wanted: np.ndarray, score: np.ndarray) -> float:
    found = wanted[np.argsort(-score, kind="stable")]
    return float((np.cumsum(found) / np.arange(1, len(found) + 1))[found].mean())


def write(runs: Sequence[dict[str, Any]], sets: dict[str, Path], out: Path) -> None:
    """All numbers so far."""
    device = torch.device("cpu") if not torch.cuda.is_available() else torch.device("cuda")
    content = {
        "device_name": results.device_name(device),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": results.commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "pictures by hand": len(json.loads(BY_HAND.read_text(encoding="utf-8"))),
        "left out of training": len(json.loads((out / "left_out.json").read_text())),
        "samples": {arm: len(data.Dataset(folder, None)) for arm, folder in sets.items()},
        "summary": summary(runs),
        "runs": list(runs),
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, least and most over the seeds, by measure and set."""
    values: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for name, value in run["measures"].items():
            values.setdefault(name, {}).setdefault(run["arm"], []).append(value)
    return {
        name: {
            arm: {"mean": statistics.fmean(some), "least": min(some), "most": max(some), "seeds": len(some)}
            for arm, some in by_arm.items()
        }
        for name, by_arm in values.items()
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The summary in Markdown."""
    found = summary(runs)
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    lines = [f"| measure | {' | '.join(arms)} |", "|---" * (1 + len(arms)) + "|"]
    for name, by_arm in found.items():
        cells = [
            f"{some['mean']:.3f} ({some['least']:.3f} to {some['most']:.3f})" if (some := by_arm.get(arm)) else "-"
            for arm in arms
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
