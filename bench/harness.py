"""Timing for benchmarks: peers side by side on the same inputs, parity first, the roofline measured in the same run.

A round runs every peer once, in turn (ABAB...), then a `copy_` that moves as many bytes as the op must and a matrix
product, so that whatever else the machine does hits all alike, the roofline too. pytest-benchmark does the timing: its
rounds are our turns.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import itertools
import shutil
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import results
from bench.results import GREEN, Comparison, Target, Timing
from xray_kernels import _library, testing
from xray_kernels.testing import Inputs, OpSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIRECTIONS = ("forward", "forward+backward")
STEP = "training step"
SECONDS = 1.0 if DEVICE.type == "cuda" else 4.0
"""What one comparison may take; it gets as many rounds as fit, within ROUNDS."""
ROUNDS = (7, 40)
LONG, VERY_LONG, FEW = 5.0, 60.0, 3
"""A round of more seconds than LONG is repeated FEW times, one of more than VERY_LONG is not."""
MATMUL_SIZE = 4096 if DEVICE.type == "cuda" else 1024
"""Side of the square matrix product that stands for the arithmetic limit."""


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, for all peers alike; whether it could be told so.

    By default it returns blocks of over 32 MiB to the system, which clears their pages again at their next use. That
    took 2.4 us per page of 4 KiB where it was measured, 64 of 72 ms for a result of 106 MiB, so it would be what is
    compared. Who trains on a CPU runs an allocator that keeps memory (tcmalloc, jemalloc, or these settings).
    """
    mmap_max, trim_threshold = -4, -1  # names of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


@dataclass(frozen=True)
class Peer:
    """A way to compute an op, called with the keyword arguments of its spec's public function.

    `composition` is what it is checked against when that is not the spec's: a peer may do another thing at less cost.
    `timed` is what is timed, called alike, when that is not `function`: a whole training step, whose gradients are what
    can be checked.
    """

    name: str
    function: Callable[..., Any]
    needs: str = ""
    slow: bool = False
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    ours: bool = False
    default: bool = False
    composition: Callable[..., Any] | None = None
    timed: Callable[..., Any] | None = None

    def absent(self, full: bool) -> str:
        """Why this peer can not run here, or "" when it can."""
        if self.needs and importlib.util.find_spec(self.needs) is None and shutil.which(self.needs) is None:
            return f"{self.needs} is not installed"
        return "it takes long: only with --benchmark" if self.slow and not full else ""


def peer(name: str, *, needs: str = "", slow: bool = False) -> Callable[[Callable[..., Any]], Peer]:
    """Declare a peer: decorate a function that takes and returns what the public function does.

    Args:
        name: what tables call it.
        needs: a Python package or a program without which the peer is skipped, by its name.
        slow: leave it out of the smoke test.
    """
    return lambda function: Peer(name, function, needs=needs, slow=slow)


def ops_of(spec: OpSpec) -> list[str]:
    """The ops that a public function calls: the one of its name, or all of its family."""
    family = spec.function.__module__
    ops = [spec.name] if spec.name in _library.REFERENCES else list(_library.REFERENCES)
    return [op for op in ops if _library.REFERENCES[op].__module__.startswith(f"{family}.")]


def ours(spec: OpSpec) -> tuple[Peer, ...]:
    """The implementations of this project that an op has on this machine; on a CPU, one for each instruction set."""
    if DEVICE.type == "cuda":
        own = {name for op in ops_of(spec) for name in _library.available_on_cuda(op)}
        names = [name for name in testing.implementations("cuda") if name in own]
    else:
        own = {_library.implementation(op, "cpu") for op in ops_of(spec)}
        names = testing.implementations("cpu") if own != {"reference"} else ["reference"]
    return tuple(
        Peer(
            f"xray {name}",
            spec.function,
            context=functools.partial(testing.use_implementation, name),
            ours=True,
            default=DEVICE.type == "cpu" and name == names[-1],
        )
        for name in names
    )


def default_on_cuda(spec: OpSpec, dtype: torch.dtype) -> str:
    """The name of the peer that runs on CUDA when nothing is chosen, which can differ between dtypes."""
    return f"xray {max((_library.implementation(op, 'cuda', dtype) for op in ops_of(spec)), default='')}"


@dataclass(frozen=True)
class Work:
    """What is compared, as the fields of `Comparison` say it."""

    function: str
    case: str
    dtype: torch.dtype
    direction: str
    bytes: int
    flops: int
    samples: int = 0


