"""The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, and what the objects export."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess

import pytest
from support import builds
from support.builds import ROOT, run

from precond import _C

pytestmark = pytest.mark.source


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.large)], ids=["few rules", "all rules"])
def test_the_core_passes_its_tests_under_sanitizers(few):
    program = builds.sanitized("address,undefined", "core_tests", few=few) / "tests" / "core_tests"
    output = run(program, *[] if few else ["thorough"], env={"OMP_NUM_THREADS": "4", "ASAN_OPTIONS": "detect_leaks=1"})
    assert output.endswith("all passed\n")
    source = (ROOT / "tests" / "cpp" / "core_tests.cpp").read_text()
    assert output.count("passed ") == source.count("  RUN(")


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm lists the symbols")
@pytest.mark.parametrize(
    "build",
    [builds.beside_the_extension, functools.partial(builds.sanitized, "address,undefined")],
    ids=["as shipped", "little inlined"],
)
def test_instruction_sets_share_no_symbol(build):
    """A weak symbol common to two of them would let the linker run AVX-512 code on an old CPU."""
    seen: dict[str, str] = {}
    directory = build("core")
    objects = sorted(directory.glob("CMakeFiles/isa_*.dir/csrc/cpu/*.o"))
    assert len(objects) >= 1
    for path in objects:
        isa = path.relative_to(directory / "CMakeFiles").parts[0].split("_")[1].removesuffix(".dir")
        for line in run("nm", "--demangle", "--defined-only", path).splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            if kind in "WVu" and "precond" in name:
                assert seen.setdefault(name, isa) == isa, f"{name} is in {isa} and {seen[name]}"


@pytest.mark.parametrize(
    ("mode", "ok", "message"),
    [
        ("AUTO", True, "precond: CUDA kernels: none, no working nvcc was found"),
        ("OFF", True, "precond: CUDA kernels: none, PRECOND_CUDA=OFF"),
        ("ON", False, "precond: PRECOND_CUDA=ON, and no working nvcc was found"),
    ],
)
def test_a_build_without_a_working_nvcc_says_so(mode, ok, message, tmp_path):
    """CUDACXX names a compiler that fails, as a broken installation would."""
    command = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
               "-DPRECOND_PYTHON=OFF", f"-DPRECOND_CUDA={mode}"]  # fmt: skip
    env = {**os.environ, "CUDACXX": "/bin/false"}
    result = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == ok, result.stdout + result.stderr
    assert message in result.stdout + result.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="arm64's loops are in test_arm64.py")
def test_every_rule_is_vectorised():
    """With its parts too, each in its loops over dense memory and over tiles."""
    arithmetic = re.compile(r"\tv(?:fn?m(?:add|sub)\d+|mul|add|sub|div|sqrt)ps .*%[yz]mm")
    found = {}
    for path in builds.beside_the_extension("core").glob("CMakeFiles/isa_avx2_*.dir/csrc/cpu/family_isa.cpp.o"):
        listing = run("objdump", "-d", "--demangle", "--no-show-raw-insn", path)
        for name, code in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE):
            if "update_chunk<" in name and name.endswith("(precond::ChunkArgs const&)"):
                found[name] = len(arithmetic.findall(code))
    assert len(found) == 3 * len(_C.rules)
    # A rule alone has loops for fp32, bf16, fp16 and tiles, one with parts for fp32 and tiles, with more to do.
    assert [name for name, count in found.items() if count < 4] == []
