"""Builds what is executed, and the C libraries beside it, into a folder."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from . import sass
from .cpu_text import CpuText
from .listed import KERNELS, Case

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# As CMakeLists.txt compiles, for one architecture.
NVCC = (
    "nvcc -std=c++17 -O3 -fmad=false --extended-lambda --expt-relaxed-constexpr -Xcompiler=-ffp-contract=off "
    "-gencode arch=compute_90,code=sm_90 -cubin"
)


class Built(NamedTuple):
    kernel: sass.Kernel
    layout: dict[str, Any]  # Triton: what triton_cubins.py says of the launch. CUDA: nothing


def run(command: list[str], **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def cuda_kernels(cases: list[Case], folder: Path) -> dict[str, Built]:
    """By title."""
    titles = {case.title for case in cases}
    found = ((line, re.match(r'CASE\("(.*?)"', line)) for line in KERNELS.read_text().splitlines())
    copy, cubin = folder / KERNELS.name, folder / "kernels.cubin"
    copy.write_text("".join(line + "\n" for line, case in found if case is None or case[1] in titles))
    run([*NVCC.split(), "-I", str(ROOT / "csrc"), "-o", str(cubin), str(copy)])
    kernels = sass.read(cubin)
    return {case.title: Built(kernels[case.kernel], {}) for case in cases}


def triton_kernels(cases: list[Case], folder: Path) -> dict[str, Built]:
    """By title. Compiled by a process of its own: Triton compiles only where its interpreter was never asked for."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    titles = [case.title for case in cases]
    command = [sys.executable, "-m", "machine_code.triton_cubins", str(folder), *titles]
    run(command, env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"})
    found = {}
    for k, title in enumerate(titles):
        (kernel,) = sass.read(folder / f"triton_{k}.cubin").values()
        found[title] = Built(kernel, json.loads((folder / f"triton_{k}.json").read_text()))
    return found


def kernels(cases: list[Case], folder: Path) -> dict[str, Built]:
    cuda, triton = [case for case in cases if not case.triton], [case for case in cases if case.triton]
    return (cuda_kernels(cuda, folder) if cuda else {}) | (triton_kernels(triton, folder) if triton else {})


def library(name: str, folder: Path, *flags: str) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    path = folder / f"{name}.so"
    run([*compiler.split(), "-ffp-contract=off", "-fPIC", "-shared", *flags, str(HERE / name), "-o", str(path)])
    return ctypes.CDLL(str(path))


def cpu_text(folder: Path) -> CpuText:
    # It updates a chunk, and at -O2 takes the compiler 20 s more.
    return CpuText(library("cpu_text.cpp", folder, "-O0", "-std=c++17", "-I", str(ROOT / "csrc")))


def fp(folder: Path) -> ctypes.CDLL:
    return library("fp.c", folder, "-O2", "-x", "c", "-frounding-math")
