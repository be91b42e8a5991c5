"""Training: the three tasks learn, a killed run resumes to the same weights, and every mistake gets one sentence."""

import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import small_files
from safetensors.torch import load_file

from xray import data, models, train
from xray.train import checkpoint, metrics, tasks
from xray.train.recipes import RECIPES, Recipe

ROOT = Path(__file__).parents[1]
real_loader = data.loader


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Results must not depend on how a sum is split over threads, here and in the processes started below."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated set, made once."""
    return data.generated(tmp_path_factory.mktemp("data") / "shapes", 240, image_size=32, num_frames=4)


def tiny(name: str, out: Path, shapes: Path, **changes: Any) -> Recipe:
    quiet: dict[str, Any] = {
        "tensorboard": False,
        "progress": False,
        "batch_size": 16,
        "data_size": 240,
        "peak_tflops": 0.1,
    }
    return replace(RECIPES[name](), out=str(out), data=str(shapes), **{**quiet, **changes})


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_weights(a: Path, b: Path) -> bool:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def start(words: list[str], cwd: Path, launcher: tuple[str, ...] = ("-m", "xray")) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, *words]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.01)


# The three stages


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> dict[str, Path]:
    """All three stages, each starting from the one before."""
    folder = tmp_path_factory.mktemp("chain")
    common: dict[str, Any] = {"batch_size": 32, "tensorboard": True, "checkpoint_every": 40}
    mae = train.run(tiny("mae_tiny", folder / "mae", shapes, steps=40, **common))
    tags = train.run(tiny("tags_tiny", folder / "tags", shapes, steps=60, init=str(mae), **common))
    file = str(tags / "model.safetensors")
    clip = train.run(tiny("clip_tiny", folder / "clip", shapes, steps=80, init=file, **common))
    return {"mae": mae, "tags": tags, "clip": clip}


@pytest.mark.parametrize(("stage", "share"), [("mae", 0.7), ("tags", 0.9), ("clip", 0.95)])
def test_loss_falls(chain: dict[str, Path], stage: str, share: float) -> None:
    losses = [line["loss"] for line in lines(chain[stage])]
    assert sum(losses[-10:]) / 10 < share * sum(losses[:3]) / 3


def test_metrics_have_a_line_a_step(chain: dict[str, Path]) -> None:
    found = {f"{way}{name}" for way in ("", "image_to_text_", "text_to_image_") for name in ("top1", "top5", "rank")}
    own: dict[str, set[str]] = {"mae": set(), "tags": {"top1"}, "clip": {"logit_scale", *found}}
    common = {"step", "loss", "images_per_s", "lr", "grad_norm", "keep_rate", "data_wait", "seconds", "skipped"}
    common |= {"tokens_per_s", "mfu", "memory", "memory_peak", "bad_samples", "skipped_total", "checkpoint_seconds"}
    for stage, out in chain.items():
        records = lines(out)
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        for record in records:
            kept_tokens = record.pop("kept_tokens")
            assert record.keys() == common | own[stage]
            assert all(math.isfinite(value) for value in record.values())
            assert len(kept_tokens) == (0 if record["keep_rate"] == 1 else 2)  # the third is the last block: one token
            assert record["mfu"] > 0
            assert 0 <= record["data_wait"] <= 1
            assert record["images_per_s"] > 0
            assert record["skipped"] is False
        assert all(earlier["seconds"] < later["seconds"] for earlier, later in itertools.pairwise(records))
    assert {line["keep_rate"] for line in lines(chain["mae"])} == {1.0}
    assert lines(chain["tags"])[0]["keep_rate"] == 1.0
    assert lines(chain["tags"])[-1]["keep_rate"] == pytest.approx(0.7)
    assert list((chain["clip"] / "tensorboard").glob("events*"))


