"""What the kernels of tests/machine_code execute, and the speed that follows for a GPU. ``python -m bench codegen`` prints it.

Predicted is a ceiling. Memory moves all bytes at the speed of a device copy; every scheduler issues an instruction in every
clock; and loads come back after a latency, with as many on the way as a multiprocessor ever has. The longest of the three counts.
Dependent instructions and launches are left out.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from machine_code import build
from machine_code.harness import Harness, Result
from machine_code.launch import threads_of
from machine_code.listed import CASES, Case
from tqdm import tqdm

LANES = 32


class Gpu(NamedTuple):
    clock: float  # per second, boosted
    copy: float  # bytes per second that a device copy reads and writes
    latency: float = 700e-9  # seconds of a load from memory: 23 KB in flight per multiprocessor make 4.3 TB/s
    multiprocessors: int = 132
    schedulers: int = 4  # of a multiprocessor
    special: int = 16  # special-function operations of a multiprocessor in a clock
    registers: int = 65536  # of a multiprocessor, as are those below
    threads: int = 2048
    blocks: int = 32

    # Picoseconds per element.

    def issue_ps(self, instructions: float) -> float:
        """``instructions``: of warps, for 32 elements."""
        return 1e12 * instructions / LANES / (self.multiprocessors * self.schedulers * self.clock)

    def special_ps(self, operations: float) -> float:
        return 1e12 * operations / (self.multiprocessors * self.special * self.clock)

    def memory_ps(self, moved: float) -> float:
        return 1e12 * moved / self.copy

    def latency_ps(self, read: float, in_flight: float) -> float:
        """``in_flight``: bytes of loads per multiprocessor."""
        return 1e12 * read * self.latency / (self.multiprocessors * in_flight)

    def resident_threads(self, registers: int, block: int) -> int:
        """Of a multiprocessor. Registers are given to a warp in pieces of 256, 8 for each thread."""
        by_registers = self.registers // (-(-registers // 8) * 8 * block)
        return block * min(by_registers, self.threads // block, self.blocks)


# Copies: of an H200 4.265e12 was measured (bench/NOTES.md, entry 13); of an H100 an estimate.
GPUS = {"H100": Gpu(clock=1.755e9, copy=3.0e12), "H200": Gpu(clock=1.98e9, copy=4.3e12)}


def executed_kernels() -> list[dict[str, object]]:
    """One row per kernel of listed.py. CUDA's are left out where nvcc is missing."""
    cases = [case for case in CASES.values() if case.triton or shutil.which("nvcc")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kernels = build.kernels(cases, folder)
        harness = Harness(build.cpu_text(folder), build.fp(folder))
        return [executed(case, kernels[case.title], harness) for case in tqdm(cases, desc="executed", leave=False)]


def executed(case: Case, built: build.Built, harness: Harness) -> dict[str, object]:
    result = harness.run(case, built, harness.inputs(case, built)[0])
    if result.differences:
        raise RuntimeError(f"{case.title} has other bits than the CPU: {result.differences[0]}")
    return predicted(case, built, result, *harness.cpu_text.traffic(case.formats))


def predicted(case: Case, built: build.Built, result: Result, read: float, written: float) -> dict[str, object]:
    """What a kernel executed, and the speed that follows. ``read``, ``written``: bytes per element."""
    registers = built.kernel.registers
    row = {
        "kernel": case.title,
        "instructions_per_element": result.instructions,
        "registers": registers,
        "spilled": built.kernel.spills,
        "bytes_per_element": read + written,
        "predicted": {},
    }
    for name, gpu in GPUS.items():
        row["bytes_in_flight_per_sm"] = result.in_flight * gpu.resident_threads(registers, threads_of(built))
        times = {
            "memory": gpu.memory_ps(read + written),
            "issue": gpu.issue_ps(result.instructions),
            "latency": gpu.latency_ps(read, row["bytes_in_flight_per_sm"]),
        }
        bound = max(times, key=times.get)
        percent = {"percent_of_copy": 100 * times["memory"] / times[bound], "bound": bound}
        row["predicted"][name] = percent | {f"{what}_ps": time for what, time in times.items()}
    return row


def print_executed(rows: list[dict]) -> None:
    head = "".join(f" percent of copy, {name} (predicted, bound by) |" for name in GPUS)
    print("\n| kernel, executed | instructions per element | registers | bytes spilled | KB in flight per SM |" + head)
    print("|---|---|---|---|---|" + "---|" * len(GPUS))
    for row in rows:
        speed = "".join(f" {x['percent_of_copy']:.0f}, {x['bound']} |" for x in row["predicted"].values())
        print(
            f"| {row['kernel']} | {row['instructions_per_element']:.1f} | {row['registers']} | {row['spilled']} | "
            f"{row['bytes_in_flight_per_sm'] / 1024:.0f} |{speed}"
        )
    if all(CASES[row["kernel"]].triton for row in rows):
        print("CUDA kernels are not executed: no nvcc on PATH")
