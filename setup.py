"""Builds the extensions of xray_kernels: _cpu and _cuda (op libraries, stable ABI) and _host (pybind11).

_cuda is built when it is asked for (XRAY_CUDA=1) or when PyTorch has CUDA and nvcc is there; XRAY_CUDA=0 leaves it out.
A machine with nvcc and a CPU build of PyTorch can build it too, which `CUDAExtension` can not: nvcc is found here, the
CUDA runtime is linked statically, and libtorch.so is named explicitly.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from torch.utils import cpp_extension


def find_cuda_home() -> str:
    """The CUDA toolkit: CUDA_HOME, else the one that nvcc on the PATH belongs to, else the usual place; or ""."""
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME", ""),
        str(Path(nvcc).resolve().parent.parent) if nvcc else "",
        "/usr/local/cuda",
    ]
    return next((home for home in candidates if home and Path(home, "include/cuda_runtime_api.h").exists()), "")


CUDA_HOME = find_cuda_home()
cpp_extension.CUDA_HOME = CUDA_HOME or None  # PyTorch looks for it only when PyTorch itself has CUDA
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

ARCHITECTURES = ("80", "90a", "100")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # runs on PyTorch 2.10 and later
COMMON = [
    "-O3",
    "-std=c++17",
    "-Wall",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",  # GCC 12 sees some in its own AVX-512 header
    "-fvisibility=hidden",
]
LINK = ["-Wl,--no-as-needed", "-ltorch"]
INCLUDE = str(Path(__file__).parent.resolve() / "csrc")


def wants_cuda() -> bool:
    """Whether _cuda is to be built; an explicit wish that cannot be met is an error."""
    asked = os.environ.get("XRAY_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"XRAY_CUDA is {asked!r}; it must be 1 (build _cuda), 0 (leave it out) or empty (where it can run)")
    if asked == "1" and not CUDA_HOME:
        sys.exit("XRAY_CUDA=1 needs a CUDA toolkit: nvcc on the PATH or CUDA_HOME set; neither leads to one")
    return asked == "1" or (asked == "" and torch.version.cuda is not None and bool(CUDA_HOME))


def cpu_library() -> cpp_extension.CppExtension:
    return cpp_extension.CppExtension(
        "xray_kernels._cpu",
        [
            "csrc/common/capability.cpp",
            "csrc/attention/cpu.cpp",
            "csrc/attention/cpu_class_row.cpp",
            "csrc/contrastive_loss/cpu.cpp",
            "csrc/token_reorganize/cpu.cpp",
            "csrc/token_reorganize/cpu_norm.cpp",
        ],
        include_dirs=[INCLUDE],
        py_limited_api=True,
        extra_compile_args={"cxx": [*COMMON, STABLE_ABI]},
        extra_link_args=LINK,
    )


def cuda_library() -> cpp_extension.CppExtension:
    # CppExtension with .cu sources: BuildExtension compiles them by nvcc, and links nothing of CUDA by itself
    generate = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    undo = ["-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_HALF2_OPERATORS__"]
    undo += ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
    return cpp_extension.CppExtension(
        "xray_kernels._cuda",
        [
            *(f"csrc/token_reorganize/{file}" for file in ("cuda_bindings.cpp", "cuda.cu", "cuda_backward.cu")),
            *(f"csrc/attention/{file}" for file in ("cuda_bindings.cpp", "cuda_class_row.cu")),
            *(
                f"csrc/contrastive_loss/{file}"
                for file in ("cuda_bindings.cpp", "cuda_gradient.cu", "cuda_sigmoid.cu", "cuda_statistics.cu")
            ),
        ],
        include_dirs=[INCLUDE, f"{CUDA_HOME}/include"],
        py_limited_api=True,
        extra_compile_args={
            "cxx": [*COMMON, STABLE_ABI, "-DUSE_CUDA"],
            "nvcc": ["-O3", "-std=c++17", "-Xptxas=-v", "-DUSE_CUDA", *undo, *generate],
        },
        library_dirs=[f"{CUDA_HOME}/lib64", f"{CUDA_HOME}/targets/x86_64-linux/lib"],
        extra_link_args=[*LINK, "-lcudart_static", "-ldl", "-lrt", "-lpthread"],
    )


def host_module(with_cuda: bool) -> Pybind11Extension:
    macros = []
    if with_cuda:
        printed = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True)
        version = re.search(r"release ([\d.]+)", printed.stdout)
        macros = [
            ("XRAY_CUDA_VERSION", f'"{version.group(1) if version else "unknown"}"'),
            ("XRAY_CUDA_ARCHITECTURES", f'"{", ".join(f"sm_{a}" for a in ARCHITECTURES)}"'),
        ]
    return Pybind11Extension(
        "xray_kernels._host", ["csrc/host.cpp"], include_dirs=[INCLUDE], define_macros=macros, cxx_std=17
    )


WITH_CUDA = wants_cuda()
setup(
    ext_modules=[cpu_library(), *([cuda_library()] if WITH_CUDA else []), host_module(WITH_CUDA)],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
