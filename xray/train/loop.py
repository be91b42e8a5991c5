"""The training loop, the same for one process and for many."""

import hashlib
import math
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from xray import data
from xray.train import checkpoint, distributed, export, optimizer, prepare, rendezvous, schedule, sources, tasks
from xray.train.checkpointer import Checkpointer
from xray.train.distributed import World
from xray.train.errors import Stopped, TrainError
from xray.train.metrics import Metrics
from xray.train.overrides import validate
from xray.train.profiler import Profiler
from xray.train.recipes import Recipe
from xray.train.telemetry import Own, Telemetry, Work


def run(recipe: Recipe) -> Path:
    """See `xray.train.run`."""
    validate(recipe)
    with distributed.world() as place:
        distributed.check_alike(recipe, place)
        distributed.mesh_shape(recipe.shard_size, place.size)
        if recipe.batch_size % place.size:
            raise TrainError(f"batch_size is {recipe.batch_size} and must be a multiple of the {place.size} processes")
        try:
            return _Run(recipe, place).train()
        except RuntimeError as error:
            if rendezvous.is_lost_peer(error):
                raise TrainError(
                    f"process {place.rank} of {place.size} has lost another, whose own message says why; torchrun "
                    "--max-restarts=N starts all of them again, and they go on from the last checkpoint"
                ) from error
            raise


