"""The core on arm64, from any machine: cross-compiled, run by qemu, its bits against this machine's, its loops in NEON."""

from __future__ import annotations

import re
import shutil

import pytest
from support.builds import ROOT, beside_the_extension, build, run

from precond import _C

MISSING = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.source,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"{' and '.join(MISSING)} not installed: apt-get install g++-aarch64-linux-gnu qemu-user",
    ),
]

QEMU = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
BRANCH = re.compile(r"b|b\..+|bl|blr|br|ret|cbn?z|tbn?z")
#: What an instruction does, scalar or vector.
KIND = {
    **dict.fromkeys(("fmadd", "fmsub", "fnmadd", "fnmsub", "fmla", "fmls"), "fma"),
    "fdiv": "division",
    "fsqrt": "square root",
}


@pytest.fixture(scope="module")
def arm64():
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'tests' / 'cpp' / 'arm64.cmake'}"
    return build("arm64", toolchain, "-DPRECOND_PYTHON=OFF", "-DPRECOND_CUDA=OFF", targets=("core_tests", "same_bits"))


def test_the_core_passes_its_tests_on_arm64(arm64):
    assert run(*QEMU, arm64 / "tests" / "core_tests").endswith("all passed\n")


def test_every_rule_gives_the_same_bits_on_x86_and_arm64(arm64):
    """NaN, infinities and denormals included, and whether or not the caller flushes denormals."""
    hashes: dict[tuple[str, str], dict[str, str]] = {}
    for machine, command in (("here", ()), ("arm64", QEMU)):
        directory = arm64 if command else beside_the_extension("same_bits")
        for line in run(*command, directory / "tests" / "same_bits").splitlines():
            rule, mix, isa, digest = line.split()
            hashes.setdefault((rule, mix), {})[f"{isa} {machine}"] = digest
    assert len(hashes) == 14 * 3 * len(_C.rules)  # alone, with masks, with an average
    for case, by_machine in hashes.items():
        assert {"baseline here", "baseline arm64", "baseline+flush arm64"} <= by_machine.keys()
        assert len(set(by_machine.values())) == 1, (case, by_machine)


def functions(object_file):
    """The functions of an object file by name, each a list of (address, mnemonic, operands)."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    listing = run("aarch64-linux-gnu-objdump", "-d", "--demangle", "--no-show-raw-insn", object_file)
    for line in listing.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            code = found[header[1]] = []
        elif instruction := re.fullmatch(r"\s*([0-9a-f]+):\t(\S+)\s*(.*)", line):
            code.append((int(instruction[1], 16), instruction[2], instruction[3]))
    return found


def loops(code):
    """The bodies of loops without a branch inside: what a vectorised loop over elements is."""
    position = {address: i for i, (address, _, _) in enumerate(code)}
    for end, (_, mnemonic, operands) in enumerate(code):
        target = BRANCH.fullmatch(mnemonic) and re.search(r"([0-9a-f]+) <", operands)
        start = position.get(int(target[1], 16), end) if target else end
        if start < end and not any(BRANCH.fullmatch(other) for _, other, _ in code[start:end]):
            yield code[start:end]


def arithmetic(code, *, vector):
    return [KIND[mnemonic] for _, mnemonic, operands in code if mnemonic in KIND and (".4s" in operands) == vector]


def kinds(code, *, vector):
    return set(arithmetic(code, vector=vector))


def test_every_rule_is_vectorised_with_neon(arm64):
    """fma is in arm64's base, so `baseline` has it. The scalar remainder of a loop shows which kinds a rule needs."""
    updates = {
        name: code
        for path in arm64.glob("CMakeFiles/isa_*.dir/csrc/cpu/family_isa.cpp.o")
        for name, code in functions(path).items()
        if "update_chunk<" in name
    }
    assert len(updates) == 3 * len(_C.rules)
    for name, code in updates.items():
        needed = kinds(code, vector=False)
        assert needed, name
        bodies = [body for body in loops(code) if kinds(body, vector=True)]
        # Nothing of an element alone; of a group of 64 elements the scales of its states.
        assert all(len(arithmetic(body, vector=False)) <= 3 for body in bodies), name
        # A loop may have a part of a rule: a branch of it that holds for all elements, or states before steps.
        whole = [body for body in bodies if kinds(body, vector=True) >= needed]
        # Dense bf16, which moves 16-bit lanes; dense fp32; and fp32 tiles.
        bf16 = [any(re.search(r"\.[48]h", operands) for _, _, operands in body) for body in whole]
        assert bf16.count(True) >= 1 or "WithParts<" in name, name
        assert bf16.count(False) >= 2, name


def test_no_rule_calls_the_math_library_on_arm64(arm64):
    paths = list(arm64.glob("CMakeFiles/isa_*.dir/csrc/cpu/*.o"))
    assert len(paths) > 1
    for path in paths:
        lines = run("aarch64-linux-gnu-nm", "--undefined-only", "--demangle", path).splitlines()
        called = {line.split(maxsplit=1)[1] for line in lines}
        # The functions of tiles, of the same instruction set.
        assert {name for name in called if not name.startswith("precond::")} <= {"memcpy", "memmove", "memset"}, path
