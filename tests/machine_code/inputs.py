"""What kernels are given: ordinary numbers and nasty ones, gradients of 0, ragged chunks, misaligned views."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

GROUP = 64  # elements that share a scale
MOST_DIMS = 16  # kMaxDims
SPECIAL = [0, -0.0, 1e-40, -1e-42, 1e-30, 1e-20, 1e19, 3e38, -3e38, np.inf, -np.inf, np.nan]


class Input(NamedTuple):
    name: str
    count: int  # elements of the chunk
    begin: int = 0  # of the chunk in its tensor
    steps: int = 2
    offset: int = 0  # elements by which p is out of alignment
    clip: float = np.inf
    sign: float = 1.0
    skip: bool = False
    seed: int = 0
    place: tuple[int, int, int] = (1 << 33, 0, 0)  # of the tensor in the unsharded one: begin, row, row_step
    inactive: bool = False  # the tensor has no elements in this step, and its chunk begins where 32 bits overflow
    transposed: bool = False  # p and the gradient are, as they lie in memory; states are dense

    @property
    def numel(self) -> int:
        return self.begin + self.count

    @property
    def in_tables(self) -> tuple[int, int]:
        """What a kernel reads of the tensor's number of elements, and of where its chunk begins."""
        return (0, 3 << 30) if self.inactive else (self.numel, self.begin)

    def strides(self, operands: int) -> list[int]:
        """Of each operand: an index of ``layouts``, or -1."""
        return [0 if self.transposed and k < 2 else -1 for k in range(operands)]

    def layouts(self) -> np.ndarray:
        """One Strides of csrc/plan/layout.h: rows of 64 elements, which lie in columns."""
        table = np.zeros(1 + 2 * MOST_DIMS, np.int64)
        rows = self.numel // 64
        table[0], table[1:3], table[1 + MOST_DIMS : 3 + MOST_DIMS] = 2, (rows, 64), (1, rows)
        return table


def inputs_for(chunk: int, groups: bool, strided: bool, whole: bool) -> list[Input]:
    """For a kernel whose blocks take ``chunk`` elements. ``groups``: rows must not cut one. ``strided``: it takes any strides.
    ``whole``: it takes whole chunks of dense, aligned tensors alone. The instructions of the first are those that are counted.
    """
    # The second chunk, with rows of 1280 elements 1344 apart; the numbers of its runs overflow 32 bits on the way.
    tail = chunk * 5 // 8 + 1
    middle = chunk + tail // 3
    overflows = (3 << 35) - (middle // 1280 * 1344 + middle % 1280)
    found = [
        Input("random", chunk),
        Input("nasty", chunk, steps=3),
        Input("nasty, clipped", chunk, steps=1, clip=0.05),
        Input("zeros", chunk),
        Input("skipped", chunk, steps=1, skip=True),
        Input("inactive", chunk, steps=1, inactive=True),
        # The numbers of its runs overflow 32 bits on the way.
        Input("clipped", chunk, begin=chunk, clip=0.2, sign=-1.0, place=((1 << 35) - chunk * 3 // 2, 0, 0)),
    ]
    if whole:
        return found
    found += [
        Input("tail", tail, begin=chunk, clip=0.2, sign=-1.0, place=(overflows, 1280, 1344)),
        Input("misaligned, short rows", chunk // 5 + 1, offset=1, place=(7, 3 * GROUP, 200) if groups else (7, 52, 60)),
    ]
    return [*found, Input("transposed", chunk, transposed=True)] if strided else found


def values(given: Input, n: int, rng: np.random.Generator, of: str) -> np.ndarray:
    """Of p, of a gradient g, or of a state s."""
    x = rng.standard_normal(n)
    if of == "g":
        x = 0.0 * x if given.name == "zeros" else 0.1 * x * np.exp2(rng.integers(-6, 3, n))
    elif of == "s":
        x = 0.0 * x
    x = x.astype(np.float32)
    if given.name.startswith("nasty"):
        # Groups that are tiny or huge as a whole, in which no ordinary number hides what goes wrong with such ones.
        x *= np.repeat(rng.choice([1, 1, 1e-12, 1e-19, 1e-36, 1e15], n // GROUP).astype(np.float32), GROUP)
        # Special numbers: none in a group, few, many or all; and groups without a gradient.
        share = np.repeat(rng.choice([0, 0.01, 0.1, 1], n // GROUP, p=[0.5, 0.3, 0.1, 0.1]), GROUP)
        x = np.where(rng.random(n) < share, rng.choice(np.array(SPECIAL, np.float32), n), x)
        if of == "g":
            x[np.repeat(rng.random(n // GROUP) < 0.2, GROUP)] = 0
        elif of == "s":
            x = np.abs(x)
    return x


def stored(x: np.ndarray, format: str) -> np.ndarray:
    """Bits of fp32, bf16 or fp16."""
    if format.startswith("fp16"):
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if format == "fp32":
        return bits.copy()
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def where_different(a: np.ndarray, b: np.ndarray, format: str) -> np.ndarray:
    """Indices. Any NaN of fp32 is like any other, since GPUs and CPUs make different ones; with 16 bits there is one, torch's,
    but for stochastic rounding, remainders and scales.
    """
    different = a != b
    infinity = {"fp32": 0x7F800000, "bf16": 0x7F80, "fp16": 0x7C00}.get(format[:4])
    if infinity is not None and format not in ("bf16", "fp16"):
        magnitude = (1 << 8 * a.itemsize - 1) - 1
        different &= ~((a & magnitude > infinity) & (b & magnitude > infinity))
    return np.flatnonzero(different)
