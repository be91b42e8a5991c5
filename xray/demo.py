"""`xray demo`: real data, three stages of training, an ablation, evaluation and a report, in minutes.

The folder of a run:

    data/                      the curated dataset
    mae/ tags/ clip/           the three stages, each starting from the one before
    clip_only/                 the ablation: stage 3 with the same steps and data, from random weights
    metrics.json report.html   the result

Everything can be interrupted and started again: what is finished is kept, a stage that was stopped goes on
from its last checkpoint, and a stage whose recipe, data or starting weights have changed is trained anew.
"""

import hashlib
import json
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import xray
from xray import data, evaluate, models, train
from xray.curate.demo_set import DemoSet, prepare_demo
from xray.data.shards import INDEX, read_facts
from xray.evaluate import facts, pictures, report

STAGES = ("mae", "tags", "clip")
ABLATION = "clip_only"
STARTS_FROM = {"mae": "", "tags": "mae", "clip": "tags", ABLATION: ""}
TITLES = {
    "mae": "stage 1 of 3, masked autoencoding of images",
    "tags": "stage 2 of 3, tags of clips and images",
    "clip": "stage 3 of 3, CLIP",
    ABLATION: "ablation, CLIP from random weights",
}
# Settings that do not change what is learned; places are filled in later and do not count either.
NOT_LEARNED = (
    "name",
    "num_workers",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "tensorboard",
    "trackers",
    "peak_tflops",
    "profile",
    "progress",
)
QUICK_SAMPLES = 900
# The demo's captions are lists of words, not sentences, and so are its prompts.
ZERO_SHOT_TEMPLATES = ("{}",)
LAST_STEPS = 10  # a stage's final loss is the mean over this many steps
MARK = "stage.json"


class DemoError(ValueError):
    """The demo cannot run in the folder it was given; one sentence says why."""


@dataclass(frozen=True)
class Stage:
    """A finished stage: its recipe, its folder, and the lines of its metrics.jsonl."""

    name: str
    recipe: train.Recipe
    out: Path
    lines: list[dict[str, Any]]

    @property
    def checkpoint(self) -> Path:
        """The stage's trained model."""
        return self.out / "model.safetensors"

    def summary(self) -> dict[str, Any]:
        """The stage in metrics.json: ``seconds`` of all sessions, ``final_loss`` as a mean of ten steps."""
        seconds = float(self.lines[-1]["seconds"])
        losses = [line["loss"] for line in self.lines[-LAST_STEPS:] if line["loss"] is not None]
        return {
            "name": self.name,
            "steps": self.recipe.steps,
            "seconds": seconds,
            "final_loss": fmean(losses),
            "images_per_s": self.recipe.steps * self.recipe.batch_size / max(seconds, 1e-9),
        }


def run(
    out: str | Path = "runs/demo",
    *,
    cache: str | Path | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
) -> Path:
    """Run the demo, or go on with one that was interrupted.

    Args:
        out: the folder of the run.
        cache: where downloads are kept; None takes ``data.default_cache()``.
        seed: of data splits, weights, order and augmentation.
        quick: tiny models on a few generated shapes, in seconds: proves that everything works, nothing else.
        progress: show progress bars.

    Returns:
        The path of report.html; metrics.json is beside it.

    Raises:
        DemoError: ``out`` cannot be written, or holds something else.
        DataError: no data could be prepared.
        TrainError: a stage cannot be trained.
        KeyboardInterrupt: the run was interrupted; the same command goes on with it.
    """
    out = Path(out)
    command = _command(out, cache, seed, quick)
    _claim(out)
    try:
        say(f"\nxray demo: everything goes to {out}; stop at any time, the same command goes on\n")
        made = _data(out, cache, seed, quick, progress)
        stages = {name: _stage(name, out, made.folder, seed, quick, progress) for name in (*STAGES, ABLATION)}
        return _finish(out, made, stages, seed, command, progress)
    except train.Stopped as stopped:
        say(f"\nstopped, and the state is saved; go on with: {command}")
        raise KeyboardInterrupt from stopped


def say(text: str) -> None:
    """Tell the user something; a line at once, also into a file or a pipe."""
    print(text, file=sys.stderr, flush=True)


def recipes(quick: bool, seed: int) -> dict[str, train.Recipe]:
    """The recipe of each stage and of the ablation, before folders are filled in."""
    chosen = {name: train.RECIPES[f"demo_{name}"]() for name in STAGES}
    if quick:
        chosen = {name: _tiny(recipe) for name, recipe in chosen.items()}
    chosen = {name: replace(recipe, seed=seed) for name, recipe in chosen.items()}
    return {**chosen, ABLATION: chosen["clip"]}


