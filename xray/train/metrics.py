"""Where a run's numbers go: metrics.jsonl with a line a step, TensorBoard, and the progress bar."""

import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from xray.train.errors import TrainError
from xray.train.recipes import Recipe

LINE_INTERVAL = 10.0  # seconds between progress lines where there is no terminal for a bar
MEMORY = 0.9  # of the running mean of the speed that is shown


class Metrics:
    """Writes the numbers of each step; a context manager, so that files are closed however a run ends.

    A line of `metrics.jsonl` has step (from 1), loss, images_per_s, lr, grad_norm, keep_rate, data_wait
    (share of the step's time spent waiting for data), seconds (of training so far, earlier sessions
    included), skipped (true if the step changed nothing because its loss or gradient was not finite) and the
    task's own metrics: of "tags" top1, of "clip" logit_scale and, within the batch of all processes, image_to_text_ and
    text_to_image_top1, _top5 and _rank (from 0) and their means top1, top5 and rank. A number that is not finite is
    null.

    Attributes:
        seconds: what earlier sessions of this run have spent.
    """

    def __init__(self, out: Path, recipe: Recipe, start: int) -> None:
        """Open the files in `out`; what an earlier session wrote beyond step `start` is cut off."""
        self._path = out / "metrics.jsonl"
        self._log_every = recipe.log_every
        try:
            self.seconds = keep_lines(self._path, start)
            self._file: TextIO = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error
        self._board = _tensorboard(out / "tensorboard", start) if recipe.tensorboard else None
        self._progress = _Progress(recipe, start) if recipe.progress else None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._board is not None:
            self._board.close()
        with suppress(OSError):  # every line was flushed as it was written
            self._file.close()

    def write(self, step: int, values: Mapping[str, float | bool]) -> None:
        """Record the numbers of step `step`, counted from 1.

        Raises:
            TrainError: the disk is full.
        """
        line = {"step": step} | {key: _plain(value) for key, value in values.items()}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        if self._board is not None and (step == 1 or step % self._log_every == 0):
            for key, value in values.items():
                self._board.add_scalar(key, float(value), step)
        if self._progress is not None:
            self._progress.show(step, values)

    def _unwritable(self, error: OSError) -> TrainError:
        return TrainError(f"{self._path} cannot be written: {error.strerror or error}")


class _Progress:
    """Loss, accuracy, images/s and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, recipe: Recipe, start: int) -> None:
        from tqdm import tqdm

        self._name, self._steps = recipe.name, recipe.steps
        self._speed, self._seen = 0.0, 0
        self._began = self._last_line = time.monotonic()
        self._bar = tqdm(
            total=recipe.steps,
            initial=start,
            desc=recipe.name,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]",
        )

    def show(self, step: int, values: Mapping[str, float | bool]) -> None:
        """Show the state after step `step`."""
        self._speed = MEMORY * self._speed + (1 - MEMORY) * values["images_per_s"]
        self._seen += 1
        speed = self._speed / (1 - MEMORY**self._seen)
        found = f"top-1 {values['top1']:.0%}, " if "top1" in values else ""
        text = f"loss {values['loss']:.3f}, {found}{speed:.0f} images/s"
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


def _plain(value: float | bool) -> float | bool | None:
    if isinstance(value, bool | int):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _tensorboard(folder: Path, start: int) -> Any:
    """A TensorBoard writer, or None where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)
