"""What a formula is given, and the step that it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

States = tuple[Tensor, ...]
Number = float | Tensor
Hyper = Mapping[str, Number]


class Step(NamedTuple):
    """What a formula takes from p, and what a decay asks it besides."""

    #: Rate times direction.
    taken: Tensor
    #: The rate of decays, which Adagrad makes smaller with every step.
    lr: Number
    #: 1 / P^2 and the statistic behind it, for a threshold; None where den = 1.
    den: Tensor | None = None
    v: Tensor | None = None


class Moved(NamedTuple):
    """What a formula with parts returns, and one without a decay may: p after the step, and what it lacks of the old one."""

    p: Tensor
    taken: Tensor
