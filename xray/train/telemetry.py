"""What a step asks of the machine and how well that is used: tokens, FLOPs, the peak, memory, and where it ran."""

import hashlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import xray
from xray import data, models
from xray.train.distributed import World
from xray.train.errors import TrainError
from xray.train.recipes import Recipe

PASSES = 3  # a backward pass computes two products for each of the forward pass
GPU_PRODUCT, CPU_PRODUCT = 8192, 1024  # sides of the square matrices whose product stands for the peak
GPU_ROW = 4  # products timed as one
PEAK_SECONDS = 0.2  # spent on measuring, warming up aside
MEMORY_INTERVAL = 1.0  # seconds for which a reading of the memory holds: it takes tens of microseconds
PACKAGES = ("numpy", "triton", "xformers", "flash-attn", "safetensors")


class Work(NamedTuple):
    """What one sample asks for.

    Attributes:
        flops: floating-point operations of forward and backward pass: three times the matrix products of the forward
            pass. What activation checkpointing and chunked contrastive batches compute a second time is not counted.
        tokens: tokens that enter the first block of the image encoder (class token, registers and patches, of MAE those
            that are not hidden) and of the text encoder (`context_length`: padding is computed like the rest).
            What EViT drops later has entered too: it shows in `flops`, not here.
        kept_tokens: tokens that each EViT layer keeps, as in `models.Cost`.
    """

    flops: int
    tokens: int
    kept_tokens: list[int]


class Own(NamedTuple):
    """Numbers that each process has its own of; they travel in the all-reduce of the step.

    Attributes:
        stop: 1 if this process was asked to stop.
        wait: seconds that it waited for its data.
        memory: bytes of tensors on its GPU, on a CPU of the whole process.
        memory_peak: the most of them so far. Both are at most `MEMORY_INTERVAL` old.
        bad_samples: samples that it could not read.
    """

    stop: float
    wait: float
    memory: float
    memory_peak: float
    bad_samples: int


