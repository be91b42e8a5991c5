"""The training loop, the same for one process and for many."""

import hashlib
import math
import os
import random
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from xray import data
from xray.train import checkpoint, distributed, export, prepare, schedule, tasks
from xray.train.checkpointer import Checkpointer
from xray.train.distributed import World
from xray.train.errors import Stopped, TrainError
from xray.train.metrics import Metrics
from xray.train.overrides import validate
from xray.train.recipes import Recipe


def run(recipe: Recipe) -> Path:
    """See `xray.train.run`."""
    validate(recipe)
    with distributed.world() as place:
        if recipe.batch_size % place.size:
            raise TrainError(f"batch_size is {recipe.batch_size} and must be a multiple of the {place.size} processes")
        return _Run(recipe, place).train()


class _Run:
    """One run: `__init__` builds everything, `train` does the steps."""

    def __init__(self, recipe: Recipe, place: World) -> None:
        self.place = place
        self.out = Path(recipe.out or f"runs/{recipe.name}")
        self.recipe = recipe = prepare.after_restart(self.out, replace(recipe, out=str(self.out)), place)
        resumed = checkpoint.find(self.out, recipe.resume, say=place.is_first) if recipe.resume else None
        state = checkpoint.read_state(resumed) if resumed is not None else None
        if resumed is not None and state is not None:
            checkpoint.check_recipe(resumed, state, recipe)
        init = prepare.model_file(recipe.init) if recipe.init and state is None else None
        self.start = 0 if state is None else state.step
        place.first_does(lambda: prepare.open_folder(self.out, recipe, self.start, resumed))

        self.datasets = prepare.open_data(recipe, self.out, place)
        if state is not None:
            self.artifacts = state.artifacts
        else:
            self.artifacts = place.share(prepare.learned(recipe, self.datasets, init) if place.is_first else None)
        torch.manual_seed(recipe.seed)
        random.seed(recipe.seed)
        self.task = tasks.build(recipe, self.artifacts)
        self.parameters = sum(parameter.numel() for parameter in self.task.parameters())
        self.origin = f"resumed from {resumed}" if resumed is not None else ""
        if init is not None:
            self.origin = f"{prepare.start_from(self.task.model, init)} starts from {init}"
        self.task.to(place.device)
        self.dtype = prepare.compute_dtype(recipe, place.device)
        prepare.accelerate(self.task, recipe)
        if place.size > 1:
            distributed.shard(self.task, place, self.dtype)
        self.optimizer = schedule.optimizer(recipe, self.task)
        if resumed is not None:
            checkpoint.restore(resumed, self.task, self.optimizer, place)

    def train(self) -> Path:
        """Do the remaining steps, save the model, and return the run's folder."""
        recipe, place = self.recipe, self.place
        if place.is_first and recipe.progress:
            print(self._describe(), file=sys.stderr)
        batches = data.loader(
            self.datasets,
            batch_size=recipe.batch_size // place.size,
            transform=data.transforms.train(recipe.image_size, recipe.num_frames),
            seed=recipe.seed,
            start_step=self.start,
            num_workers=recipe.num_workers,
            rank=place.rank,
            world_size=place.size,
            clip_fraction=recipe.clip_fraction,
        )
        with (
            Metrics(self.out, recipe, self.start) if place.is_first else nullcontext() as metrics,
            _stop_request(say=place.is_first) as request,
            Checkpointer(self.out, recipe, self.artifacts, place) as checkpointer,
        ):
            self._steps(batches, metrics, request, checkpointer)
            checkpointer.wait()
        export.final_model(self.task, recipe, self.artifacts, place, self.out / "model.safetensors")
        return self.out

    def _steps(
        self, batches: Iterator[data.Batch], metrics: Metrics | None, request: list[int], checkpointer: Checkpointer
    ) -> None:
        recipe = self.recipe
        began = time.perf_counter() - (metrics.seconds if metrics else 0.0)
        bad_in_a_row = 0
        for done in range(self.start + 1, recipe.steps + 1):
            asked = time.perf_counter()
            batch = next(batches)
            received = time.perf_counter()
            values, stop = self._step(done - 1, batch, bool(request))
            now = time.perf_counter()
            values |= {
                "images_per_s": recipe.batch_size / (now - asked),
                "data_wait": (received - asked) / (now - asked),
                "seconds": now - began,
            }
            if metrics is not None:
                metrics.write(done, values)
            bad_in_a_row = bad_in_a_row + 1 if values["skipped"] else 0
            if bad_in_a_row >= recipe.max_bad_steps:
                raise TrainError(
                    f"loss or gradient was not finite for {bad_in_a_row} steps in a row, up to step {done}: "
                    f"lower learning_rate (now {recipe.learning_rate:g}), lengthen warmup_steps (now "
                    f"{recipe.warmup_steps}) or look at the data"
                )
            stop = stop and done < recipe.steps
            periodic = recipe.checkpoint_every and (done % recipe.checkpoint_every == 0 or done == recipe.steps)
            if periodic or stop:
                checkpointer.save(done, self.task, self.optimizer, loader_state={}, counts={})
            checkpointer.check()
            if stop:
                checkpointer.wait()
                raise Stopped(
                    f"stopped after step {done} of {recipe.steps}, the state is saved; go on with: "
                    f"{self._resume_command()}",
                    request[0] if request else signal.SIGTERM,
                )

    def _step(self, step: int, batch: data.Batch, stop: bool) -> tuple[dict[str, Any], bool]:
        """One optimizer step, counted from 0: its numbers, and whether any process was asked to stop."""
        recipe, place = self.recipe, self.place
        rate = None if recipe.task == "mae" else schedule.keep_rate(recipe, step)
        inputs = {
            name: value.to(place.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in self.task.inputs(batch, _seed(recipe.seed, step, place.rank)).items()
        }
        lr = schedule.learning_rate(recipe, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(place.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss, extra = self.task.accumulate(rate, **inputs)
        norm = torch.nn.utils.clip_grad_norm_(self.task.parameters(), recipe.grad_clip or math.inf)
        flag = torch.tensor(float(stop), device=place.device)
        # One transfer a step, and one all-reduce: every process sees the same numbers and takes the same
        # turn.
        numbers = torch.stack([loss.float(), distributed.whole(norm).float(), flag, *extra.values()])
        loss_value, norm_value, stop_value, *extra_values = place.mean(numbers).tolist()
        skipped = not (math.isfinite(loss_value) and math.isfinite(norm_value))
        if not skipped:
            self.optimizer.step()
            self.task.settle()
        self.optimizer.zero_grad(set_to_none=True)
        values = {
            "loss": loss_value,
            "lr": lr,
            "grad_norm": norm_value,
            "keep_rate": 1.0 if rate is None else rate,
        }
        values |= {"skipped": skipped, **dict(zip(extra, extra_values, strict=True))}
        return values, stop_value > 0

    def _describe(self) -> str:
        recipe, place = self.recipe, self.place
        media = Counter(kind for dataset in self.datasets for kind in dataset.column("media"))
        precision = str(self.dtype).removeprefix("torch.")
        parts = [
            f"{self.parameters / 1e6:.2f} M parameters",
            f"{media['image']} images and {media['clip']} clips",
            f"{recipe.steps} steps of {recipe.batch_size}",
            f"{precision} on {place.device.type}",
        ]
        if place.size > 1:
            parts.append(f"{place.size} processes")
        if self.origin:
            parts.append(self.origin)
        return f"{recipe.name}: {', '.join(parts)}"

    def _resume_command(self) -> str:
        start = f"torchrun --nproc-per-node={self.place.size} -m xray" if self.place.size > 1 else "xray"
        return f"{start} train {self.recipe.name} {shlex.quote(f'out={self.recipe.out}')} resume=latest"


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
