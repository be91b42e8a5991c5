"""The Triton kernels without a GPU: what they compute, by the interpreter, and that their cubins do not spill."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
triton = pytest.importorskip("triton")
SHAPES = {
    "A": (64, 197, 768, 138),
    "A, one sample": (1, 197, 768, 138),
    "B": (8, 1569, 768, 1098),
    "C": (64, 577, 1024, 404),
    "8,192 candidates": (1, 8193, 768, 5734),
}
"""B, N, C, K."""
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@pytest.mark.parametrize(
    ("file", "least"),
    [
        ("triton_interpreted.py", 60),
        ("triton_interpreted_attention.py", 80),
        ("triton_interpreted_contrastive.py", 120),
    ],
)
def test_interpreted_kernels(file: str, least: int) -> None:
    """All of a file, in a process whose Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > least
    assert "skipped" not in done.stdout


class Launch(NamedTuple):
    """What Triton would compile for one launch."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]


def specialise(kernel: Any, values: dict[str, Any], options: dict[str, Any]) -> Launch:
    """What Triton's launcher derives from arguments whose memory is 16-byte aligned."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for number, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            is_pointer = isinstance(value, torch.Tensor)
            wide = not is_pointer and not -(2**31) <= value < 2**31
            signature[name] = TYPES[value.dtype] if is_pointer else "i64" if wide else "i32"
            if is_pointer or (special and value % 16 == 0):
                attributes[number,] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constants, attributes, options)


