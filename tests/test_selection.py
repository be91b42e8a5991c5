"""Which implementation runs on CUDA: the rule, the first-use check and its fallback, and the table of measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import results, table
from bench.results import GREEN, Comparison, Timing
from xray_kernels import _library, testing
from xray_kernels.token_reorganize import reference

ROOT = Path(__file__).resolve().parent.parent
OP = "reorganize_tokens"
ALL = ("reference", "triton", "cuda")
KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@pytest.mark.parametrize(
    ("asked", "measured", "available", "chosen"),
    [
        ("auto", None, ALL, "triton"),
        ("auto", None, ("reference", "cuda"), "reference"),
        ("auto", None, ("reference",), "reference"),
        ("auto", "cuda", ALL, "cuda"),
        ("auto", "triton", ALL, "triton"),
        ("auto", "reference", ALL, "reference"),
        ("auto", "cuda", ("reference", "triton"), "triton"),
        ("triton", "cuda", ALL, "triton"),
        ("triton", None, ("reference", "cuda"), "reference"),
        ("cuda", "triton", ALL, "cuda"),
        ("cuda", None, ("reference", "triton"), "reference"),
        ("reference", "cuda", ALL, "reference"),
        ("cpu", "cuda", ALL, "reference"),
    ],
)
def test_rule(asked: str, measured: str | None, available: tuple[str, ...], chosen: str) -> None:
    assert _library.select(asked, measured, available) == chosen


def arguments() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 9, 4, generator=generator), torch.rand(2, 8, generator=generator), 3, 1, True


Kernel = Callable[..., tuple[Tensor, Tensor]]


def use_kernel(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> list[tuple[Any, ...]]:
    """Let `kernel` be the Triton implementation of OP, on an unmeasured device; the calls it gets are returned."""
    calls: list[tuple[Any, ...]] = []

    def recorded(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(args)
        return kernel(*args)

    module = SimpleNamespace(**{OP: recorded, "samples": lambda name, dtype, device: [arguments()]})
    monkeypatch.setitem(sys.modules, "kernels_of_this_test", module)
    monkeypatch.setitem(_library.TRITON, OP, "kernels_of_this_test")
    monkeypatch.setattr(_library, "_DECIDED", {})
    monkeypatch.setattr(_library, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a device nobody measured")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("XRAY_KERNELS", raising=False)
    return calls


def is_reference(found: tuple[Tensor, Tensor]) -> bool:
    wanted = reference.reorganize_tokens(*arguments())
    return all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


def test_a_right_kernel_is_checked_once_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = use_kernel(monkeypatch, reference.reorganize_tokens)
    run = _library.choose_on_cuda(OP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_reference(run(KEYS, *arguments()))
        assert is_reference(run(KEYS, *arguments()))
    assert len(calls) == 3, "one check and two calls"
    run(KEYS, arguments()[0].half(), *arguments()[1:])
    assert len(calls) == 5, "another dtype is checked for itself"
    run(KEYS, arguments()[0].double(), *arguments()[1:])
    assert len(calls) == 6, "float64 has no kernel to check"


def off(out: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return out + 0.01, indices


def not_a_number(out: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(torch.arange(4) == 2, float("nan"), out), indices


def swapped(out: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return out, indices.flip(1)


def short(out: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return out[:, :-1], indices


def broken(out: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no compiler here")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (off, "output 0 differs by 0.01"),
        (not_a_number, "output 0 differs by nan"),
        (swapped, "output 1, torch.int64, differs"),
        (short, r"output 0 has shape \(2, 4, 4\), the reference's has \(2, 5, 4\)"),
        (broken, "RuntimeError: no compiler here"),
    ],
)
def test_a_wrong_kernel_is_named_once_and_never_used(monkeypatch: pytest.MonkeyPatch, spoil: Kernel, why: str) -> None:
    calls = use_kernel(monkeypatch, lambda *args: spoil(*reference.reorganize_tokens(*args)))
    run = _library.choose_on_cuda(OP)
    with pytest.warns(RuntimeWarning, match=f"kernel of {OP} is not used for torch.float32 on cpu.*{why}"):
        found = run(KEYS, *arguments())
    assert is_reference(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_reference(run(KEYS, *arguments()))
    assert len(calls) == 1


def test_an_op_that_writes_to_its_arguments_is_judged_by_what_it_wrote() -> None:
    def double(x: Tensor, count: int) -> None:
        x.mul_(2)

    def double_all_but_one(x: Tensor, count: int) -> None:
        x[:-1].mul_(2)

    args = (torch.arange(4.0), 3)
    assert _library.compare(double, args, double) is None
    assert "output 0 differs by 3" in (_library.compare(double_all_but_one, args, double) or "")
    assert torch.equal(args[0], torch.arange(4.0)), "each side wrote to copies"


def test_infinities_must_be_equal() -> None:
    """As in attention's statistics of rows without keys; and one does not widen what the others may differ by."""
    infinity = float("inf")

    def found(*values: float) -> str | None:
        return _library.compare(lambda x: (torch.tensor(values),), (torch.zeros(1),), lambda x: (x.new_tensor(right),))

    right = [1.0, infinity, -infinity]
    assert found(1.0, infinity, -infinity) is None
    for wrong in ((1.1, infinity, -infinity), (1.0, -infinity, -infinity), (1.0, 5.0, -infinity), (infinity,) * 3):
        assert found(*wrong) is not None


def test_a_graph_that_is_captured_gets_the_reference_and_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = use_kernel(monkeypatch, reference.reorganize_tokens)
    run = _library.choose_on_cuda(OP)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert is_reference(run(KEYS, *arguments()))
    assert not calls
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert is_reference(run(KEYS, *arguments()))
    assert len(calls) == 2