def test_saved_models_carry_what_their_users_need(chain: dict[str, Path]) -> None:
    mae, header = models.load(chain["mae"] / "model.safetensors")
    assert isinstance(mae, models.MaskedAutoencoder)
    assert mae.config.vision.keep_rate == 1.0
    settings = json.loads(header["recipe"])
    assert settings["steps"] == 40
    assert "out" not in settings
    tagger, header = models.load(chain["tags"] / "model.safetensors")
    assert isinstance(tagger, models.TagClassifier)
    assert len(json.loads(header["tags"])) == tagger.config.num_tags
    assert "red" in json.loads(header["tags"])
    clip, header = models.load(chain["clip"] / "model.safetensors")
    assert isinstance(clip, models.Clip)
    assert clip.config.vision.keep_rate == 0.7
    assert data.Tokenizer.load(header["tokenizer"]).vocab_size == clip.config.text.vocab_size


def test_a_stage_starts_from_the_weights_of_the_one_before(
    chain: dict[str, Path], shapes: Path, tmp_path: Path
) -> None:
    still: dict[str, Any] = {"steps": 1, "learning_rate": 0.0, "init": str(chain["tags"])}
    out = train.run(tiny("clip_tiny", tmp_path / "clip", shapes, **still))
    before, after = load_file(chain["tags"] / "model.safetensors"), load_file(out / "model.safetensors")
    encoder = {name: tensor for name, tensor in before.items() if name.startswith("encoder.")}
    assert encoder
    for name, tensor in encoder.items():
        assert torch.equal(tensor, after[name.replace("encoder.", "vision.", 1)])


def test_clip_trains_on_from_a_whole_clip_model(chain: dict[str, Path], shapes: Path, tmp_path: Path) -> None:
    still: dict[str, Any] = {"steps": 1, "learning_rate": 0.0, "init": str(chain["clip"]), "vocab_size": 300}
    out = train.run(tiny("clip_tiny", tmp_path / "clip", shapes, **still))
    assert same_weights(out, chain["clip"])


