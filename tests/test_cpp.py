"""The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, and what the objects export."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.source


def run(*command, **kwargs):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Sanitized build of the core and its tests; kept under build/, so that a second run compiles only what changed."""
    directory = ROOT / "build" / "sanitize"
    run(
        "cmake", "-S", ROOT, "-B", directory, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
        "-DPRECOND_PYTHON=OFF", "-DPRECOND_TESTS=ON", "-DPRECOND_SANITIZE=address,undefined", "-DPRECOND_CUDA=OFF",
    )  # fmt: skip
    run("cmake", "--build", directory)
    return directory


def test_the_core_passes_its_tests_under_sanitizers(build):
    output = run(build / "core_tests", env={"OMP_NUM_THREADS": "4", "ASAN_OPTIONS": "detect_leaks=1"})
    assert output.endswith("all passed\n")
    assert output.count("passed ") == 11


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm lists the symbols")
def test_instruction_sets_share_no_symbol(build):
    """A weak symbol common to two of them would let the linker run AVX-512 code on an old CPU."""
    seen: dict[str, Path] = {}
    objects = sorted(build.glob("CMakeFiles/isa_*.dir/csrc/*.o"))
    assert len(objects) >= 1
    for path in objects:
        for line in run("nm", "--demangle", "--defined-only", path).splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            if kind in "WVu" and "precond" in name:
                assert seen.setdefault(name, path) == path, f"{name} is in {path} and {seen[name]}"
