"""The built files: stable ABI only, no undeclared CUDA symbols, no spills; and what happens when they are absent."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xray_kernels import _library
from xray_kernels.info import report

ROOT = Path(__file__).resolve().parent.parent
ALLOWED_CUDA = {"aoti_torch_get_current_cuda_stream", "aoti_torch_device_type_cuda"}


@pytest.fixture(scope="session")
def cpu_library() -> Path:
    file = _library.compiled_file("_cpu")
    if file is None:
        pytest.skip("_cpu is not built")
    return file


@pytest.fixture(scope="session")
def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """`_cuda`, built here by nvcc for a PyTorch that may have no CUDA; and the compiler's log."""
    if not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")):
        pytest.skip("no nvcc on this machine")
    out = tmp_path_factory.mktemp("cuda")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", str(out / "temp"), "--build-lib", str(out)],
        cwd=ROOT,
        env={**os.environ, "XRAY_CUDA": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(out.glob("xray_kernels/_cuda*.so")), done.stdout + done.stderr


def undefined_symbols(file: Path) -> set[str]:
    listed = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", str(file)], capture_output=True, text=True, check=True
    )
    return {line.split(maxsplit=1)[1].split("@")[0] for line in listed.stdout.splitlines() if line.strip()}


def needed(file: Path) -> str:
    return subprocess.run(["readelf", "-d", str(file)], capture_output=True, text=True, check=True).stdout


def check_stable(file: Path) -> None:
    symbols = undefined_symbols(file)
    assert not [name for name in symbols if "c10::" in name or "at::" in name or "_Z" in name[:2]]
    assert any(name.startswith("torch_") for name in symbols)
    assert "libtorch.so" in needed(file)
    assert "libpython" not in needed(file)
    assert not [name for name in symbols if name.startswith("Py")]


def test_cpu_library_uses_only_the_stable_abi(cpu_library: Path) -> None:
    check_stable(cpu_library)
    assert (
        not [name for name in undefined_symbols(cpu_library) if "cuda" in name.lower()]
        or {name for name in undefined_symbols(cpu_library) if "cuda" in name.lower()} <= ALLOWED_CUDA
    )


TILES = r"tdpbf16ps|tile(?:loadd|stored|zero|release)|ldtilecfg"


def test_instruction_sets_stay_in_their_variants(cpu_library: Path) -> None:
    """The library starts on any processor: only functions of namespace avx512 and amx have registers of 64 bytes, only
    those of amx have tiles and bfloat16 arithmetic. And those are there."""
    if platform.machine() != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs objdump and x86-64")
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(cpu_library)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, set[str]] = {"zmm": set(), "bf16": set(), "tiles": set()}
    tiles = set()
    for function, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE):
        for kind, pattern in (("zmm", "%zmm"), ("bf16", r"\tv\w*bf16"), ("tiles", rf"\t(?:{TILES})\b")):
            if re.search(pattern, body):
                found[kind].add(function)
        tiles |= set(re.findall(rf"\t({TILES})\b", body))
    assert tiles == {"tdpbf16ps", "tileloadd", "tilestored", "tilezero", "tilerelease", "ldtilecfg"}
    assert found["bf16"]
    for kind, namespaces in (("zmm", r"\b(?:avx512|amx)::"), ("bf16", r"^amx::"), ("tiles", r"^amx::")):
        strangers = [name for name in found[kind] if not re.search(namespaces, name)]
        assert not strangers, f"{kind}: {strangers[:3]}"


def test_cuda_library_uses_only_the_stable_abi(cuda_build: tuple[Path, str]) -> None:
    file, _ = cuda_build
    check_stable(file)
    assert "libcudart" not in needed(file)
    cuda = {name for name in undefined_symbols(file) if re.match(r"cu[A-Z]|cuda", name) or "cuda" in name}
    assert cuda <= ALLOWED_CUDA


def test_cuda_kernels_compile_without_spills(cuda_build: tuple[Path, str]) -> None:
    _, log = cuda_build
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(found) >= 100, "the compiler's report is missing"
    assert set(found) == {("0", "0", "0")}
    for architecture in ("sm_80", "sm_90a", "sm_100"):
        assert f"'{architecture}'" in log


# part of a kernel's mangled name -> threads of a block, blocks that are to fit on a multiprocessor
OCCUPANCY = {
    "17reorganize_kernelI.*Lb0E": (256, 3),
    "17reorganize_kernelI.*Lb1E": (256, 2),
    "15backward_kernelI.*ReorganizeBackward": (128, 4),
    "13logits_kernelI": (128, 5),
    "13scores_kernelE": (128, 8),
    "15backward_kernelI.*Li1E.*ClassScoresBackward": (256, 2),
    "15backward_kernelI.*Li[48]E.*ClassScoresBackward": (256, 3),
    "12query_kernelI": (256, 4),
    "20norm_backward_kernelI": (512, 1),
    "17norm_fused_kernelI": (256, 4),
    "17sum_blocks_kernelI": (256, 4),
    "17statistics_kernelILb1E": (256, 2),
    "17statistics_kernelILb0E": (256, 1),
    "11join_kernelE": (128, 8),
    "12pairs_kernelI": (256, 4),
    "15gradient_kernelI.*Lb1E": (256, 2),
    "15gradient_kernelI.*Lb0E": (256, 1),
    "13factor_kernelE": (512, 1),
    "17accumulate_kernelI": (256, 4),
    "13finish_kernelI": (256, 4),
    "12total_kernelE": (512, 1),
    "14sigmoid_kernelI.*Lb1E": (256, 2),
    "14sigmoid_kernelI.*Lb0E": (256, 1),
}


