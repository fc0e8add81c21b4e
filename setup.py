"""Builds precond._C with CMake; all other metadata is in pyproject.toml. Needs no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Compute capabilities of a wheel; a developer's build names one in PRECOND_CUDA_ARCHS.
ARCHS = "80;86;89;90;100;120"
ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """A build tool, first from beside the interpreter: a virtual environment need not be on PATH."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        sys.exit(f"precond: {name} is needed to build the extension and was not found on PATH")
    return path


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        # A second isolated build finds a cache that remembers tools of the first, deleted environment: name them all anew.
        configure = [
            tool("cmake"),
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPRECOND_CUDA={os.environ.get('PRECOND_CUDA', 'AUTO')}",
            f"-DPRECOND_CUDA_ARCHS={os.environ.get('PRECOND_CUDA_ARCHS', ARCHS)}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build), "--target", "_C"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / target.name, target)


setup(ext_modules=[Extension("precond._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
