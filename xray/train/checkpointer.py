"""Writing checkpoints while training goes on: copies in main memory, a thread, and folders published whole."""

import functools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from xray.train import snapshot
from xray.train.checkpoint import FORMAT, State, complete, hush, reason, step_of
from xray.train.distributed import World
from xray.train.errors import TrainError
from xray.train.recipes import Recipe

MOST_FAILURES = 3  # saves that may fail in a row before the run ends


class Checkpointer:
    """Writes the checkpoints of a run, while training goes on if `asynchronous`.

    `save` then only copies the tensors to buffers in (page-locked) main memory, which are made once and used again; a
    thread writes and publishes them, and talks to the other processes over a group of its own, so that nothing of it
    meets the collectives of training. One save is under way at a time: the next waits for it.

    A save that fails leaves earlier checkpoints as they are, and the run goes on: what happened is said on stderr, once
    and by the first process, and raised when `MOST_FAILURES` in a row have failed or the last one before `wait`.

    All processes must make it, call `save` and `wait`, and close it, in the same order. It is a context manager.

    Attributes:
        failures: saves that have failed so far.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        artifacts: dict[str, str],
        place: World,
        asynchronous: bool | None = None,
    ) -> None:
        """Clean up after saves of dead processes in `out`.

        Args:
            out: the run's folder.
            recipe: says which checkpoints are kept, and is saved with them.
            artifacts: as `State`'s.
            place: this process.
            asynchronous: None takes the recipe's word.
        """
        self.out, self.recipe, self.artifacts, self.place = out, recipe, artifacts, place
        self.asynchronous = recipe.async_checkpoints if asynchronous is None else asynchronous
        self.folder = out / "checkpoints"
        self.failures = 0
        self._failed: list[int] = []  # the steps of saves that failed in a row, up to the last one
        self._message = self._unsaid = ""
        self._buffers: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: tuple[int, Future[str]] | None = None
        self._group = dist.new_group(backend="gloo") if place.size > 1 else None
        self._first_does(lambda: _clean(self.folder))

    def save(
        self,
        step: int,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader_state: Mapping[int, bytes],
        counts: Mapping[str, int],
    ) -> float:
        """Write `out/checkpoints/step-N` and delete what the recipe does not keep; the seconds that training waited.

        Args:
            step: steps done.
            task, optimizer: what is trained; both may change as soon as this returns.
            loader_state: position of each reader of this process's loader.
            counts: as `State`'s; the first process's are written.

        Raises:
            TrainError: this save or, if asynchronous, the one before is the last of `MOST_FAILURES` failures; or the
                optimizer keeps what cannot be saved.
        """
        began = time.perf_counter()
        self._settle()
        tensors, layout = snapshot.take(task, optimizer, loader_state, self.place.rank)
        state = State(step, asdict(self.recipe), self.artifacts, dict(counts), layout)
        self._under_way = step, self._thread.submit(self._write, state, tensors, self._copy(tensors))
        if not self.asynchronous:
            self._settle()
        return time.perf_counter() - began

    def check(self) -> None:
        """Say on stderr that the save under way has failed, as soon as that is known; waits for nothing."""
        if self._under_way is not None and self._under_way[1].done():
            self._note(*self._under_way)
        if self._unsaid and self.place.is_first:
            print(f"{self._unsaid}; the run goes on", file=sys.stderr, flush=True)
        self._unsaid = ""

    def wait(self) -> None:
        """Wait until the last save is published: for the end of a run, however it ends.

        Raises:
            TrainError: it has failed.
        """
        self._settle(final=True)

    def close(self) -> None:
        """Let the save under way come to its end, and let go of the thread."""
        self._thread.shutdown(wait=True)
        self.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _settle(self, final: bool = False) -> None:
        """Wait for the save under way and take the turn that its outcome, the same on all processes, asks for."""
        if self._under_way is not None:
            self._note(*self._under_way)
        if len(self._failed) >= (1 if final else MOST_FAILURES):
            self._failed, self._unsaid = [], ""
            raise TrainError(self._message)
        self.check()

    def _note(self, step: int, future: "Future[str]") -> None:
        self._under_way = None
        reason = future.result()
        if not reason:
            self._failed = []
            return
        self.failures += 1
        self._failed.append(step)
        first, *more = self._failed
        ending = f", nor any after it up to step {more[-1]}" if more else ""
        self._message = f"the checkpoint of step {first} cannot be written to {self.folder}{ending}: {reason}"
        self._unsaid = self._message

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's shards in main memory; if asynchronous, in memory that training does not touch."""
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            if not self.asynchronous:
                copies[name] = local.cpu().contiguous()
                continue
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[name] = buffer
            copies[name] = buffer.copy_(local, non_blocking=True)
        if self.asynchronous and self.place.device.type == "cuda":
            torch.cuda.current_stream(self.place.device).synchronize()
        return copies

    def _write(self, state: State, tensors: dict[str, Tensor], copies: dict[str, Tensor]) -> str:
        """Write and publish one checkpoint; why that failed, or nothing. Runs in the thread."""
        draft = self.folder / f".step-{state.step}.tmp"
        try:
            self._first_does(lambda: _clear(draft))
            hush()
            dcp.save(
                tensors,
                storage_writer=_Writer(str(draft), save_distributed=True),
                planner=_Planner(copies),
                process_group=self._group,
                no_dist=self._group is None,
            )
            self._first_does(functools.partial(_publish, draft, state))
            self._first_does(functools.partial(_thin_out, self.out, self.recipe))
        except (OSError, RuntimeError, CheckpointException) as error:
            if self.place.is_first:
                shutil.rmtree(draft, ignore_errors=True)
            return reason(error)
        return ""

    def _first_does(self, action: Callable[[], None]) -> None:
        """As `World.first_does`, over the thread's own group; OSError on all processes if it fails."""
        failure = [""]
        if self.place.is_first:
            try:
                action()
            except OSError as error:
                failure = [reason(error)]
        if self._group is not None:
            dist.broadcast_object_list(failure, src=0, group=self._group)
        if failure[0]:
            raise OSError(failure[0])


