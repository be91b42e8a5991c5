"""Where a run's numbers go: metrics.jsonl with a line a step, trackers, the progress bar and the summary at the end."""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from xray.train import profiler, trackers
from xray.train.errors import Stopped, TrainError
from xray.train.recipes import Recipe

LINE_INTERVAL = 10.0  # seconds between progress lines where there is no terminal for a bar
MEMORY = 0.9  # of the running means that are shown
NOTABLE_WAIT = 0.05  # share of a step's time spent waiting for data, from which on it is shown


def check(recipe: Recipe) -> None:
    """See that `trackers` and `profile` can be followed, before anything is loaded.

    Raises:
        TrainError: a tracker's package is missing, or `profile` names no steps of this run.
    """
    trackers.check(recipe)
    profiler.window(recipe)


class Metrics:
    """Writes the numbers of each step; a context manager, so that files are closed however a run ends.

    A line of `metrics.jsonl` holds, for one step:

    * step, from 1; loss; lr; keep_rate; grad_norm, before clipping;
    * images_per_s: samples of all processes over the step's time, a clip counting as one;
    * tokens_per_s: tokens that enter the encoders' first blocks (see `telemetry.Work`), over the same time;
    * mfu: model FLOPs utilisation as PaLM defines it (Chowdhery et al., arXiv 2204.02311, appendix B): the FLOPs of the
      model's formula, forward and backward and none computed twice, over what all devices could do in the step's time
      at the peak that `environment.json` names;
    * data_wait: share of the step's time that the process which waited longest waited for data;
    * memory and memory_peak: bytes now and at most so far, of the process that uses most: tensors on a GPU, the whole
      process on a CPU;
    * kept_tokens: tokens that each EViT layer kept, none where nothing was dropped;
    * bad_samples: samples that could not be read since this session of the run began, over all processes;
    * skipped: true if the step changed nothing because its loss or gradient was not finite; skipped_total, so far;
    * seconds: of training so far, earlier sessions included; checkpoint_seconds: how long training stood still for
      checkpoints since the last line;
    * the task's own: of "tags" top1, of "clip" logit_scale and, within the batch of all processes, image_to_text_ and
      text_to_image_top1, _top5 and _rank (from 0) and their means top1, top5 and rank.

    A number that is not finite is null. Trackers have the same names.

    Attributes:
        seconds: what earlier sessions of this run have spent.
    """

    def __init__(self, out: Path, recipe: Recipe, start: int) -> None:
        """Open the files in `out`; what an earlier session wrote beyond step `start` is cut off."""
        self._path = out / "metrics.jsonl"
        self._recipe = recipe
        self._checkpoint_seconds = 0.0
        try:
            self.seconds = keep_lines(self._path, start)
            self._totals = _Totals(recipe, _lines(self._path))
            self._file: TextIO = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error
        self._trackers = trackers.open_trackers(recipe, out, start)
        self._progress = _Progress(recipe, start) if recipe.progress else None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.close()
            if kind is None or issubclass(kind, Stopped):
                print(self._totals.text(), file=sys.stderr)
        for tracker in self._trackers:
            tracker.close()
        with suppress(OSError):  # every line was flushed as it was written
            self._file.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the numbers of step `step`, counted from 1.

        Raises:
            TrainError: the disk is full.
        """
        skipped = self._totals.skipped + bool(values.get("skipped"))
        values = {**values, "skipped_total": skipped, "checkpoint_seconds": self._checkpoint_seconds}
        self._checkpoint_seconds = 0.0
        line = {"step": step} | {key: _plain(value) for key, value in values.items()}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self._totals.add(line)
        if self._trackers and (step == 1 or step % self._recipe.log_every == 0):
            numbers = trackers.scalars(values)
            for tracker in self._trackers:
                tracker.log(step, numbers)
        if self._progress is not None:
            self._progress.show(step, values)

    def checkpoint(self, seconds: float, failures: int = 0) -> None:
        """Take note of a checkpoint for which training stood still, and of how many have failed up to now."""
        self._checkpoint_seconds += seconds
        self._totals.saves += 1
        self._totals.failures = failures

    def _unwritable(self, error: OSError) -> TrainError:
        return TrainError(f"{self._path} cannot be written: {error.strerror or error}")


class _Totals:
    """What a whole run comes to, its earlier sessions included; of checkpoints and bad samples, this session."""

    def __init__(self, recipe: Recipe, lines: Iterator[dict[str, Any]]) -> None:
        self._recipe = recipe
        self._steps, self._seconds, self._busy, self._waited = 0, 0.0, 0.0, 0.0
        self._mfu: list[float] = []
        self.skipped = self._bad_samples = 0
        self.saves = self.failures = 0
        for line in lines:
            self.add(line)
        self._bad_samples = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Count a line of metrics.jsonl."""
        self._steps = line["step"]
        self._seconds = line.get("seconds") or self._seconds
        if line.get("images_per_s"):
            took = self._recipe.batch_size / line["images_per_s"]
            self._busy += took
            self._waited += took * (line.get("data_wait") or 0.0)
        if line.get("mfu") is not None:
            self._mfu.append(line["mfu"])
        self.skipped += bool(line.get("skipped"))
        self._bad_samples = line.get("bad_samples", 0)

    def text(self) -> str:
        """Three lines for the end of a run."""
        from tqdm import tqdm

        samples = self._steps * self._recipe.batch_size
        speed = [f"{samples / self._seconds:,.0f} images/s"] if self._seconds else []
        if self._mfu:
            speed.append(f"median MFU {statistics.median(self._mfu):.1%}")
        if self._busy:
            speed.append(f"{self._waited / self._busy:.0%} of the time waiting for data")
        events = [
            _count(self.skipped, "skipped step"),
            _count(self._bad_samples, "unreadable sample"),
            f"{_count(self.saves - self.failures, 'checkpoint')} written",
        ]
        if self.failures:
            events.append(f"{self.failures} failed")
        name, steps = self._recipe.name, _count(self._steps, "step")
        return "\n  ".join(
            [
                f"{name}: {steps}, {_count(samples, 'sample')} in {tqdm.format_interval(self._seconds)}",
                ", ".join(speed),
                ", ".join(events),
            ]
        )