def test_what_was_measured_or_asked_for_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = use_kernel(monkeypatch, lambda *args: off(*reference.reorganize_tokens(*args)))
    marked = object()
    monkeypatch.setitem(_library.CUDA_KERNELS, OP, SimpleNamespace(call_boxed=lambda keyset, *args: marked))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU")
    monkeypatch.setattr(_library, "measured_table", lambda: {"GPU": {OP: {"float32": "cuda", "float16": "triton"}}})
    run = _library.choose_on_cuda(OP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(KEYS, *arguments()) is marked
        assert not is_reference(run(KEYS, arguments()[0].half(), *arguments()[1:]))
        assert len(calls) == 1
        monkeypatch.setenv("XRAY_KERNELS", "triton")
        monkeypatch.setattr(_library, "_DECIDED", {})
        assert not is_reference(run(KEYS, *arguments()))
    assert len(calls) == 2


def test_two_kernels_at_one_key_can_both_be_called() -> None:
    """The kernel below an override stays callable, as the C++ one does below the function that chooses."""
    key = "xray_kernels::reorganize_tokens"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(key, "CPU"):
        pytest.skip("_cpu is not built")
    below = torch.library.get_kernel(key, "CPU")
    library = torch.library.Library(_library.NAMESPACE, "IMPL")
    op = torch.ops.xray_kernels.reorganize_tokens
    before = op(*arguments())
    seen: list[Any] = []

    def above(keyset: Any, *args: Any) -> Any:
        seen.append(args)
        return below.call_boxed(keyset, *args)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.override(library, OP, above, "CPU")
    try:
        assert all(torch.equal(a, b) for a, b in zip(op(*arguments()), before, strict=True))
    finally:
        library._destroy()
    assert len(seen) == 1
    op(*arguments())
    assert len(seen) == 1


def test_an_implementation_that_is_not_there_is_named() -> None:
    with (
        pytest.raises(ValueError, match=r"implementation must be one of reference, .*got 'opencl'"),
        testing.use_implementation("opencl"),
    ):
        pass


def test_triton_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XRAY_KERNELS", "triton")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="XRAY_KERNELS=triton needs Triton, which is not installed"):
        _library.load_compiled()
    assert _library.available_on_cuda(OP) == ["reference"]


@pytest.mark.parametrize(("asked", "chosen"), [("auto", "triton"), ("triton", "triton"), ("reference", "reference")])
def test_import_on_a_cuda_build(asked: str, chosen: str) -> None:
    """A PyTorch that says it has CUDA: ops with Triton kernels take them, without importing Triton, and say so."""
    pytest.importorskip("triton")
    code = (
        "import sys, torch; torch.version.cuda = '13.0'\n"
        "import xray_kernels; from xray_kernels import _library, info\n"
        f"assert [_library.implementation(op, 'cuda') for op in ('{OP}', 'tag_loss')] == ['{chosen}', 'reference']\n"
        "print(info.report())\n"
        "assert 'triton' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, "XRAY_KERNELS": asked},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert next(line for line in done.stdout.splitlines() if line.startswith(f"{OP} ")).split()[2] == chosen


def compared(direction: str, dtype: str, **seconds: float) -> Comparison:
    peers = [Timing("eager", GREEN, [0.01] * 3)]
    peers += [
        Timing(f"xray {name}", GREEN if second > 0 else "red", [second] * 3 if second > 0 else [], ours=True)
        for name, second in seconds.items()
    ]
    return Comparison(
        function=OP,
        case="A",
        dtype=dtype,
        direction=direction,
        bytes=1,
        flops=1,
        copy_samples=[1.0],
        matmul_samples=[1.0],
        matmul_flops=1,
        others=0.0,
        peers=peers,
        skipped={},
    )


def write(folder: Path, device: str, kind: str, comparisons: list[Comparison]) -> None:
    content = results.record(OP, torch.device("cpu"), [])
    found = [asdict(comparison) for comparison in comparisons]
    content |= {"device": device, "device_name": device, "device_type": kind, "comparisons": found}
    results.write(folder, content)


def test_table_of_measurements(tmp_path: Path) -> None:
    """Per op and dtype the fastest on all cases; a red one is out, and so is what was not timed everywhere."""
    assert table.measured(tmp_path) == "{}\n"
    found = [
        compared("forward", "float32", reference=0.009, triton=0.004, cuda=0.001),
        compared("forward", "float32", reference=0.009, triton=0.002, cuda=0.010),
        compared("forward+backward", "float32", reference=0.009, triton=0.002, cuda=0.001),
        compared("forward", "bfloat16", reference=0.009, triton=0.004, cuda=-1),
        compared("forward+backward", "bfloat16", reference=0.009, triton=0.004, cuda=0.001),
        compared("forward+backward", "bfloat16", reference=0.009, triton=0.004),
    ]
    write(tmp_path, "gpu", "cuda", found)
    write(tmp_path, "processor", "cpu", [compared("forward", "float32", reference=1)])
    assert json.loads(table.measured(tmp_path)) == {
        "gpu": {
            OP: {"float32": "triton", "bfloat16": "triton"},
            f"{OP}_backward": {"float32": "cuda", "bfloat16": "triton"},
        }
    }


def test_committed_table_is_up_to_date() -> None:
    assert table.MEASURED.read_text(encoding="utf-8") == table.measured(results.RESULTS), "run python -m bench.table"
    for ops in _library.measured_table().values():
        assert set(ops) <= set(_library.REFERENCES)
        assert {name for chosen in ops.values() for name in chosen.values()} <= set(ALL)
