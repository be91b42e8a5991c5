"""What a run tells of itself: what a step costs, the lines of metrics.jsonl, trackers, the profiler, the console."""

import gzip
import importlib
import itertools
import json
import math
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from limits import small_files

from xray import data, models, train
from xray.train import profiler, telemetry, trackers
from xray.train.distributed import World
from xray.train.metrics import Metrics
from xray.train.profiler import Profiler
from xray.train.recipes import RECIPES, Recipe
from xray.train.telemetry import Own, Telemetry, Work

CPU = torch.device("cpu")
VISION = models.VisionConfig(image_size=32, patch_size=8, width=32, depth=4, heads=2, num_frames=4)
CLIP = models.ClipConfig(
    vision=VISION, text=models.TextConfig(vocab_size=99, context_length=24, width=32, depth=2, heads=2), embed_dim=16
)
MAE = models.MaeConfig(vision=VISION, decoder_width=16, decoder_depth=1, decoder_heads=2, mask_ratio=0.75)


def quiet(**changes: Any) -> Recipe:
    settings: dict[str, Any] = {"tensorboard": False, "progress": False, "steps": 20, "peak_tflops": 1.0}
    return replace(RECIPES["tags_tiny"](), **{**settings, **changes})


def values(**changes: Any) -> dict[str, Any]:
    """What the loop hands over for a step."""
    common = {"loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "keep_rate": 0.7, "skipped": False, "top1": 0.25}
    speed = {"images_per_s": 64.0, "mfu": 0.3, "data_wait": 0.0, "kept_tokens": [12, 10], "bad_samples": 0}
    return {**common, **speed, "seconds": 1.0, **changes}


def batch(skipped: int = 0) -> data.Batch:
    return data.Batch(torch.zeros(1, 3, 8, 8), ["a"], [[]], [""], ["i"], skipped=[("x", "broken")] * skipped)


# What a step costs


def test_tokens_that_enter_the_first_block() -> None:
    assert telemetry.step_work(VISION, 1.0).tokens == 16 + 1
    assert telemetry.step_work(VISION, 0.5).tokens == 16 + 1, "what EViT drops later has entered too"
    assert telemetry.step_work(CLIP, 1.0, num_frames=4, text_tokens=24).tokens == 64 + 1 + 24
    assert telemetry.step_work(CLIP, 1.0, image_size=16, text_tokens=9).tokens == 4 + 1 + 9
    assert telemetry.step_work(MAE, None).tokens == 4 + 1


def test_flops_are_three_forward_passes_of_the_formula() -> None:
    def forward(**settings: Any) -> int:
        return models.model_cost(CLIP, **settings).flops

    work = telemetry.step_work(CLIP, 0.5, num_frames=2, image_size=16, text_tokens=9)
    assert work.flops == 3 * forward(keep_rate=0.5, num_frames=2, image_size=16, text_tokens=9)
    assert work.kept_tokens == [4, 3, 2]
    assert telemetry.step_work(CLIP, 1.0, text_tokens=24) == Work(3 * forward(keep_rate=1.0), 41, [])
    assert telemetry.step_work(MAE, None).flops == 3 * models.model_cost(MAE).flops


def test_a_step_counts_what_its_inputs_are() -> None:
    place = World(0, 1, CPU)
    meter = Telemetry(quiet(), CLIP, place, torch.float32)
    image, clip = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 4, 32, 32)
    ids = torch.zeros(2, 9, dtype=torch.int64)
    assert meter.work({"pixels": clip, "token_ids": ids}, 0.5) == telemetry.step_work(CLIP, 0.5, 4, 32, 9)
    assert meter.work({"pixels": image, "token_ids": ids}, 0.5) == telemetry.step_work(CLIP, 0.5, 1, 16, 9)
    assert meter.work({"pixels": image, "token_ids": ids}, 1.0).kept_tokens == []
    masked = Telemetry(quiet(), MAE, place, torch.float32)
    assert masked.work({"pixels": torch.zeros(2, 3, 32, 32), "generator": None}, None).tokens == 5


def test_rates_of_a_step() -> None:
    meter = Telemetry(quiet(batch_size=64, peak_tflops=2e-6), VISION, World(0, 4, CPU), torch.float32)
    own = Own(stop=0, wait=0.1, memory=7e9, memory_peak=8e9, bad_samples=3)
    found = meter.values(Work(flops=1000, tokens=50, kept_tokens=[12]), 0.5, own)
    assert found == {
        "images_per_s": 128.0,
        "tokens_per_s": 6400.0,
        "mfu": pytest.approx(128 * 1000 / (2e6 * 4)),
        "data_wait": pytest.approx(0.2),
        "memory": 7_000_000_000,
        "memory_peak": 8_000_000_000,
        "bad_samples": 3,
        "kept_tokens": [12],
    }
    assert meter.values(Work(1, 1, []), 0.5, own._replace(wait=0.6))["data_wait"] == 1.0


