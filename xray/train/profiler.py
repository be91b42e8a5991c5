"""A window of steps under torch.profiler, by the recipe's `profile=FIRST:LAST`."""

import re
import sys
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from xray.train.errors import TrainError
from xray.train.recipes import Recipe

TABLE_ROWS = 20


def window(recipe: Recipe) -> tuple[int, int] | None:
    """First and last step to trace, counted from 1, or None where the recipe asks for none.

    Raises:
        TrainError: `profile` is not FIRST:LAST, or no such steps will be done.
    """
    if not recipe.profile:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", recipe.profile)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise TrainError(
            f"profile is {recipe.profile!r} and must be FIRST:LAST, the first and the last step to trace, such as 10:12"
        )
    if last > recipe.steps:
        raise TrainError(f"profile is {recipe.profile!r} and must end by step {recipe.steps}, the run's last")
    return first, last


class Profiler:
    """Traces the steps that `recipe.profile` names; a context manager, so that a run that stops inside keeps its trace.

    Each process writes `profile/rank-R.json.gz`, a trace for Perfetto or chrome://tracing, and `profile/rank-R.txt`,
    the operators that took longest by themselves. The profiler is warmed up during the step before the window, where
    there is one, and costs nothing outside these steps. A trace that cannot be written is reported and does not end
    the run.
    """

    def __init__(self, recipe: Recipe, out: Path, rank: int, start: int) -> None:
        """Be ready for steps from `start` + 1 on."""
        self._first, self._last = window(recipe) or (0, 0)
        self._files = out / "profile" / f"rank-{rank}"
        self._done = start
        self._profile: Any = None

    def __enter__(self) -> "Profiler":
        self._before(self._done + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def step(self, done: int) -> None:
        """Tell that step `done`, counted from 1, is over."""
        self._done = done
        if self._profile is not None:
            self._profile.step()
            if done >= self._last:
                self._stop()
        else:
            self._before(done + 1)

    def _before(self, step: int) -> None:
        """Start if step `step`, the next one, is in the window or the last before it."""
        if not self._first - 1 <= step <= self._last:
            return
        from torch.profiler import profile, schedule, supported_activities

        warmup = int(step < self._first)
        active = self._last - step - warmup + 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no step to warm up in
            steps = schedule(wait=0, warmup=warmup, active=active, repeat=1)
        self._profile = profile(
            activities=supported_activities(),
            schedule=steps,
            on_trace_ready=self._write,
            acc_events=True,
        )
        self._profile.start()

    def _stop(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, finished: Any) -> None:
        if self._done < self._first:  # stopped when it had just warmed up
            return
        events = finished.key_averages()
        on_device = any(event.self_device_time_total for event in events)
        order = "self_device_time_total" if on_device else "self_cpu_time_total"
        try:
            self._files.parent.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(f"{self._files}.json.gz")
            self._files.with_suffix(".txt").write_text(events.table(sort_by=order, row_limit=TABLE_ROWS))
        except OSError as error:
            print(f"the trace {self._files}.json.gz cannot be written: {error.strerror or error}", file=sys.stderr)
