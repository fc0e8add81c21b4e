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
    def run(self) -> None:
        # An editable build's folder stays, so that the next one compiles only what changed. A wheel's is temporary.
        stays = self.editable_mode or self.inplace
        self.folder = ROOT / "build" / "editable" if stays else Path(self.build_temp).resolve()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cache = self.folder / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(self.folder)  # came along with a copy of another checkout
        # The cache remembers another Python, or tools of an isolated environment that is gone: all are named anew.
        configure = [
            tool("cmake"),
            "-S",
            str(ROOT),
            "-B",
            str(self.folder),
            "-G",
            "Ninja",
            "-UPython*",
            "-U_Python*",
            "-Upybind11*",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPRECOND_CUDA={os.environ.get('PRECOND_CUDA', 'AUTO')}",
            f"-DPRECOND_CUDA_ARCHS={os.environ.get('PRECOND_CUDA_ARCHS', ARCHS)}",
        ]
        quiet = subprocess.DEVNULL if self.verbose < 1 else None
        subprocess.run(configure, check=True, stdout=quiet)
        subprocess.run([tool("cmake"), "--build", str(self.folder), "--target", "_C"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process that has it loaded keeps the old one.
        staged = target.with_name(f"{target.name}.new")
        shutil.copyfile(self.folder / target.name, staged)
        staged.replace(target)


setup(ext_modules=[Extension("precond._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