class Telemetry:
    """Counts what steps ask for, and turns their times into rates. Every process has one.

    Attributes:
        peak: FLOP/s that one process could do at most, in matrix products.
        peak_source: how `peak` came about.
    """

    def __init__(self, recipe: Recipe, config: Any, place: World, dtype: torch.dtype) -> None:
        """Take the peak from the recipe, or have the first process measure it: all processes must call this.

        Args:
            recipe: the run.
            config: the model's configuration, from which FLOPs follow.
            place: this process's.
            dtype: what matrix products compute in.
        """
        self._place, self._config, self._batch_size = place, config, recipe.batch_size
        self._known: dict[tuple[float | None, int, int, int], Work] = {}
        self._bad_samples = 0
        self._memory, self._memory_read = (0, 0), -math.inf
        self.peak = recipe.peak_tflops * 1e12
        self.peak_source = "peak_tflops of the recipe"
        if not self.peak:
            self.peak = place.share(measure_peak(dtype, place.device) if place.is_first else None)
            self.peak_source = f"measured: matrix products in {str(dtype).removeprefix('torch.')}, the first process's"

    def work(self, inputs: Mapping[str, Any], keep_rate: float | None) -> Work:
        """What a sample of these inputs of a task asks for; computed once for each shape."""
        pixels, token_ids = inputs["pixels"], inputs.get("token_ids")
        frames = pixels.shape[2] if pixels.ndim == 5 else 1
        key = (keep_rate, frames, pixels.shape[-1], 0 if token_ids is None else token_ids.shape[1])
        if key not in self._known:
            self._known[key] = step_work(self._config, *key)
        return self._known[key]

    def own(self, stop: bool, wait: float, batch: data.Batch) -> Tensor:
        """This process's `Own` among zeros for the others': (processes * len(Own),) float32 on the CPU.

        The sum over processes has the numbers of all.
        """
        if batch.skipped:
            self._bad_samples = len(data.skipped())
        if time.perf_counter() - self._memory_read > MEMORY_INTERVAL:
            self._memory, self._memory_read = memory(self._place.device), time.perf_counter()
        table = torch.zeros(self._place.size, len(Own._fields))
        table[self._place.rank] = torch.tensor(Own(stop, wait, *self._memory, self._bad_samples))
        return table.flatten()

    def merge(self, means: Tensor) -> Own:
        """What the mean over processes of `own` says of all: samples add up, of the rest the largest counts."""
        table = means.numpy().reshape(self._place.size, len(Own._fields)) * self._place.size
        return Own(*table.max(axis=0).tolist())._replace(bad_samples=round(table[:, -1].sum()))

    def values(self, work: Work, seconds: float, all_own: Own) -> dict[str, Any]:
        """Rates, shares and sizes of a step of `seconds`, by their names in metrics.jsonl."""
        rate = self._batch_size / seconds
        return {
            "images_per_s": rate,
            "tokens_per_s": rate * work.tokens,
            "mfu": rate * work.flops / (self.peak * self._place.size),
            "data_wait": min(1.0, all_own.wait / seconds),
            "memory": int(all_own.memory),
            "memory_peak": int(all_own.memory_peak),
            "bad_samples": all_own.bad_samples,
            "kept_tokens": work.kept_tokens,
        }

    def write_environment(self, out: Path, recipe: Recipe, start: int, parameters: int) -> None:
        """Add what this session of the run computes on and with to `environment.json`, a list with an entry a session.

        Numbers such as MFU mean nothing without it. Sessions of steps that will be done again stay.

        Raises:
            TrainError: the file cannot be written.
        """
        path, device = out / "environment.json", self._place.device
        sessions: list[Any] = []
        if start:
            with suppress(OSError, ValueError):
                sessions = list(json.loads(path.read_text(encoding="utf-8")))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
        session = {
            "from_step": start + 1,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "device": name,
            "processes": self._place.size,
            "threads": torch.get_num_threads(),
            "peak_flops_per_s": self.peak,
            "peak_source": self.peak_source,
            "recipe": hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:16],
            "parameters": parameters,
            "versions": _versions(),
            "platform": platform.platform(),
        }
        try:
            path.write_text(json.dumps([*sessions, session], indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise TrainError(f"{path} cannot be written: {error.strerror or error}") from error


def step_work(
    config: Any, keep_rate: float | None, num_frames: int = 1, image_size: int | None = None, text_tokens: int = 0
) -> Work:
    """What one sample asks for, from the model's configuration.

    Args:
        config: of any model of `xray.models`.
        keep_rate: of EViT; None takes the configuration's.
        num_frames: 1 for an image.
        image_size: side in pixels; None takes the configuration's.
        text_tokens: length that captions are padded to; 0 where there are none.
    """
    cost = models.model_cost(
        config, keep_rate=keep_rate, num_frames=num_frames, image_size=image_size, text_tokens=text_tokens or None
    )
    return Work(PASSES * cost.flops, cost.block_tokens[0] + text_tokens, cost.kept_tokens)


def measure_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of large square matrix products in `dtype`, the best of several: what a step could reach at most.

    It is what this device does with PyTorch as it is set up, threads and TF32 included, and not a data sheet's number.
    """
    on_gpu = device.type == "cuda"
    size = GPU_PRODUCT if on_gpu else CPU_PRODUCT
    # A generator of its own, so that a run draws the same numbers whether the peak is measured or given. Random
    # values, because a GPU's clock is higher over zeros.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    for _ in range(3 if on_gpu else 1):
        torch.matmul(a, b, out=product)
    best, began = math.inf, time.perf_counter()
    while best == math.inf or time.perf_counter() - began < PEAK_SECONDS:
        best = min(best, _seconds_on_gpu(a, b, product) if on_gpu else _seconds_on_cpu(a, b, product))
    if on_gpu:
        del a, b, product
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / best


def _seconds_on_cpu(a: Tensor, b: Tensor, product: Tensor) -> float:
    began = time.perf_counter()
    torch.matmul(a, b, out=product)
    return time.perf_counter() - began


def _seconds_on_gpu(a: Tensor, b: Tensor, product: Tensor) -> float:
    """Of one product, timed in a row of several, so that launching them takes no time."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(GPU_ROW):
        torch.matmul(a, b, out=product)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / GPU_ROW


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes in use, and the most so far: of tensors on a GPU, of the whole process where the device is the CPU."""
    if device.type == "cuda":
        used = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
        return used["current"], used["peak"]
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        now, most = (int(status.split(f"{name}:", 1)[1].split(None, 1)[0]) for name in ("VmRSS", "VmHWM"))
    except (OSError, ValueError, IndexError):  # no Linux: only the most is known, on macOS in bytes
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
        now = most
    return now * 1024, most * 1024


def _processor() -> str:
    """The CPU's name, as far as the system tells it, and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "xray": xray.__version__, "torch": torch.__version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
