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


def build(name, *options, targets):
    """Configure build/name and build targets of it; workers of pytest-xdist that need the same build wait for each other."""
    directory = ROOT / "build" / name
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "lock"):
        configure = ["cmake", "-S", ROOT, "-B", directory, "-G", "Ninja"]
        run(*configure, f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}", *options)
        run("cmake", "--build", directory, "--target", *targets)
    return directory


def beside_the_extension(*targets):
    """Build targets in the folder of ``make build``, from the objects that are there. Returns the folder."""
    import pybind11

    # As setup.py: the cache may remember another Python.
    anew = "-UPython*", "-U_Python*", "-Upybind11*"
    where = f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"
    return build("editable", *anew, *where, targets=targets)


def sanitized(sanitizers, *targets, few=True):
    """Build targets with sanitizers, for few rules or all of them, which take minutes to compile. Returns the folder."""
    name = "sanitize_" + sanitizers.replace(",", "_") + ("" if few else "_all")
    options = {"PYTHON": "OFF", "CUDA": "OFF", "FEW_RULES": "ON" if few else "OFF", "SANITIZE": sanitizers}
    return build(name, *(f"-DPRECOND_{key}={value}" for key, value in options.items()), targets=targets)


def emulated_extension():
    """The path of the extension with the CUDA backend compiled for the CPU."""
    return beside_the_extension("module_on_host") / "tests" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