def test_init_that_cannot_be_used(chain: dict[str, Path], shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(train.TrainError, match=r"init is .*nothing.* a \.safetensors file or a run's folder"):
        train.run(tiny("clip_tiny", tmp_path / "a", shapes, init=str(tmp_path / "nothing")))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((chain["mae"] / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(models.CheckpointError, match=r"broken\.safetensors"):
        train.run(tiny("clip_tiny", tmp_path / "b", shapes, init=str(broken)))
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.safetensors")
    with pytest.raises(models.CheckpointError, match="pickle"):
        train.run(tiny("tags_tiny", tmp_path / "c", shapes, init=str(tmp_path / "pickle.safetensors")))


# Interruption


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    return train.run(tiny("tags_tiny", out / "run", shapes, steps=24, keep_rate_warmup=12))


def interrupted_words(out: Path, shapes: Path, *more: str) -> list[str]:
    words = f"train tags_tiny out={out} data={shapes} data_size=240 steps=24 keep_rate_warmup=12 batch_size=16"
    return [*words.split(), "tensorboard=false", *more]


def test_kill_and_resume_equals_the_uninterrupted_run(uninterrupted: Path, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(interrupted_words(out, shapes, "checkpoint_every=5", "progress=false"), tmp_path)
    wait_for_step(process, out, 8)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(lines(out))
    assert done < 24
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')  # a line cut off by the kill
    assert not (out / "model.safetensors").exists()
    # Nothing but the folder and "latest" is needed: the run's own settings count.
    recipe = train.recipe_for("tags_tiny", [f"out={out}", "resume=latest"])
    assert (recipe.steps, recipe.batch_size) == (24, 16)
    train.run(recipe)
    assert same_weights(out, uninterrupted)
    again, once = lines(out), lines(uninterrupted)
    assert [line["step"] for line in again] == list(range(1, 25))
    for key in ("loss", "grad_norm", "lr", "keep_rate", "top1"):
        assert [line[key] for line in again] == [line[key] for line in once]
    assert [path.name for path in checkpoint.complete(out)] == ["step-20", "step-24"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves(number: signal.Signals, uninterrupted: Path, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(interrupted_words(out, shapes, "checkpoint_every=0", "num_workers=2"), tmp_path)
    wait_for_step(process, out, 3)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: the loader's workers get it too
    else:
        process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == (0 if number == signal.SIGTERM else 128 + number)
    assert "Traceback" not in errors
    assert errors.count("stopping after this step") == 1
    done = len(lines(out))
    assert [path.name for path in checkpoint.complete(out)] == [f"step-{done}"]
    command = errors.strip().splitlines()[-1].partition("go on with: ")[2]
    assert command == f"xray train tags_tiny out={out} resume=latest"
    train.run(train.recipe_for("tags_tiny", command.split()[3:]))
    assert same_weights(out, uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_starts_over(shapes: Path, tmp_path: Path) -> None:
    recipe = tiny("mae_tiny", tmp_path / "run", shapes, steps=4, checkpoint_every=0)
    out = train.run(recipe)
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    (out / "checkpoints" / ".step-3.tmp").mkdir(parents=True)  # the kill came while it was being written
    train.run(replace(recipe, resume="latest"))
    assert len(lines(out)) == 4
    assert len((out / "model.safetensors").read_bytes()) == len(whole)


def test_longer_steps_on_resuming(shapes: Path, tmp_path: Path) -> None:
    recipe = tiny("mae_tiny", tmp_path / "run", shapes, steps=3, checkpoint_every=1, keep_checkpoints=1)
    train.run(recipe)
    out = train.run(replace(recipe, resume="latest", steps=5))
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5]
    assert [path.name for path in checkpoint.complete(out)] == ["step-5"]
    assert json.loads((out / "recipe.json").read_text())["steps"] == 5


def test_going_back_needs_consent(shapes: Path, tmp_path: Path) -> None:
    recipe = tiny("mae_tiny", tmp_path / "run", shapes, steps=4, checkpoint_every=2)
    out = train.run(recipe)
    back = replace(recipe, resume=str(out / "checkpoints" / "step-2"))
    with pytest.raises(train.TrainError, match=r"later checkpoints up to step-4: add overwrite=true"):
        train.run(back)
    assert len(lines(out)) == 4
    before = [line["loss"] for line in lines(out)]
    train.run(replace(back, overwrite=True))
    assert [line["loss"] for line in lines(out)] == before


def test_an_earlier_run_is_not_lost_by_accident(shapes: Path, tmp_path: Path) -> None:
    recipe = tiny("mae_tiny", tmp_path / "run", shapes, steps=2, checkpoint_every=2)
    train.run(recipe)
    with pytest.raises(train.TrainError, match=r"holds an earlier run: .*resume=latest.*overwrite=true"):
        train.run(recipe)
    train.run(replace(recipe, overwrite=True, steps=1, checkpoint_every=0))
    assert len(lines(tmp_path / "run")) == 1
    assert not checkpoint.complete(tmp_path / "run")


def test_metrics_are_cut_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "".join(f'{{"step": {step}, "seconds": {step * 2}}}\n' for step in range(1, 6))
    path.write_text(text + '{"step": 6, "lo')
    assert metrics.keep_lines(path, 5) == 10
    assert path.read_text() == text
    path.write_text(text[:-1])  # the last line lacks its end, and the next would be written behind it
    assert metrics.keep_lines(path, 5) == 8
    assert metrics.keep_lines(path, 2) == 4
    assert len(path.read_text().splitlines()) == 2
    assert metrics.keep_lines(path, 0) == 0
    assert path.read_text() == ""


# Damage


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self.target), "w"))


@pytest.fixture
def saved(shapes: Path, tmp_path: Path) -> Recipe:
    recipe = tiny("mae_tiny", tmp_path / "run", shapes, steps=1, checkpoint_every=1)
    train.run(recipe)
    return replace(recipe, steps=2, resume="latest")


def test_damaged_checkpoints(saved: Recipe) -> None:
    folder = checkpoint.complete(Path(saved.out))[-1]
    shard, state = next(folder.glob("*.safetensors")), folder / "state.json"
    contents = {path: path.read_bytes() for path in (shard, state)}
    headless = b"\xff" * 64 + contents[shard][64:]
    renamed = contents[shard].replace(b"exp_avg_sq", b"exp_avg_xx")
    for path, damage, match in [
        (shard, contents[shard][:-7], "has .* of .* bytes"),
        (shard, None, "is missing"),
        (shard, headless, "header cannot be read"),
        (shard, renamed, "does not fit the recipe: optimizer"),
        (state, contents[state][: len(contents[state]) // 2], r"state\.json cannot be read"),
        (state, b"[]", r"state\.json cannot be read"),
        (state, contents[state].replace(b'"format": 1', b'"format": 9'), "format 9"),
    ]:
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(train.TrainError, match=match) as caught:
            train.run(saved)
        assert "\n" not in str(caught.value)
        assert folder.name in str(caught.value)
        path.write_bytes(contents[path])
    (folder / ".metadata").write_bytes(pickle.dumps(_Bomb(folder / "exploded")))
    train.run(saved)
    assert not (folder / "exploded").exists()


def test_resuming_what_is_not_there(saved: Recipe, tmp_path: Path) -> None:
    with pytest.raises(train.TrainError, match="holds no run"):
        train.run(replace(saved, out=str(tmp_path / "other")))
    with pytest.raises(train.TrainError, match="where there is no checkpoint"):
        train.run(replace(saved, resume=str(tmp_path / "other")))
    with pytest.raises(train.TrainError, match="of task mae and tags_tiny of task tags"):
        train.run(replace(saved, name="tags_tiny", task="tags"))
    with pytest.raises(train.TrainError, match=r"does not fit the recipe: model\..*shape"):
        train.run(replace(saved, decoder_width=16))
    with pytest.raises(train.TrainError, match="belongs to a run of mae_tiny and not of clip_tiny"):
        train.recipe_for("clip_tiny", [f"out={saved.out}", "resume=latest"])


def test_out_that_cannot_be_written(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(train.TrainError, match=r"out is .*file/run, which cannot be written: Not a directory"):
        train.run(tiny("mae_tiny", tmp_path / "file" / "run", shapes))


def test_full_disk(shapes: Path, tmp_path: Path) -> None:
    recipe = tiny("mae_tiny", tmp_path / "run", shapes, steps=4, checkpoint_every=2)
    with small_files(50_000), pytest.raises(train.TrainError) as caught:
        train.run(recipe)
    assert str(caught.value).startswith("the checkpoint of step 2 cannot be written to")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    train.run(replace(recipe, resume="latest"))
    blocked = replace(recipe, out=str(tmp_path / "blocked"))
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "checkpoints").write_text("a file where a folder is needed")
    with pytest.raises(train.TrainError, match="checkpoint of step 2 cannot be written"):
        train.run(blocked)
    with metrics.Metrics(tmp_path / "run", recipe, 4) as writer:
        size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
        with small_files(size), pytest.raises(train.TrainError, match=r"metrics\.jsonl cannot be written"):
            writer.write(5, {"loss": 1.0})


# Steps that must not count


def poisoned(at: set[int]) -> Callable[..., Iterator[data.Batch]]:
    """A loader whose batches of the steps `at`, counted from 1, hold pixels that are not numbers."""

    def load(*arguments: Any, **keywords: Any) -> Iterator[data.Batch]:
        for step, batch in enumerate(real_loader(*arguments, **keywords), start=1):
            if step in at:
                batch.pixels[0, 0, 0, 0] = math.nan
            yield batch

    return load


def test_a_bad_step_changes_nothing(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("mae_tiny", tmp_path / "a", shapes, steps=3, learning_rate=1e-3, warmup_steps=0)
    monkeypatch.setattr(data, "loader", poisoned({2, 3}))
    a = train.run(recipe)
    assert [line["skipped"] for line in lines(a)] == [False, True, True]
    assert lines(a)[1]["loss"] is None
    monkeypatch.setattr(data, "loader", poisoned({3}))
    b = train.run(replace(recipe, out=str(tmp_path / "b")))
    assert not same_weights(a, b)
    weights = load_file(a / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_many_bad_steps_end_the_run(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "loader", poisoned({2, 4, 5, 6, 7}))
    recipe = tiny("mae_tiny", tmp_path / "run", shapes, steps=9, max_bad_steps=3)
    with pytest.raises(train.TrainError, match="not finite for 3 steps in a row, up to step 6"):
        train.run(recipe)


# Many processes


def test_two_processes_compute_what_one_does(shapes: Path, tmp_path: Path) -> None:
    settings = [f"data={shapes}", "data_size=240", "steps=4", "batch_size=16", "checkpoint_every=3", "seed=3"]
    settings += ["progress=false", "tensorboard=false", "keep_rate_warmup=0"]
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "xray")
    process = start(["train", "clip_tiny", f"out={tmp_path / 'two'}", *settings], tmp_path, launcher)
    one = train.run(train.recipe_for("clip_tiny", [f"out={tmp_path / 'one'}", *settings]))
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert printed.strip() == str(tmp_path / "two" / "model.safetensors")
    first_losses = [line["loss"] for line in lines(one)]
    assert [line["loss"] for line in lines(tmp_path / "two")] == pytest.approx(first_losses, abs=1e-4)
    for key in ("grad_norm", "logit_scale"):
        first = [line[key] for line in lines(one)]
        assert [line[key] for line in lines(tmp_path / "two")] == pytest.approx(first, rel=1e-4)
    # A gradient that is zero but for rounding, such as that of the bias of keys, moves AdamW as far as any other;
    # so weights can only be compared to within the sum of the learning rates.
    moved = sum(line["lr"] for line in lines(one))
    first_weights = load_file(one / "model.safetensors")
    for name, tensor in load_file(tmp_path / "two" / "model.safetensors").items():
        torch.testing.assert_close(tensor, first_weights[name], rtol=0, atol=moved)
    # What two processes saved, one can go on with.
    folder = tmp_path / "two" / "checkpoints" / "step-3"
    assert len(list(folder.glob("*.safetensors"))) == 2
    words = [f"out={tmp_path / 'two'}", f"resume={folder}", "overwrite=true"]
    train.run(train.recipe_for("clip_tiny", words))
    assert lines(tmp_path / "two")[-1]["loss"] == pytest.approx(first_losses[-1], abs=1e-4)


def test_torchrun_hands_a_stop_signal_on(shapes: Path, tmp_path: Path) -> None:
    words = f"mae_tiny out={tmp_path / 'run'} data={shapes} steps=100000 checkpoint_every=0 batch_size=16 peak_tflops=1"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "xray.train")
    process = start([*words.split(), "progress=false", "tensorboard=false"], tmp_path, launcher)
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    done = len(lines(tmp_path / "run"))
    assert [path.name for path in checkpoint.complete(tmp_path / "run")] == [f"step-{done}"]
    assert f"stopped after step {done} of 100000, the state is saved" in errors
    assert "torchrun --nproc-per-node=2 -m xray.train mae_tiny out=" in errors


# Compilation is too slow to test here; recomputation must change nothing.


def test_activation_checkpointing_changes_nothing(shapes: Path, tmp_path: Path) -> None:
    recipe = tiny("tags_tiny", tmp_path / "a", shapes, steps=2, keep_rate_warmup=0, clip_fraction=1.0)
    a = train.run(recipe)
    b = train.run(replace(recipe, out=str(tmp_path / "b"), activation_checkpointing="full"))
    assert same_weights(a, b)


# Data and models that do not fit


def test_rare_tags_are_left_out(shapes: Path, tmp_path: Path) -> None:
    dataset = data.Dataset(shapes, "train")
    recipe = tiny("tags_tiny", tmp_path, shapes, min_tag_count=20)
    texts = [*zip(dataset.column("caption"), dataset.column("tags"), strict=True)]
    kept = json.loads(tasks.learn(recipe, texts)["tags"])
    counts = [sum(tag in tags for tags in dataset.column("tags")) for tag in kept]
    assert counts == sorted(counts, reverse=True)
    assert min(counts) >= 20
    with pytest.raises(train.TrainError, match=r"no tag of .* min_tag_count = 9999"):
        tasks.learn(replace(recipe, min_tag_count=9999), texts)


def test_models_that_do_not_exist(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(train.TrainError, match=r"model is 'tinny'.*did you mean tiny"):
        train.run(tiny("mae_tiny", tmp_path / "a", shapes, model="tinny"))
    with pytest.raises(train.TrainError, match="image_size is 30 and must be a multiple of 8"):
        train.run(tiny("mae_tiny", tmp_path / "b", shapes, image_size=30))
    with pytest.raises(data.DataError, match="nowhere"):
        train.run(tiny("mae_tiny", tmp_path / "c", tmp_path / "nowhere"))
