"""Builds with CMake for tests, kept under build/: a second run compiles only what changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]


def run(*command, **kwargs):
    """Run a command; fail with its output if it does."""
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def build(name, *options, target="all"):
    """Configure and build in build/name; workers of pytest-xdist that need the same build wait for each other."""
    directory = ROOT / "build" / name
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "lock"):
        configure = ["cmake", "-S", ROOT, "-B", directory, "-G", "Ninja"]
        run(*configure, f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}", *options)
        run("cmake", "--build", directory, "--target", target)
    return directory


def emulated_extension():
    """The path of the extension with the CUDA backend compiled for the CPU."""
    import pybind11

    directory = build(
        "cuda_on_host",
        "-DPRECOND_CUDA_ON_HOST=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        target="_C",
    )
    return directory / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