def test_numbers_of_all_processes_come_out_of_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    memories = iter([(5e9, 6e9), (7e9, 7e9), (1e9, 9e9)])
    monkeypatch.setattr(telemetry, "memory", lambda device: next(memories))
    seen: list[int] = []
    monkeypatch.setattr(data, "skipped", lambda: dict.fromkeys(range(seen[-1])))
    tables, meters = [], []
    for rank, (stop, wait, bad) in enumerate([(False, 0.1, 2), (True, 0.3, 0), (False, 0.2, 5)]):
        meters.append(Telemetry(quiet(), VISION, World(rank, 3, CPU), torch.float32))
        seen.append(bad)
        tables.append(meters[-1].own(stop, wait, batch(skipped=bad)))
    merged = meters[0].merge(sum(tables[1:], tables[0]) / 3)
    assert merged == pytest.approx(Own(stop=1, wait=0.3, memory=7e9, memory_peak=9e9, bad_samples=7))
    assert isinstance(merged.bad_samples, int)
    # Samples stay counted when a later batch is whole; the memory is read once a second, not once a step.
    assert meters[0].own(False, 0.0, batch()).tolist()[:5] == pytest.approx([0, 0, 5e9, 6e9, 2])


def test_memory() -> None:
    before, _ = telemetry.memory(CPU)
    block = torch.ones(2**25)  # 128 MiB
    during, most = telemetry.memory(CPU)
    assert during - before > 100 * 2**20
    assert most >= during
    del block
    after, most = telemetry.memory(CPU)
    assert during - after > 100 * 2**20
    assert most > during - 2**20  # Linux counts pages for each core, and adds them up now and then


def test_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    _, most = telemetry.memory(CPU)
    monkeypatch.setattr(telemetry, "Path", lambda name: Path("/nowhere"))
    now, peak = telemetry.memory(CPU)
    assert now == peak
    assert most * 0.5 < peak < most * 10  # bytes, not kilobytes


class Clock(ModuleType):
    """A `time` whose every reading is later by the next of `ticks`."""

    def __init__(self, ticks: Iterator[float]) -> None:
        super().__init__("time")
        self.now, self.ticks = 0.0, ticks

    def perf_counter(self) -> float:
        self.now += next(self.ticks)
        return self.now


def test_the_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    # One reading when it begins; then of each product one before, one after, and one that asks whether to go on.
    products = itertools.cycle([0.01, 0.08, 0.01, 0.01, 0.05, 0.01, 0.01, 0.06, 0.01])
    monkeypatch.setattr(telemetry, "time", Clock(itertools.chain([1.0], products)))
    state = torch.get_rng_state()
    peak = telemetry.measure_peak(torch.float32, CPU)
    assert peak == pytest.approx(2 * telemetry.CPU_PRODUCT**3 / 0.05)
    assert torch.equal(torch.get_rng_state(), state), "a run's random numbers do not depend on it"


def test_the_first_process_measures_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(World):
        def share(self, value: Any) -> Any:
            assert value is None
            return 5e12

    measured: list[torch.dtype] = []

    def measure(dtype: torch.dtype, device: torch.device) -> float:
        measured.append(dtype)
        return 3e12

    monkeypatch.setattr(telemetry, "measure_peak", measure)
    assert Telemetry(quiet(peak_tflops=0.0), VISION, Told(1, 2, CPU), torch.bfloat16).peak == 5e12
    assert measured == []
    first = Telemetry(quiet(peak_tflops=0.0), VISION, World(0, 1, CPU), torch.bfloat16)
    assert (first.peak, measured) == (3e12, [torch.bfloat16])
    assert first.peak_source == "measured: matrix products in bfloat16, the first process's"
    given = Telemetry(quiet(peak_tflops=989.0), VISION, World(0, 1, CPU), torch.bfloat16)
    assert (given.peak, given.peak_source, len(measured)) == (989e12, "peak_tflops of the recipe", 1)


# metrics.jsonl