class Bench:
    """What a benchmark is given: `compare` checks and times peers; without `full` it checks and runs each once."""

    def __init__(self, benchmark: BenchmarkFixture, full: bool, comparisons: list[Comparison]) -> None:
        self.full = full
        self._benchmark = benchmark
        self._comparisons = comparisons

    def compare(
        self,
        spec: OpSpec,
        inputs: Inputs,
        peers: tuple[Peer, ...],
        case: str,
        direction: str,
        targets: Sequence[Target] = (),
        checked: Inputs | None = None,
        samples: int = 0,
    ) -> None:
        """Compare `peers` (the first is the baseline) with each other and record the result.

        Parity comes before timing, by the tolerance rule of `xray_kernels.testing`: the error against the float64
        composition is at most twice that of the plain composition in the inputs' dtype, plus 1e-5. A peer outside it is
        not timed. If it is the baseline or one of ours, that fails the benchmark once the result is recorded. Parity is
        checked on `checked` where the oracle could not take all of `inputs`. `samples` is how many of a data set a call
        takes, if it does.
        """
        checked = inputs if checked is None else checked
        backward = direction == DIRECTIONS[1]
        torch.compiler.reset()
        skipped = {p.name: why for p in peers if (why := p.absent(self.full))}
        present = [p for p in peers if p.name not in skipped]
        verdicts: dict[str, str] = {}
        for composition in dict.fromkeys(p.composition or spec.composition for p in present):
            oracle = outcome(composition, testing.convert(checked, torch.float64), backward)
            yardstick = outcome(composition, checked, backward)
            for p in present:
                if (p.composition or spec.composition) is composition:
                    verdicts[p.name] = self._parity(p, checked, backward, yardstick, oracle)
        del oracle, yardstick

        traffic, flops = (pair[0] + backward * pair[1] for pair in (spec.traffic(inputs), spec.flops(inputs)))
        dtype = next(v.dtype for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
        turns = {p.name: call(p.timed or p.function, inputs, backward) for p in present if verdicts[p.name] == GREEN}
        if DEVICE.type == "cuda" and direction in DIRECTIONS:
            default = default_on_cuda(spec, dtype)
            present = [replace(p, default=p.default or p.name == default) for p in present]
        about = Work(spec.name, case, dtype, direction, traffic, flops, samples)
        self.measure(about, present, verdicts, turns, skipped, targets)
        answerable = [p.name for p in present if p.ours or p is peers[0]]
        red = [f"{name}: {verdicts[name]}" for name in answerable if verdicts[name] != GREEN]
        assert not red, "; ".join(red)

    def measure(
        self,
        work: Work,
        peers: Sequence[Peer],
        verdicts: dict[str, str],
        functions: dict[str, Callable[[], None]],
        skipped: dict[str, str],
        targets: Sequence[Target],
        memory: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Time the `functions` of peers by their names, beside a copy and a matrix product, and record the result."""
        green = [p for p in peers if p.name in functions]
        turns: list[tuple[Any, Callable[[], None]]] = [(p.context, functions[p.name]) for p in green]
        if self.full:
            turns += [(contextlib.nullcontext, copy_of(work.bytes)), (contextlib.nullcontext, matmul_for(work.dtype))]
            before = results.processor_seconds()
            *samples, copy_samples, matmul_samples = self._time(turns)
            taken = {p.name: numbers for p, numbers in zip(green, samples, strict=True)}
            timings = [
                Timing(p.name, verdicts[p.name], taken.get(p.name, []), p.ours, p.default, memory.get(p.name, 0))
                for p in peers
            ]
            self.record(work, timings, copy_samples, matmul_samples, before, skipped, targets)
        else:
            self._benchmark.disabled = True
            self._benchmark.pedantic(run_turns, args=(turns,))

    def record(
        self,
        work: Work,
        timings: list[Timing],
        copy_samples: list[float],
        matmul_samples: list[float],
        before: tuple[float, float, float] | None,
        skipped: dict[str, str],
        targets: Sequence[Target],
    ) -> None:
        """Keep a comparison for the result file; `before` is `results.processor_seconds()` of its start."""
        self._comparisons.append(
            Comparison(
                function=work.function,
                case=work.case,
                dtype=str(work.dtype).removeprefix("torch."),
                direction=work.direction,
                bytes=work.bytes,
                flops=work.flops,
                copy_samples=copy_samples,
                matmul_samples=matmul_samples,
                matmul_flops=2 * MATMUL_SIZE**3,
                others=results.cores_of_others(before, results.processor_seconds()),
                peers=timings,
                skipped=skipped,
                targets=list(targets),
                samples=work.samples,
            )
        )

    @staticmethod
    def _parity(
        peer: Peer, inputs: Inputs, backward: bool, yardstick: dict[str, Tensor], oracle: dict[str, Tensor]
    ) -> str:
        with peer.context():
            actual = outcome(peer.function, inputs, backward)
        try:
            testing.assert_within_rule(actual, yardstick, oracle, what="parity red,")
        except AssertionError as error:
            return str(error).splitlines()[0]
        return GREEN

    def _time(self, turns: list[tuple[Any, Callable[[], None]]]) -> list[list[float]]:
        """Seconds of every turn, rounds of all turns in order; contexts are entered outside the timed part."""
        start = time.perf_counter()
        run_turns(turns)
        took = time.perf_counter() - start
        rounds = min(max(int(SECONDS / took), ROUNDS[0]), ROUNDS[1])
        if took > LONG:
            rounds = FEW if took < VERY_LONG else 1
        following, entered = itertools.cycle(turns), contextlib.ExitStack()

        def setup() -> tuple[tuple[Callable[[], None]], dict[str, Any]]:
            context, function = next(following)
            entered.enter_context(context())
            return (function,), {}

        self._benchmark.pedantic(
            lambda function: function(),
            setup=setup,
            teardown=lambda function: entered.close(),
            rounds=rounds * len(turns),
            warmup_rounds=0 if took > LONG else len(turns),
        )
        seconds = [round(sample, 7) for sample in self._benchmark.stats.stats.data]
        return [seconds[i :: len(turns)] for i in range(len(turns))]


def run_turns(turns: list[tuple[Any, Callable[[], None]]]) -> None:
    """One round, untimed: every function inside its context."""
    for context, function in turns:
        with context():
            function()


def outcome(function: Callable[..., Any], inputs: Inputs, backward: bool) -> dict[str, Tensor]:
    """Outputs of `function` by name, with `backward` also the gradients of its floating inputs."""
    if backward:
        return testing.results(function, inputs)
    with torch.no_grad():
        result = function(**inputs)
    if isinstance(result, dict):
        return result
    return {f"out{i}": out for i, out in enumerate(result if isinstance(result, tuple) else (result,))}


def call(function: Callable[..., Any], inputs: Inputs, backward: bool) -> Callable[[], None]:
    """What is timed: the function without gradients, or with them and the gradients of all floating inputs."""
    synchronize = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None

    def forward() -> None:
        with torch.no_grad():
            function(**inputs)
        synchronize()

    if not backward:
        return forward
    leaves = {
        k: v.detach().requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    arguments = {**inputs, **leaves}
    ones: list[Tensor] = []

    def forward_backward() -> None:
        result = function(**arguments)
        outputs = [out for out in (result if isinstance(result, tuple) else (result,)) if out.requires_grad]
        if not ones:
            ones.extend(torch.ones_like(out) for out in outputs)
        torch.autograd.grad(outputs, list(leaves.values()), ones, allow_unused=True)
        synchronize()

    return forward_backward


def copy_of(traffic: int) -> Callable[[], None]:
    """`copy_` between two tensors of half of `traffic` bytes each: it reads one half and writes the other."""
    source = torch.ones(max(1, traffic // 8), device=DEVICE)
    return call(torch.empty_like(source).copy_, {"other": source}, backward=False)


def matmul_for(dtype: torch.dtype) -> Callable[[], None]:
    """A square matrix product in `dtype`, or in float32 where that is faster: half types may be computed so."""
    side = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=DEVICE, dtype=fastest_matmul(dtype))
    return call(torch.matmul, {"input": side, "other": side}, backward=False)


@functools.cache
def fastest_matmul(dtype: torch.dtype) -> torch.dtype:
    """`dtype` or float32, whichever multiplies small matrices faster on this device, by the best of five."""

    def best(candidate: torch.dtype) -> float:
        side = torch.randn(256, 256, device=DEVICE, dtype=candidate)
        product = call(torch.matmul, {"input": side, "other": side}, backward=False)
        return min(timeit.repeat(product, repeat=6, number=1)[1:])

    return min((dtype, torch.float32), key=best)