def _tiny(recipe: train.Recipe) -> train.Recipe:
    return replace(
        recipe,
        model="tiny",
        image_size=32,
        steps=6,
        batch_size=8,
        warmup_steps=2,
        keep_rate_warmup=min(recipe.keep_rate_warmup, 4),
        checkpoint_every=3,
        decoder_width=16,
        decoder_heads=2,
        embed_dim=16,
        text_width=16,
        text_depth=1,
        text_heads=2,
        vocab_size=300,
        num_workers=0,
        tensorboard=False,
    )


def _command(out: Path, cache: str | Path | None, seed: int, quick: bool) -> str:
    """What to type to get this run again."""
    words = ["xray demo"]
    words += [f"out={out}"] * (out != Path("runs/demo"))
    words += [f"cache={cache}"] * (cache is not None)
    words += [f"seed={seed}"] * (seed != 0)
    words += ["quick=true"] * quick
    return " ".join([words[0], *map(shlex.quote, words[1:])])


def _claim(out: Path) -> None:
    """Make the folder, and see that files can be written into it, before minutes are spent."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise DemoError(f"out is {out}, which cannot be written: {error.strerror or error}") from error


def _data(out: Path, cache: str | Path | None, seed: int, quick: bool, progress: bool) -> DemoSet:
    """The dataset, made now or before; notes beside it how long that took."""
    folder, note = out / "data", out / "data.json"
    made = DemoSet(folder, [])
    say("data: fetching what can be reached, curating" if not quick else "data: generated shapes")
    began = time.perf_counter()
    made_before = (folder / INDEX).is_file()
    if not quick:
        made = prepare_demo(folder, cache, seed=seed, progress=progress)
    elif not made_before:
        data.generated(folder, QUICK_SAMPLES, seed, image_size=32)
    elif read_facts(folder).get("generated_seed") != str(seed):
        raise DemoError(f"{folder} holds other data than quick=true seed={seed} needs; name another out")
    seconds = time.perf_counter() - began
    if not made_before:
        report.write_text(note, json.dumps({"seconds": seconds}))
    found = facts.dataset(folder, made.missing)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in found["dropped_by_reason"].items())
    say(
        f"data: {found['train']:,} to train and {found['test']:,} to test, of them "
        f"{found['train_clips']:,} and {found['test_clips']:,} clips; left out: {left_out or 'nothing'} "
        f"({report.duration(seconds)})\n"
    )
    return made


def _stage(name: str, out: Path, folder: Path, seed: int, quick: bool, progress: bool) -> Stage:
    """Train a stage, go on with it, or find it finished."""
    chosen = recipes(quick, seed)
    where = out / name
    origin = STARTS_FROM[name]
    recipe = replace(
        chosen[name],
        data=str(folder),
        out=str(where),
        init=str(out / origin / "model.safetensors") if origin else "",
        progress=progress,
    )
    wanted = fingerprint(name, chosen, folder)
    known = _known(where)
    finished = known == wanted and (where / "model.safetensors").is_file()
    if not finished:
        if known != wanted:
            _clear(where)
            report.write_text(where / MARK, json.dumps({"fingerprint": wanted}))
        say(f"{TITLES[name]}: {recipe.steps:,} steps of {recipe.batch_size}")
        started = (where / "recipe.json").is_file()
        train.run(replace(recipe, resume="latest" if started else ""))
    stage = Stage(name, recipe, where, _lines(where))
    summary = stage.summary()
    when = "done before" if finished else "done"
    say(f"{TITLES[name]}: {when}, loss {summary['final_loss']:.3f} ({report.duration(summary['seconds'])})\n")
    return stage


def fingerprint(name: str, chosen: Mapping[str, train.Recipe], folder: Path) -> str:
    """A digest of all that decides a stage's weights: its recipe, the data, and the stages it starts from."""
    learned = {key: value for key, value in asdict(chosen[name]).items() if key not in NOT_LEARNED}
    parts = {
        "recipe": learned,
        "data": hashlib.sha256((folder / INDEX).read_bytes()).hexdigest(),
        "version": xray.__version__,
        "init": fingerprint(STARTS_FROM[name], chosen, folder) if STARTS_FROM[name] else "",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _known(where: Path) -> str:
    """The fingerprint of the stage in a folder, empty if there is none."""
    try:
        return str(json.loads((where / MARK).read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _clear(where: Path) -> None:
    """Remove an earlier stage, and nothing that is not one."""
    if where.is_dir() and any(where.iterdir()) and not (where / MARK).is_file():
        raise DemoError(f"{where} holds something that no demo made; remove it or name another out")
    try:
        if where.is_dir():
            shutil.rmtree(where)
    except OSError as error:
        raise DemoError(f"{where} cannot be removed to train it anew: {error.strerror or error}") from error


def _lines(where: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl."""
    try:
        return train.read_metrics(where)
    except train.TrainError as error:
        raise DemoError(f"{error}; remove {where} to train it anew") from error


def _finish(out: Path, made: DemoSet, stages: Mapping[str, Stage], seed: int, command: str, progress: bool) -> Path:
    """Evaluate, write metrics.json and report.html, and print the summary."""
    say("evaluation: held-out images and clips")
    began = time.perf_counter()
    result, shown = _evaluate(made.folder, stages, seed, progress)
    seconds = {"data": _data_seconds(out)}
    seconds |= {name: float(stage.lines[-1]["seconds"]) for name, stage in stages.items()}
    seconds["evaluation"] = time.perf_counter() - began
    seconds["total"] = sum(seconds.values())
    metrics: dict[str, Any] = {
        "data": facts.dataset(made.folder, made.missing),
        "stages": [stages[name].summary() for name in STAGES],
        **result,
        "seconds": seconds,
        "hardware": facts.hardware(),
        "versions": facts.versions(),
        "seed": seed,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }
    metrics["ablation"][ABLATION].update(stages[ABLATION].summary())
    report.write_text(out / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
    curves = {name: stage.lines for name, stage in stages.items()}
    page = report.write_report(out / "report.html", metrics, curves, shown)
    say(f"evaluation: done ({report.duration(seconds['evaluation'])})\n")
    print(report.summary_table(metrics))
    print(f"\n{out / 'metrics.json'}\n{page}  <- open this in a browser", flush=True)
    return page


def _data_seconds(out: Path) -> float:
    """How long the data took, in this session or an earlier one."""
    try:
        return float(json.loads((out / "data.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _labelled(folder: Path, images: data.Dataset) -> data.Dataset:
    """The held-out images of the set with the most labels.

    Each set has its own list of classes; two together would hold near synonyms ("animals", "animals & nature").
    """
    labels = zip(images.column("source"), images.column("label"), strict=True)
    sources = Counter(source for source, label in labels if label)
    return data.Dataset(folder, "test", media="image", source=sources.most_common(1)[0][0])


def _evaluate(
    folder: Path, stages: Mapping[str, Stage], seed: int, progress: bool
) -> tuple[dict[str, Any], pictures.Pictures]:
    """The numbers of both CLIP models and of the tag model, and the pictures."""
    images = data.Dataset(folder, "test", media="image")
    clips = data.Dataset(folder, "test", media="clip")
    labelled = _labelled(folder, images)
    shown = pictures.Pictures()
    scores: dict[str, dict[str, Any]] = {}
    for name in ("clip", ABLATION):
        model, header = models.load(stages[name].checkpoint, kind="clip")
        assert isinstance(model, models.Clip)
        tokenizer = data.Tokenizer.load(header["tokenizer"])
        embedded = evaluate.embed_dataset(model, images, progress=progress, title=name)
        scores[name] = {
            "retrieval": evaluate.retrieval(model, tokenizer, images, embedded=embedded),
            "zero_shot": evaluate.zero_shot(
                model, tokenizer, labelled, templates=ZERO_SHOT_TEMPLATES, progress=progress
            ),
        }
        if name == "clip":
            shown.retrievals = pictures.retrievals(model, tokenizer, images, embedded, seed=seed)
            shown.survivors = pictures.survivors(model, images, count=6, seed=seed + 1)
            shown.survivors += pictures.survivors(model, clips, count=1, seed=seed)
    tagger, header = models.load(stages["tags"].checkpoint, kind="tags")
    assert isinstance(tagger, models.TagClassifier)
    tags = json.loads(header["tags"])
    clip_tags = evaluate.clip_tags(tagger, tags, clips, progress=progress)
    shown.clips = pictures.tagged_clips(tagger, tags, clips, seed=seed)
    mae, _ = models.load(stages["mae"].checkpoint, kind="mae")
    assert isinstance(mae, models.MaskedAutoencoder)
    shown.mask_ratio = mae.config.mask_ratio
    shown.reconstructions = pictures.reconstructions(mae, images, seed=seed)
    return {**scores["clip"], "clip_tags": clip_tags, "ablation": {ABLATION: scores[ABLATION]}}, shown