def test_lines_and_totals_go_on_after_a_resume(tmp_path: Path) -> None:
    with Metrics(tmp_path, quiet(), 0) as writer:
        writer.write(1, values(skipped=True, loss=math.nan))
        writer.write(2, values(seconds=2.0))
        writer.checkpoint(0.25)
        writer.write(3, values(skipped=True))
        writer.write(4, values(skipped=True))
    lines = train.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] is None
    assert lines[0]["kept_tokens"] == [12, 10]
    assert [line["skipped_total"] for line in lines] == [1, 1, 2, 3]
    assert [line["checkpoint_seconds"] for line in lines] == [0, 0, 0.25, 0]
    with Metrics(tmp_path, quiet(), 2) as writer:
        assert writer.seconds == 2.0
        writer.write(3, values())
        writer.write(4, values(skipped=True))
    assert [line["skipped_total"] for line in train.read_metrics(tmp_path)] == [1, 1, 1, 2]


def test_reading_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(train.TrainError, match=r"metrics\.jsonl cannot be read: No such file"):
        train.read_metrics(tmp_path)
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert train.read_metrics(tmp_path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(train.TrainError, match=r"metrics\.jsonl cannot be read: "):
        train.read_metrics(tmp_path)


# The console


def test_the_line_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path, quiet(progress=True, steps=3), 0) as writer:
        writer.write(1, values(images_per_s=100.0, mfu=0.2, data_wait=0.04))
        assert capsys.readouterr().err == "", "no terminal: a line now and then"
        writer.write(2, values(images_per_s=100.0, mfu=0.2, data_wait=0.04))
        writer.write(3, values(images_per_s=200.0, mfu=0.5, data_wait=0.04))
        shown = capsys.readouterr().err
    # running means: (0.81 + 0.9 + 2) / 2.71 of 100, (0.81 + 0.9 + 2.5) / 2.71 of 20%
    assert shown == "tags_tiny 3/3: loss 2.000, top-1 25%, 137 images/s, MFU 31%, 00:00 left\n"
    with Metrics(tmp_path, quiet(progress=True, steps=1), 0) as writer:
        line = values(data_wait=0.06)
        del line["mfu"], line["top1"]
        writer.write(1, line)
        shown = capsys.readouterr().err.splitlines()[-1]
    assert shown == "tags_tiny 1/1: loss 2.000, 64 images/s, data wait 6%, 00:00 left"


def test_the_summary_is_that_of_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = quiet(steps=4, batch_size=500, progress=True)
    with Metrics(tmp_path, replace(recipe, progress=False), 0) as writer:
        writer.write(1, values(seconds=10, images_per_s=50, data_wait=0.5, mfu=0.1, skipped=True, bad_samples=9))
        writer.write(2, values(seconds=20, images_per_s=50, data_wait=0.5, mfu=0.2))
    assert capsys.readouterr().err == "", "without progress there is none"
    with Metrics(tmp_path, recipe, 2) as writer:
        writer.write(3, values(seconds=30, images_per_s=50, data_wait=0.1, mfu=0.4, skipped=True, bad_samples=1))
        writer.checkpoint(1.0)
        writer.checkpoint(1.0, failures=1)
        writer.checkpoint(1.0, failures=1)
        writer.write(4, values(seconds=80, images_per_s=50, data_wait=0.1, mfu=0.9, bad_samples=1))
        capsys.readouterr()
    assert capsys.readouterr().err == (
        "tags_tiny: 4 steps, 2,000 samples in 01:20\n"
        "  25 images/s, median MFU 30.0%, 30% of the time waiting for data\n"
        "  2 skipped steps, 1 unreadable sample, 2 checkpoints written, 1 failed\n"
    )


def test_the_summary_comes_when_a_run_is_stopped_but_not_when_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, said in ((train.Stopped("stopped", 15), True), (train.TrainError("no"), False)):
        writer = Metrics(tmp_path, quiet(progress=True), 0)
        writer.write(1, values())
        writer.__exit__(type(error), error, None)
        assert ("1 step, 32 samples" in capsys.readouterr().err) is said


# Trackers