class _Run:
    """One run: `__init__` builds everything, `train` does the steps."""

    def __init__(self, recipe: Recipe, place: World) -> None:
        self.place = place
        self.out = Path(recipe.out or f"runs/{recipe.name}")
        recipe = prepare.after_restart(self.out, replace(recipe, out=str(self.out)), place)
        resumed: Path | None = None
        if recipe.resume:
            resumed = place.first_does(lambda: checkpoint.find(self.out, recipe.resume))
        state = checkpoint.read_state(resumed) if resumed is not None else None
        if resumed is not None and state is not None:
            checkpoint.check_recipe(resumed, state, recipe)
        init = prepare.model_file(recipe.init) if recipe.init and state is None else None
        self.start = 0 if state is None else state.step
        if state is not None and not recipe.readers:
            recipe = replace(recipe, readers=int(state.recipe.get("readers", 0)))
        self.recipe = recipe = replace(recipe, readers=sources.num_readers(recipe, place.size))
        place.first_does(lambda: prepare.open_folder(self.out, recipe, self.start, resumed))

        self.source = sources.open_source(recipe, self.out, place)
        if state is not None:
            self.artifacts = state.artifacts
        else:
            self.artifacts = place.first_does(lambda: prepare.learned(recipe, self.source.texts(), init))
        torch.manual_seed(recipe.seed)
        random.seed(recipe.seed)
        with torch.device("meta"):
            self.task = tasks.build(recipe, self.artifacts)
        self.parameters = sum(parameter.numel() for parameter in self.task.parameters())
        self.dtype = prepare.compute_dtype(recipe, place.device)
        prepare.accelerate(self.task, recipe)
        if place.size > 1:
            distributed.shard(self.task, place, self.dtype, recipe.shard_size)
        distributed.materialize(self.task, place, recipe.seed)
        self.origin = f"resumed from {resumed}" if resumed is not None else ""
        if init is not None:
            self.origin = f"{prepare.start_from(self.task.model, init)} starts from {init}"
        self.optimizer = optimizer.build(recipe, self.task)
        self.position: dict[int, bytes] = {}
        self.counts = {"skipped": 0, "skipped_in_a_row": 0}
        if resumed is not None:
            restored = checkpoint.restore(resumed, self.task, self.optimizer, place)
            self.position = restored.loader_state
            self.counts |= restored.counts
        self.telemetry = Telemetry(recipe, self.task.model.config, place, self.dtype)
        place.first_does(lambda: self.telemetry.write_environment(self.out, recipe, self.start, self.parameters))

    def train(self) -> Path:
        """Do the remaining steps, save the model, and return the run's folder."""
        recipe, place = self.recipe, self.place
        if place.is_first and recipe.progress:
            print(self._describe(), file=sys.stderr)
        batches = self.source.batches(self.start, self.position)
        with (
            Metrics(self.out, recipe, self.start) if place.is_first else nullcontext() as metrics,
            Profiler(recipe, self.out, place.rank, self.start) as profiler,
            _stop_request(say=place.is_first) as request,
            Checkpointer(self.out, recipe, self.artifacts, place) as checkpointer,
        ):
            began = time.perf_counter() - (metrics.seconds if metrics else 0.0)
            for done in range(self.start + 1, recipe.steps + 1):
                values, stop = self._timed_step(done, batches, request)
                if metrics is not None:
                    metrics.write(done, values | {"seconds": time.perf_counter() - began})
                self._check_skipped(done)
                profiler.step(done)
                stop = stop and done < recipe.steps
                if stop or (recipe.checkpoint_every and (done % recipe.checkpoint_every == 0 or done == recipe.steps)):
                    blocked = checkpointer.save(done, self.task, self.optimizer, self.position, self.counts)
                    if metrics is not None:
                        metrics.checkpoint(blocked, checkpointer.failures)
                checkpointer.check()
                if stop:
                    checkpointer.wait()
                    raise self._stopped(done, request)
            checkpointer.wait()
        export.final_model(self.task, recipe, self.artifacts, place, self.out / "model.safetensors")
        return self.out

    def _timed_step(self, done: int, batches: Iterator[data.Batch], request: list[int]) -> tuple[dict[str, Any], bool]:
        """The step that makes it `done` steps: its numbers, and whether any process was asked to stop."""
        asked = time.perf_counter()
        batch = next(batches)
        received = time.perf_counter()
        values, work, all_own = self._step(done - 1, batch, bool(request), received - asked)
        self.position = batch.state
        return values | self.telemetry.values(work, time.perf_counter() - asked, all_own), all_own.stop > 0

    def _step(self, step: int, batch: data.Batch, stop: bool, wait: float) -> tuple[dict[str, Any], Work, Own]:
        """One optimizer step, counted from 0: its numbers, what it asked for, and what processes tell each other.

        Args:
            step: its number.
            batch: its data.
            stop: whether this process was asked to stop.
            wait: seconds that this process waited for the batch.
        """
        recipe, place = self.recipe, self.place
        rate = None if recipe.task == "mae" else schedule.keep_rate(recipe, step)
        drawn = self.task.inputs(batch, _seed(recipe.seed, step), place.rank * len(batch), recipe.batch_size)
        inputs = {
            name: value.to(place.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in drawn.items()
        }
        work = self.telemetry.work(inputs, rate)
        lr = schedule.learning_rate(recipe, step)
        schedule.set_learning_rate(self.optimizer, lr)
        with torch.autocast(place.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss, extra = self.task.accumulate(rate, **inputs)
        norm = torch.nn.utils.clip_grad_norm_(self.task.parameters(), recipe.grad_clip or math.inf)
        # One transfer a step, and one all-reduce: every process sees the same numbers and takes the same
        # turn.
        own = self.telemetry.own(stop, wait, batch).to(place.device, non_blocking=True)
        numbers = torch.stack([loss.float(), distributed.whole(norm).float(), *extra.values()])
        means = place.mean(torch.cat([numbers, own])).cpu()
        loss_value, norm_value, *extra_values = means[: len(numbers)].tolist()
        skipped = not (math.isfinite(loss_value) and math.isfinite(norm_value))
        if not skipped:
            self.optimizer.step()
            self.task.settle()
        self.optimizer.zero_grad()
        self.counts["skipped"] += skipped
        self.counts["skipped_in_a_row"] = self.counts["skipped_in_a_row"] + 1 if skipped else 0
        values = {
            "loss": loss_value,
            "lr": lr,
            "grad_norm": norm_value,
            "keep_rate": 1.0 if rate is None else rate,
        }
        values |= {"skipped": skipped, **dict(zip(extra, extra_values, strict=True))}
        return values, work, self.telemetry.merge(means[len(numbers) :])

    def _check_skipped(self, done: int) -> None:
        in_a_row = self.counts["skipped_in_a_row"]
        if in_a_row >= self.recipe.max_bad_steps:
            raise TrainError(
                f"loss or gradient was not finite for {in_a_row} steps in a row, up to step {done}: "
                f"lower learning_rate (now {self.recipe.learning_rate:g}), lengthen warmup_steps (now "
                f"{self.recipe.warmup_steps}) or look at the data"
            )

    def _describe(self) -> str:
        recipe, place = self.recipe, self.place
        precision = str(self.dtype).removeprefix("torch.")
        parts = [
            f"{self.parameters / 1e6:.2f} M parameters",
            str(self.source),
            f"{recipe.steps} steps of {recipe.batch_size}",
            f"{precision} on {place.device.type}",
        ]
        if place.size > 1:
            parts.append(f"{place.size} processes")
        if self.origin:
            parts.append(self.origin)
        return f"{recipe.name}: {', '.join(parts)}"

    def _stopped(self, done: int, request: list[int]) -> Stopped:
        start = f"torchrun --nproc-per-node={self.place.size} -m xray.train" if self.place.size > 1 else "xray train"
        command = f"{start} {self.recipe.name} {shlex.quote(f'out={self.recipe.out}')} resume=latest"
        return Stopped(
            f"stopped after step {done} of {self.recipe.steps}, the state is saved; go on with: {command}",
            request[0] if request else signal.SIGTERM,
        )


def _seed(*numbers: int) -> int:
    """One seed from several numbers, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


@contextmanager
def _stop_request(say: bool) -> Iterator[list[int]]:
    """Turn the first SIGINT or SIGTERM into an entry of the list it yields; a second one acts as usual."""
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)

    owner = os.getpid()

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a loader's worker, which Ctrl-C reaches too: the loader will end it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        received.append(number)
        restore()
        if say:
            print("\nstopping after this step, again to stop at once", file=sys.stderr)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        previous = {number: signal.signal(number, receive) for number in signals}
    except ValueError:  # not the main thread: signals cannot be caught here
        previous = {}
    try:
        yield received
    finally:
        restore()
