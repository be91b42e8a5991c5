"""Where a run's numbers can be watched: TensorBoard, and wandb and trackio for who has them.

`metrics.jsonl` is the record; a tracker is a view of it. So one that fails is dropped with a warning, and training
goes on.
"""

import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from contextvars import copy_context
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from xray.train.errors import TrainError
from xray.train.recipes import Recipe

PROJECT = "xray"
LAST_UPLOAD = 15.0  # seconds that closing may take: a run asked to stop has 30 until it is killed


class Tracker(Protocol):
    """What takes numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of step `step`, counted from 1."""

    def close(self) -> None:
        """Write what is left."""


def check(recipe: Recipe) -> None:
    """See that the packages that `recipe.trackers` names are there, without importing them.

    Raises:
        TrainError: one is missing; the sentence says how to install it.
    """
    for name in _names(recipe):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a mere folder of that name, such as wandb leaves behind
            raise TrainError(f"trackers has {name}, a package that is not installed: pip install {name}")


def open_trackers(recipe: Recipe, out: Path, start: int) -> list[Tracker]:
    """The trackers that a recipe asks for; a run that goes on from step `start` goes on in the same ones."""
    trackers: list[Tracker] = []
    if recipe.tensorboard and importlib.util.find_spec("tensorboard") is not None:
        trackers.append(_Forgiven("TensorBoard", lambda: _TensorBoard(out / "tensorboard", start)))
    names = _names(recipe)
    if names:
        identity = _identity(out / "trackers.json", start)
        trackers += [_Forgiven(name, partial(HOSTED[name], recipe, out, identity)) for name in names]
    return trackers


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as plain numbers: a list becomes `name/0`, `name/1` and so on."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}/{place}": float(part) for place, part in enumerate(value)}
        else:
            flat[name] = float(value)
    return flat


def _names(recipe: Recipe) -> list[str]:
    return list(dict.fromkeys(filter(None, recipe.trackers.split(","))))


def _identity(path: Path, start: int) -> str:
    """The id under which hosted trackers know this run: the one in `path`, or for a run that begins a new one."""
    if start:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    identity = secrets.token_hex(4)
    with suppress(OSError):  # resuming will then begin a new run there
        path.write_text(json.dumps({"id": identity}) + "\n", encoding="utf-8")
    return identity


class _TensorBoard:
    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # All of them in one event: `add_scalar` takes tens of microseconds for each.
        parts = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.file_writer.add_summary(self._summary(value=parts), step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """wandb; WANDB_MODE and its other variables count. It ignores steps that it has seen, so those that a killed run
    does again are not counted twice.
    """

    def __init__(self, recipe: Recipe, out: Path, identity: str) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=out.name,
            id=identity,
            dir=os.environ.get("WANDB_DIR", str(out)),
            config=asdict(recipe),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """trackio, which has wandb's interface but tells runs apart by their names; its own variables count.

    What it has to say goes to stderr: the standard output of a training run is the path of its model.
    """

    def __init__(self, recipe: Recipe, out: Path, identity: str) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        settings = {"name": f"{out.name}-{identity}", "config": asdict(recipe), "resume": "allow"}
        with redirect_stdout(sys.stderr):
            # In a context of its own, or it would close the run once more when the program ends.
            self._run = copy_context().run(lambda: trackio.init(project, **settings))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


HOSTED: dict[str, Callable[[Recipe, Path, str], Tracker]] = {"wandb": _Wandb, "trackio": _Trackio}


class _Forgiven:
    """Passes numbers on until the tracker fails: that is said once, and training goes on."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        try:
            self._tracker = make()
        except Exception as error:
            self._drop(error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._tracker is not None:
            try:
                self._tracker.log(step, values)
            except Exception as error:
                self._drop(error)

    def close(self) -> None:
        """Close the tracker, waiting no longer than `LAST_UPLOAD` for its network."""
        if self._tracker is None:
            return
        closing = Thread(target=self._close, args=(self._tracker,), daemon=True)
        closing.start()
        closing.join(LAST_UPLOAD)
        if closing.is_alive():
            self._drop(TimeoutError(f"it was not done {LAST_UPLOAD:g} s after the last step"))

    def _close(self, tracker: Tracker) -> None:
        try:
            tracker.close()
        except Exception as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        self._tracker = None
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        print(f"{self._name} is left out from here on, metrics.jsonl has every step: {reason}", file=sys.stderr)
