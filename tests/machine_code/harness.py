"""Executes one block of a kernel on several inputs, and compares all memory with what the CPU text makes of the same."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .block import WARP
from .build import Built
from .cpu_text import CpuText
from .emulator import Emulator
from .inputs import Input, inputs_for, stored, values, where_different
from .launch import BASE, chunk_of, launch, threads_of
from .listed import Case

GRAD_COEF = 0.7


@dataclass
class Result:
    """Of one input."""

    differences: list[str]  # none: equal bits after every step, and nothing written elsewhere
    instructions: float  # executed per element in the last step: warp instructions for 32 of them
    in_flight: float  # the most bytes of operands that a thread has asked for and not yet waited for


def same(row: np.ndarray) -> np.ndarray:
    return row


class Harness:
    def __init__(self, cpu_text: CpuText, fp: ctypes.CDLL) -> None:
        self.cpu_text, self.fp = cpu_text, fp

    def run(self, case: Case, built: Built, given: Input, spoil: Callable[[np.ndarray], np.ndarray] = same) -> Result:
        """``spoil`` changes the scalars that the kernel is given, and not those of the CPU text."""
        rng, machine = np.random.default_rng(given.seed), Emulator(built.kernel, self.fp)
        differences = []
        operands = [
            self.cpu_text.operand(format, values(given, given.numel, rng, of), rng)
            for format, of in zip(case.formats, "pgsss", strict=False)
        ]
        for step in range(1, given.steps + 1):
            operands[1].data = stored(values(given, given.numel, rng, "g"), case.formats[1])
            row = self.cpu_text.scalars(case.rule, step, rng.integers(0, 2**32, 2).astype(np.uint32))
            at = launch(built, operands, given, GRAD_COEF, spoil(row.copy()))
            before = at.memory.bytes.copy()
            machine.run(threads_of(built), 1, at.parameters, at.memory.bytes, BASE, (BASE, at.operands_end))
            self.cpu_text.update(case.rule, operands, given, GRAD_COEF, row)
            for name, operand, (data, beside) in zip("pgmvw", operands, at.addresses, strict=False):
                parts = {
                    "codes" if operand.coded else "values": (
                        data,
                        operand.data,
                        "" if operand.coded else operand.format,
                    ),
                    "scales" if operand.coded else "remainders": (beside, operand.beside, "bf16" * operand.coded),
                }
                for what, (address, expected, format) in parts.items():
                    got = at.memory.take(address, expected)
                    wrong = where_different(got, expected, format)
                    if len(wrong):
                        first = f"first [{wrong[0]}]: {got[wrong[0]]:#x}, not {expected[wrong[0]]:#x}"
                        differences.append(f"{given.name}, step {step}: {len(wrong)} {what} of {name} differ, {first}")
            if (at.memory.bytes != before)[at.memory.free].any():
                differences.append(f"{given.name}, step {step}: written where no operand is")
        return Result(differences, machine.executed.total() * WARP / given.count, machine.in_flight)

    def inputs(self, case: Case, built: Built) -> list[Input]:
        return inputs_for(chunk_of(built), case.groups, "Strides" in built.kernel.parameters, case.whole)