def test_cuda_kernels_leave_registers_for_the_planned_blocks(cuda_build: tuple[Path, str]) -> None:
    _, log = cuda_build
    used = re.findall(r"Compiling entry function '(\w+)' for 'sm_\w+'(?:.*\n)*?.*Used (\d+) registers", log)
    assert len(used) >= 100
    for name, registers in used:
        fitting = [plan for part, plan in OCCUPANCY.items() if re.search(part, name)]
        assert len(fitting) == 1, name
        threads, blocks = fitting[0]
        assert -(-int(registers) // 8) * 8 * threads * blocks <= 65536, f"{name} uses {registers} registers"


# file -> its kernels; and parts of the names of those with 16-byte vectors, of those of them that load such only, and
# of those that have such of their own whatever the rows
VECTORS = {
    "token_reorganize/cuda.cu": (18, "IfLi4E|Li8E", None, None),
    "token_reorganize/cuda_backward.cu": (18, "IfLi4E|Li8E", None, None),
    "attention/cuda_class_row.cu": (16, "IfLi4E|Li8E", "logits_kernel", None),
    "contrastive_loss/cuda_statistics.cu": (
        9,
        "IfLi4E|Li8E|Lb1E",
        "pairs_kernel",
        "statistics_kernelILb0E|join_kernel",
    ),
    "contrastive_loss/cuda_gradient.cu": (20, "ffLi4E|Li8E|ILi4E|Lb1E", None, None),
    "contrastive_loss/cuda_sigmoid.cu": (6, "Lb1E", None, None),
}


@pytest.mark.parametrize("file", VECTORS)
def test_cuda_kernels_move_16_bytes_at_a_time(file: str, tmp_path: Path) -> None:
    """Kernels for aligned rows load and store four words at once, and no kernel has local memory (in PTX, whose vectors
    the assembler keeps: LDG.E.128, STG.E.128)."""
    nvcc = shutil.which("nvcc") or f"{os.environ.get('CUDA_HOME', '')}/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("no nvcc on this machine")
    command = [nvcc, "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-arch=compute_90a", "--ptx", str(ROOT / "csrc" / file)]
    subprocess.run([*command, "-o", str(tmp_path / "ptx")], check=True, capture_output=True)
    kernels = {body.split("(", 1)[0]: body for body in (tmp_path / "ptx").read_text().split(".entry ")[1:]}
    count, of_wide, loads_only, own = VECTORS[file]
    assert len(kernels) >= count
    for name, body in kernels.items():
        assert ".local" not in body, name
        if own and re.search(own, name):
            continue
        wide = re.search(of_wide, name) is not None
        stores = wide and not (loads_only and loads_only in name)
        for kind, wanted in (("ld.global", wide), ("st.global", stores)):
            moves = len(re.findall(rf"\b{kind}[.\w]*\.v4\.\w*32", body))
            assert bool(moves) == wanted, f"{name}: {moves} {kind}"


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )


def test_reference_can_be_forced() -> None:
    code = "import xray_kernels._library as l; print(sorted(l.LOADED), l.implementation('reorganize_tokens', 'cpu'))"
    assert python(code, XRAY_KERNELS="reference").stdout.split() == ["[]", "reference"]


def test_unknown_choice_is_named() -> None:
    done = python("import xray_kernels", XRAY_KERNELS="fast")
    assert "XRAY_KERNELS is 'fast'; it must be one of auto, reference, cpu, triton, cuda" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gpu_kernels_on_a_cpu_build_are_refused_by_name(name: str) -> None:
    done = python("import xray_kernels", XRAY_KERNELS=name)
    assert f"XRAY_KERNELS={name} needs a PyTorch built with CUDA" in done.stderr


def copy_package(to: Path) -> None:
    shutil.copytree(ROOT / "xray_kernels", to / "xray_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))


def test_package_works_without_any_compiled_file(tmp_path: Path) -> None:
    """No compiler, no extension: the ops run, importing prints nothing and warns of nothing."""
    copy_package(tmp_path)
    code = (
        "import sys; sys.path.insert(0, '.'); import torch, xray_kernels as k;"
        "assert str(k.__file__).startswith(sys.argv[1]);"
        "k.reorganize_tokens(torch.zeros(1, 4, 2), torch.zeros(1, 3), 2)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wanted = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, '.'); import xray_kernels"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "XRAY_KERNELS": "cpu"},
    )
    assert "XRAY_KERNELS=cpu needs _cpu, which is not usable: not built" in wanted.stderr


def test_failed_load_is_reported_with_its_cause(tmp_path: Path) -> None:
    copy_package(tmp_path)
    (tmp_path / "xray_kernels" / "_cpu.abi3.so").write_bytes(b"not a library")
    code = "import sys; sys.path.insert(0, '.'); import xray_kernels._library as l; print(l.FAILED['_cpu'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "did not load, so the PyTorch reference is used instead" in done.stderr
    assert "_cpu.abi3.so" in done.stdout


def test_report_names_every_op() -> None:
    text = report()
    for name in _library.REFERENCES:
        assert f"\n{name} " in text


def test_import_is_lean_and_quick() -> None:
    """`import xray_kernels` adds under 0.3 s to `import torch` and brings no model or data package along."""
    code = (
        "import sys, time, torch; a = time.perf_counter(); import xray_kernels; b = time.perf_counter();"
        "brought = [m for m in ('PIL', 'av', 'pyarrow', 'triton', 'timm', 'xray') if m in sys.modules];"
        "print(b - a, *brought)"
    )
    runs = [python(code).stdout.split() for _ in range(3)]
    assert all(len(run) == 1 for run in runs), runs
    assert min(float(run[0]) for run in runs) < 0.3