class _Planner(dcp.DefaultSavePlanner):
    """Plans by the live tensors, whose shards know their place in the whole, and takes values from their copies."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.copies[index.fqn]


class _Writer(dcp.HuggingFaceStorageWriter):
    """The library's layout, written by safetensors itself straight from the tensors' memory.

    The library serialises a whole shard in memory first, and holds Python's lock while it does: training would stand
    still (0.6 s of 1.1 s for 400 MB), and a copy more would be needed.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "torch.futures.Future[list[WriteResult]]":
        tensors: dict[str, Tensor] = {item.index.fqn: planner.resolve_data(item) for item in plan.items}  # type: ignore[misc]
        places = {item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets} for item in plan.items}  # type: ignore[union-attr]
        if tensors:
            path = Path(self.path) / f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            path.touch()
            mode = path.stat().st_mode  # what the user's umask gives; safetensors makes files private
            try:
                save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(places), "format": "pt"})
            except SafetensorError as error:
                number = re.search(r"os error (\d+)", str(error))
                raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else error from error
            path.chmod(mode)
            _sync(path)
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([WriteResult(item.index, tensors[item.index.fqn].nbytes, None) for item in plan.items])
        return done


def _clean(folder: Path) -> None:
    """Delete what processes that died while saving have left."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _clear(draft: Path) -> None:
    if draft.exists():
        shutil.rmtree(draft)
    draft.mkdir(parents=True)


def _publish(draft: Path, state: State) -> None:
    """Make a written draft the checkpoint of its step."""
    sizes = {file.name: file.stat().st_size for file in draft.iterdir()}
    content = {"format": FORMAT, **asdict(state), "files": sizes}
    (draft / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    _sync(draft / "state.json")
    _sync(draft)
    final = draft.with_name(f"step-{state.step}")
    old = _hide(final) if final.exists() else None
    draft.rename(final)
    _sync(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _thin_out(out: Path, recipe: Recipe) -> None:
    """Delete old checkpoints, but for those at multiples of `recipe.keep_every`."""
    for old in complete(out)[: -recipe.keep_checkpoints]:
        if not (recipe.keep_every and step_of(old) % recipe.keep_every == 0):
            with suppress(OSError):  # the new one is safe, and this one will be tried again
                shutil.rmtree(_hide(old), ignore_errors=True)


def _hide(path: Path) -> Path:
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    return path.rename(hidden)


def _sync(path: Path) -> None:
    """Have the disk remember a file's contents, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
