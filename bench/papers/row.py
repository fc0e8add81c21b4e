"""What the instances share: a row of a table, and random numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

F64 = torch.float64
Make = Callable[[list[Any]], torch.optim.Optimizer]


@dataclasses.dataclass
class Row:
    """One number: what is expected (docs/theory.md), what we measured, and how far apart they may be.

    ``tolerance``: a relative one; ``factor``: both ways; ``at_most`` or ``at_least``: bounds of what is measured. Without any of
    them the row is for information. ``known``: where the expected number does not come out and ``reason`` says why, what does,
    within 10 %: such a row is out of tolerance, and fails only where it changes.
    """

    table: str
    name: str
    expected: float | str
    measured: float
    tolerance: float | None = None
    factor: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    known: float | None = None
    reason: str = ""

    @property
    def rule(self) -> str:
        """The tolerance in words."""
        words = []
        if self.tolerance is not None:
            words.append(f"+-{100 * self.tolerance:g} %")
        if self.factor is not None:
            words.append(f"x{self.factor:g}")
        if self.at_least is not None:
            words.append(f">= {self.at_least:g}")
        if self.at_most is not None:
            words.append(f"<= {self.at_most:g}")
        return ", ".join(words)

    @property
    def within(self) -> bool | None:
        """Whether the tolerance holds; None without one."""
        if not self.rule:
            return None
        if not math.isfinite(self.measured):
            return False
        return not (
            (self.tolerance is not None and not abs(self.measured - self.expected) <= self.tolerance * self.expected)
            or (self.factor is not None and not 1 / self.factor <= self.measured / self.expected <= self.factor)
            or (self.at_most is not None and not self.measured <= self.at_most)
            or (self.at_least is not None and not self.measured >= self.at_least)
        )

    @property
    def fails(self) -> bool:
        """Out of its tolerance, and not as it is known to be."""
        known = self.known is not None and abs(self.measured - self.known) <= 0.1 * self.known
        return self.within is False and not known

    @property
    def verdict(self) -> str:
        if self.within is None:
            return ""
        return "yes" if self.within else "NO" if self.fails else "no, known"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def powers(first: int, last: int) -> list[float]:
    """2^(i / 2)."""
    return [2.0 ** (i / 2) for i in range(first, last + 1)]