class Service:
    """Stands in for the packages wandb and trackio, and records what it is called with."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failing: dict[str, Callable[[], None]] = {}
        source = (
            "service = None\n"
            "def init(*arguments, **settings):\n"
            "    service.call(f'{__name__} init', {**settings, 'positional': arguments})\n"
            "    print('welcome')\n"
            "    return Run()\n"
            "class Run:\n"
            "    def log(self, values, step):\n"
            "        service.call(f'{__name__} log', {'step': step, **values})\n"
            "    def finish(self):\n"
            "        service.call(f'{__name__} finish', {})\n"
        )
        monkeypatch.syspath_prepend(folder)
        for name in ("wandb", "trackio"):
            (folder / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)
            module: Any = importlib.import_module(name)
            module.service = self
            monkeypatch.setitem(sys.modules, name, module)  # and away with it after the test
        for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT", "WANDB_DIR"):
            monkeypatch.delenv(variable, raising=False)

    def call(self, name: str, settings: dict[str, Any]) -> None:
        self.calls.append((name, settings))
        self.failing.get(name, lambda: None)()

    def of(self, name: str) -> list[dict[str, Any]]:
        return [settings for called, settings in self.calls if called == name]


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    (tmp_path / "packages").mkdir()
    return Service(tmp_path / "packages", monkeypatch)


def test_trackers_get_the_numbers_of_the_file(tmp_path: Path, service: Service) -> None:
    recipe = quiet(trackers="wandb,trackio", log_every=3)
    train.validate(recipe)
    with Metrics(tmp_path, recipe, 0) as writer:
        for step in range(1, 7):
            writer.write(step, values(loss=float(step)))
    lines = {line["step"]: line for line in train.read_metrics(tmp_path)}
    for name in ("wandb", "trackio"):
        logged = service.of(f"{name} log")
        assert [record["step"] for record in logged] == [1, 3, 6]
        for record in logged:
            line = dict(lines[record["step"]])
            kept = line.pop("kept_tokens")
            assert record == {**line, "kept_tokens/0": kept[0], "kept_tokens/1": kept[1]}
        assert len(service.of(f"{name} finish")) == 1
    assert service.of("wandb init")[0]["config"]["batch_size"] == recipe.batch_size


def test_a_resumed_run_goes_on_in_the_same_tracker_run(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = quiet(trackers="wandb,trackio")
    for start in (0, 5, 0):
        Metrics(tmp_path / "", recipe, start).__exit__(None, None, None)
    first, resumed, anew = service.of("wandb init")
    assert first["id"] == resumed["id"] != anew["id"]
    assert {call["resume"] for call in service.of("wandb init") + service.of("trackio init")} == {"allow"}
    assert (first["project"], first["name"], first["dir"]) == ("xray", tmp_path.name, str(tmp_path))
    names = [call["name"] for call in service.of("trackio init")]
    assert names[0] == names[1] == f"{tmp_path.name}-{first['id']}"
    assert names[2] == f"{tmp_path.name}-{anew['id']}"
    captured = capsys.readouterr()
    assert captured.out.count("welcome") == 3, "wandb's own, which it prints to stderr anyway"
    assert captured.err.count("welcome") == 3
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("TRACKIO_PROJECT", "ours")
    Metrics(tmp_path, recipe, 5).__exit__(None, None, None)
    assert service.of("wandb init")[-1]["project"] == "mine"
    assert service.of("trackio init")[-1]["positional"] == ("ours",)


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_left_out(
    tmp_path: Path, service: Service, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ConnectionError("no route to host\nand more")

    service.failing[f"wandb {moment}"] = fail
    with Metrics(tmp_path, quiet(trackers="wandb,trackio", log_every=1), 0) as writer:
        for step in range(1, 4):
            writer.write(step, values())
    assert len(train.read_metrics(tmp_path)) == 3
    assert len(service.of("trackio log")) == 3
    assert len(service.of("trackio finish")) == 1
    assert len(service.of("wandb log")) == {"init": 0, "log": 1, "finish": 3}[moment]
    errors = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert errors == ["wandb is left out from here on, metrics.jsonl has every step: no route to host"]


def test_a_tracker_that_hangs_does_not_keep_a_run_from_ending(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release = threading.Event()

    def hang() -> None:
        release.wait(60)

    service.failing["wandb finish"] = hang
    monkeypatch.setattr(trackers, "LAST_UPLOAD", 0.05)
    with Metrics(tmp_path, quiet(trackers="wandb"), 0) as writer:
        writer.write(1, values())
    assert "wandb is left out from here on" in capsys.readouterr().err
    release.set()


def test_a_tracker_whose_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "wandb").mkdir()  # what wandb writes to is no package
    with pytest.raises(train.TrainError, match=r"trackers has wandb, .* not installed: pip install wandb$"):
        train.validate(quiet(trackers="wandb"))
    with pytest.raises(train.TrainError, match="pip install trackio"):
        train.validate(quiet(trackers="trackio"))


def test_tensorboard_has_what_the_file_has(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = quiet(tensorboard=True, log_every=1)
    with Metrics(tmp_path, recipe, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, values(loss=float(step), skipped=step == 2))
    with Metrics(tmp_path, recipe, 2) as writer:
        writer.write(3, values(loss=9.0, kept_tokens=[12]))
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert (
        set(found.Tags()["scalars"])
        == trackers.scalars({**values(), "skipped_total": 0, "checkpoint_seconds": 0}).keys()
    )
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert [event.value for event in found.Scalars("skipped")] == [0, 1, 0]
    assert [event.step for event in found.Scalars("kept_tokens/1")] == [1, 2]


# The profiler


@pytest.mark.parametrize("text", ["5", "5:", "a:b", "0:3", "4:3", "-1:3", "1:2:3", "1-3"])
def test_windows_that_are_none(text: str) -> None:
    with pytest.raises(train.TrainError, match=rf"profile is '{text}' and must be FIRST:LAST, .* such as 10:12"):
        train.validate(quiet(profile=text))


def test_a_window_beyond_the_run() -> None:
    with pytest.raises(train.TrainError, match="profile is '18:21' and must end by step 20, the run's last"):
        train.validate(quiet(profile="18:21"))
    train.validate(quiet(profile="20:20"))
    assert profiler.window(quiet(profile="3:7")) == (3, 7)
    assert profiler.window(quiet()) is None


def profiled(out: Path, window: str, start: int, stop: int, rank: int = 0) -> list[int]:
    """Do steps `start` + 1 to `stop`, and return those that the trace has."""
    with Profiler(quiet(profile=window), out, rank, start) as watch:
        for step in range(start + 1, stop + 1):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            watch.step(step)
    trace = out / "profile" / f"rank-{rank}.json.gz"
    if not trace.exists():
        return []
    names = {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    table = (out / "profile" / f"rank-{rank}.txt").read_text()
    assert "aten::mm" in names
    assert "aten::mm" in table
    return sorted(int(name.removeprefix("step ")) for name in names if name.startswith("step "))


def test_the_trace_has_the_steps_of_the_window(tmp_path: Path) -> None:
    assert profiled(tmp_path / "a", "3:4", 0, 6, rank=1) == [3, 4]
    assert profiled(tmp_path / "b", "1:2", 0, 4) == [1, 2]
    assert profiled(tmp_path / "c", "2:5", 3, 8) == [4, 5], "resumed inside of it"
    assert profiled(tmp_path / "d", "3:9", 0, 5) == [3, 4, 5], "stopped inside of it"


def test_there_is_no_trace_of_a_window_that_is_not_reached(tmp_path: Path) -> None:
    assert profiled(tmp_path / "a", "5:6", 0, 4) == [], "stopped while warming up"
    assert profiled(tmp_path / "b", "2:3", 3, 6) == []
    assert profiled(tmp_path / "c", "", 0, 3) == []


def test_a_trace_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("a file where a folder is needed")
    with Profiler(quiet(profile="1:1"), tmp_path, 0, 0) as watch:
        watch.step(1)
    assert "rank-0.json.gz cannot be written: File exists" in capsys.readouterr().err
    with small_files(0), Profiler(quiet(profile="1:1"), tmp_path / "full", 0, 0) as watch:
        watch.step(1)


# A whole run


def test_a_run_tells_all_this(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = quiet(
        out=str(tmp_path / "run"), data_size=60, batch_size=8, keep_rate_warmup=0, checkpoint_every=2, steps=3
    )
    out = train.run(replace(recipe, profile="2:2", peak_tflops=0.0))
    train.run(replace(recipe, steps=5, resume="latest", progress=True))
    lines = train.read_metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    image, clip = (telemetry.step_work(VISION, 0.7, num_frames=frames) for frames in (1, 4))
    for line in lines:
        work = image if line["step"] % 2 else clip
        assert line["kept_tokens"] == work.kept_tokens
        assert line["tokens_per_s"] == pytest.approx(line["images_per_s"] * work.tokens, rel=1e-5)
        assert line["memory_peak"] >= line["memory"] > 10 * 2**20
    assert [line["checkpoint_seconds"] > 0 for line in lines] == [False, False, True, False, True]
    sessions = json.loads((out / "environment.json").read_text())
    assert [(session["from_step"], session["processes"]) for session in sessions] == [(1, 1), (4, 1)]
    assert sessions[0]["versions"]["torch"] == torch.__version__
    assert sessions[0]["recipe"] != sessions[1]["recipe"]
    assert sessions[0]["peak_source"].startswith("measured")
    assert sessions[1]["peak_flops_per_s"] == 1e12
    assert (out / "profile" / "rank-0.json.gz").exists()
    assert "tags_tiny: 5 steps, 40 samples in " in capsys.readouterr().err