class _Progress:
    """Loss, accuracy, speed and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, recipe: Recipe, start: int) -> None:
        from tqdm import tqdm

        self._name, self._steps = recipe.name, recipe.steps
        self._means: dict[str, float] = {}
        self._seen = 0
        self._began = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=recipe.steps,
            initial=start,
            desc=recipe.name,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]",
        )

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the state after step `step`."""
        self._seen += 1
        parts = [f"loss {values['loss']:.3f}"]
        if "top1" in values:
            parts.append(f"top-1 {values['top1']:.0%}")
        parts.append(f"{self._mean('images_per_s', values):.0f} images/s")
        if "mfu" in values:
            parts.append(f"MFU {self._mean('mfu', values):.0%}")
        if (wait := self._mean("data_wait", values)) > NOTABLE_WAIT:
            parts.append(f"data wait {wait:.0%}")
        text = ", ".join(parts)
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif step == self._steps or time.monotonic() - self._last_line > LINE_INTERVAL:
            self._last_line = time.monotonic()
            pace = (time.monotonic() - self._began) / self._seen
            left = self._bar.format_interval(pace * (self._steps - step))
            print(f"{self._name} {step}/{self._steps}: {text}, {left} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        self._bar.close()

    def _mean(self, name: str, values: Mapping[str, Any]) -> float:
        """The running mean of a number, this step's included; to be called once a step."""
        self._means[name] = MEMORY * self._means.get(name, 0.0) + (1 - MEMORY) * values.get(name, 0.0)
        return self._means[name] / (1 - MEMORY**self._seen)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of the metrics.jsonl in a run's folder, as `Metrics` describes them.

    A line that a running or killed process has not finished is left out.

    Raises:
        TrainError: there is no such file, or a line is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        return list(_lines(path, missing_ok=False))
    except (OSError, ValueError) as error:
        raise TrainError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def keep_lines(path: Path, last_step: int) -> float:
    """Cut a metrics.jsonl off after `last_step`, in place, and return the seconds that its last line counts.

    A run that was killed has written lines beyond its last checkpoint, and perhaps half a line; those steps
    will run again.
    """
    if not path.exists():
        return 0.0
    end, seconds = 0, 0.0
    with path.open("r+b") as file:
        for raw in file:
            try:
                line = json.loads(raw)
                if not raw.endswith(b"\n") or line["step"] > last_step:
                    break
                seconds = float(line.get("seconds") or 0.0)
            except (ValueError, KeyError, TypeError):
                break
            end += len(raw)
        file.truncate(end)
    return seconds


def _lines(path: Path, missing_ok: bool = True) -> Iterator[dict[str, Any]]:
    if missing_ok and not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for text in file:
            if text.endswith("\n"):
                yield json.loads(text)


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | list):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