def launches(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` makes on tensors without memory, each once."""
    found: dict[str, Launch] = {}

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = [parameter.name for parameter in self.params]
        options = {name: value for name, value in named.items() if name not in names}
        values = {**dict(zip(names, args, strict=False)), **{k: v for k, v in named.items() if k in names}}
        launch = specialise(self, values, options)
        found[repr((self.__name__, *launch[1:]))] = launch

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", record)
    call()
    return list(found.values())


def both_directions(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Every op of the family once, on meta tensors."""
    from xray_kernels.token_reorganize import triton as kernels

    batch, length, channels, keep = shape
    residual = torch.empty(batch, length, channels, dtype=dtype, device="meta")
    scores = torch.empty(batch, length - 1, device="meta")
    weight = torch.empty(channels, dtype=dtype, device="meta")
    out, indices = kernels.reorganize_tokens(residual, scores, keep, 1, True)
    kernels.reorganize_tokens_backward(out, residual, scores, indices, 1, True)
    kernels.add_reorganize_norm(residual, residual, scores, keep, weight, weight, 1e-6, 1, True)
    kernels.add_reorganize_norm_backward(
        out, out, residual, residual, scores, indices, out, weight, weight, 1e-6, 1, True
    )


def every_shape(dtype: torch.dtype) -> None:
    for shape in SHAPES.values():
        both_directions(shape, dtype)


class Attention(NamedTuple):
    """Arguments of the attention ops. The gate takes those that between them reach every kernel and way of tiling."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    dtype: torch.dtype
    scores: bool = False
    is_causal: bool = False
    packed: bool = False


def attention_both_directions(shape: Attention) -> None:
    """Forward and backward on meta tensors, of a query, key and value that come from one projection."""
    from xray_kernels.attention import triton as kernels

    batch, heads, tokens, head_dim, dtype, scores, is_causal, packed = shape
    projected = torch.empty(batch, tokens, 3, heads, head_dim, dtype=dtype, device="meta")
    query, key, value = projected.permute(2, 0, 3, 1, 4)
    bounds = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    packing, scale = (None, bounds, tokens // 8 if packed else tokens), head_dim**-0.5
    grad_scores = class_row = None
    if scores:
        out, grad_scores, statistics, class_row = kernels.attention_with_scores(query, key, value, scale, 1, *packing)
        kernels.class_scores(query, key, scale, 1, *packing)
        kernels.class_scores_backward(grad_scores, query, key, class_row, scale, 1, *packing[1:], query, key)
    else:
        out, statistics = kernels.attention(query, key, value, scale, is_causal, *packing)
    kernels.attention_backward(
        out, grad_scores, query, key, value, out, statistics, class_row, scale, is_causal, *packing, 1
    )


GATED = {
    torch.float32: [
        Attention(8, 12, 197, 64, torch.float32, scores=True),
        Attention(8, 12, 577, 128, torch.float32, is_causal=True),
        Attention(2, 4, 100, 256, torch.float32),
    ],
    torch.bfloat16: [
        Attention(64, 12, 197, 64, torch.bfloat16, scores=True),
        Attention(64, 12, 1569, 64, torch.bfloat16, scores=True),
        Attention(64, 12, 72, 64, torch.bfloat16, scores=True),
        Attention(64, 16, 257, 80, torch.bfloat16),
        Attention(8, 12, 577, 128, torch.bfloat16, is_causal=True),
        Attention(2, 4, 100, 256, torch.bfloat16),
    ],
}
ON_HOPPER = {
    torch.float32: [Attention(64, 16, 257, 80, torch.float32)],
    torch.bfloat16: [
        Attention(64, 16, 257, 72, torch.bfloat16),
        Attention(64, 12, 140, 64, torch.bfloat16, scores=True),
        Attention(64, 8, 77, 64, torch.bfloat16, is_causal=True),
        Attention(1, 12, 8 * 1025, 64, torch.bfloat16, scores=True, packed=True),
    ],
}
"""What differs from the others by little, on one architecture only: compiling takes 2 seconds a kernel."""


def every_attention(dtype: torch.dtype, architecture: int) -> None:
    for shape in GATED[dtype] + (ON_HOPPER[dtype] if architecture == 90 else []):
        attention_both_directions(shape)


def contrastive_both_directions(dtype: torch.dtype, width: int, kept_rows: int, with_ranks: bool) -> None:
    """Every op of the contrastive losses on meta tensors, for 65,536 pairs or, with logits that are kept, fewer."""
    from xray_kernels.contrastive_loss import triton as kernels

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    n, workspace = 65536, 2**28
    image, text, scale = empty(n, width), empty(n, width), empty(dtype=torch.float32)
    labels = (empty(n, dtype=torch.int32),) * 2
    pairs = (kernels.contrastive_pairs(image, text, scale) if with_ranks else empty(0, dtype=torch.float32),) * 2
    kernels.sigmoid_contrastive(image, text, scale, scale, *labels, *pairs, workspace, True, True)
    row_lse, column_lse, positive, _, _, kept = kernels.contrastive_statistics(
        image, text, scale, *labels, *pairs, kept_rows, workspace
    )
    kernels.contrastive_statistics_backward(
        image, text, scale, *labels, row_lse, column_lse, kept, row_lse, column_lse, positive, workspace, True, True
    )


def every_contrastive(dtype: torch.dtype, architecture: int) -> None:
    contrastive_both_directions(dtype, 768, 0, False)
    if architecture == 90:
        contrastive_both_directions(dtype, 768, 256, True)


SHARED_KIB = {80: 163, 90: 227, 100: 227}
"""The most shared memory that a block of threads can have."""


def compiled(launch: Launch, architecture: int) -> Any:
    source = triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=launch.options)


def resources(launch: Launch, architecture: int, folder: Path) -> tuple[int, int]:
    """Bytes of stack a thread of the compiled kernel uses, what does not fit into registers; and of shared memory."""
    kernel = compiled(launch, architecture)
    file = folder / f"{architecture}.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", usage.stdout)
    assert found is not None, usage.stdout
    return int(found[1]), kernel.metadata.shared


@pytest.fixture(scope="module")
def compiler() -> None:
    try:
        assert triton.knobs.nvidia.ptxas.path
        assert triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        pytest.skip(f"Triton lacks its CUDA tools: {error}")


def assert_fits(found: list[Launch], architecture: int, folder: Path) -> None:
    """No kernel spills, and none asks for more shared memory than there is."""
    wrong = {}
    for launch in found:
        stack, shared = resources(launch, architecture, folder)
        if stack or shared > SHARED_KIB[architecture] * 1024:
            constants = {name: value for name, value in launch.constants.items() if name.isupper()}
            wrong[f"{launch.kernel.__name__} {constants}"] = stack, shared
    assert not wrong


ARCHITECTURES = pytest.mark.parametrize("architecture", [80, 90, 100], ids=lambda number: f"sm_{number}")


@ARCHITECTURES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_kernels_compile_without_spills(
    dtype: torch.dtype, architecture: int, compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = launches(monkeypatch, functools.partial(every_shape, dtype))
    names = {launch.kernel.__name__ for launch in found}
    assert len(names) == 8, names
    assert_fits(found, architecture, tmp_path)


@ARCHITECTURES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_kernels_compile_without_spills(
    dtype: torch.dtype, architecture: int, compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = launches(monkeypatch, functools.partial(every_attention, dtype, architecture))
    names = {launch.kernel.__name__ for launch in found}
    assert len(names) == 6 + (dtype == torch.bfloat16), names
    assert_fits(found, architecture, tmp_path)


@ARCHITECTURES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contrastive_kernels_compile_without_spills(
    dtype: torch.dtype, architecture: int, compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """float16 differs from bfloat16 by one multiplication, and other widths by the length of one loop."""
    monkeypatch.setattr("xray_kernels.contrastive_loss.triton.architecture", lambda image: architecture)
    found = launches(monkeypatch, functools.partial(every_contrastive, dtype, architecture))
    names = {launch.kernel.__name__ for launch in found}
    assert len(names) == 5 + (architecture == 90), names
    assert_fits(found, architecture, tmp_path)


def test_heads_of_72_channels_are_read_as_vectors(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though 72 is no multiple of 16, which is all that Triton looks at in a stride."""
    found = launches(monkeypatch, lambda: attention_both_directions(Attention(64, 16, 257, 72, torch.bfloat16)))
    assert len(found) == 3
    for launch in found:
        loads = compiled(launch, 90).asm["ptx"]
        assert "cp.async.cg.shared.global" in loads
        assert not re.search(r"ld\.global\S*\.[bu]16", loads)


def test_a_spill_would_be_seen(compiler: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same kernels with too few registers: the gate is able to fail."""
    found = launches(monkeypatch, lambda: both_directions(SHAPES["B"], torch.float32))
    launch = next(launch for launch in found if launch.kernel.__name__ == "norm_backward_kernel")
    stack, _ = resources(launch._replace(options={**launch.options, "maxnreg": 32}), 90, tmp_path)
    assert stack > 16
