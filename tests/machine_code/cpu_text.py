"""cpu_text.cpp from Python: operands in csrc's formats, the scalars of a step, and the update itself."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from .floats import pointer
from .inputs import GROUP, Input, stored


@dataclass
class Operand:
    """p, the gradient or a state in memory, and what lies beside it: remainders, or scales of codes."""

    format: str
    number: int  # of the format
    coded: bool
    data: np.ndarray
    beside: np.ndarray

    @property
    def draws(self) -> bool:
        return self.coded or "stochastic" in self.format or "split24" in self.format


class CpuText:
    def __init__(self, csrc: ctypes.CDLL) -> None:
        self.csrc = csrc

    def number(self, format: str) -> int:
        number = self.csrc.format_number(format.encode())
        if number < 0:
            raise ValueError(f"csrc has no format {format}")
        return number

    def operand(self, format: str, values: np.ndarray, rng: np.random.Generator) -> Operand:
        """Codes start as 0, as they do in training; remainders as anything."""
        number, n = self.number(format), len(values)
        if self.csrc.has_scales(number):
            codes = np.zeros((n * self.csrc.bits_of_item(number) + 7) // 8, np.uint8)
            return Operand(format, number, True, codes, np.zeros((n + GROUP - 1) // GROUP, np.uint16))
        beside = rng.integers(0, 256, n * self.csrc.bits_of_remainder(number) // 8).astype(np.uint8)
        return Operand(format, number, False, stored(values, format), beside)

    def traffic(self, formats: tuple[str, ...]) -> tuple[float, float]:
        """Bytes read and written per element and step: p and states are read and written, the gradient is read."""
        sizes = []
        for format in formats:
            number = self.number(format)
            scale = 16 / GROUP if self.csrc.has_scales(number) else 0
            sizes.append((self.csrc.bits_of_item(number) + self.csrc.bits_of_remainder(number) + scale) / 8)
        return sum(sizes), sum(sizes) - sizes[1]

    def scalars(self, rule: str, step: int, seed: np.ndarray) -> np.ndarray:
        row = np.zeros(self.csrc.scalar_floats(), np.float32)
        if not self.csrc.fill_scalars(rule.encode(), ctypes.c_double(step), pointer(seed), pointer(row)):
            raise ValueError(f"cpu_text.cpp does not list the rule {rule}")
        return row

    def update(self, rule: str, operands: list[Operand], given: Input, grad_coef: float, row: np.ndarray) -> None:
        """In place."""
        self.csrc.update(
            rule.encode(),
            len(operands),
            (ctypes.c_void_p * len(operands))(*(operand.data.ctypes.data for operand in operands)),
            (ctypes.c_void_p * len(operands))(*(operand.beside.ctypes.data for operand in operands)),
            (ctypes.c_int32 * len(operands))(*(operand.number for operand in operands)),
            (ctypes.c_int32 * len(operands))(*given.strides(len(operands))),
            pointer(given.layouts()),
            ctypes.c_int64(given.numel),
            ctypes.c_int64(given.begin),
            ctypes.c_int64(given.count),
            (ctypes.c_int64 * 3)(*given.place),
            int(any(operand.draws for operand in operands)),
            ctypes.c_float(given.sign),
            pointer(np.array([grad_coef, given.skip or given.inactive, given.clip], np.float32)),
            pointer(row),
        )
