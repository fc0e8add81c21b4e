"""What a step finds out about a tensor: sums over its elements, csrc/plan/statistics.h. Here they are added in any order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Of a tensor's elements, in this order: g as its rule takes it, p before the step, u what p lacks after the step before it is
#: rounded, a what it lacks as it is stored.
SUMS = (
    "grad_squares",
    "param_squares",
    "update_squares",
    "update_grad",  # u g
    "update_arrived",  # u a
    "nonfinite",  # of g
    "lost",  # u is not 0, and a is
    "largest_update",  # the one that is no sum
    "elements",
)


class Seen(NamedTuple):
    """What the statistics of a step are made of, beside p as it is stored after it."""

    g: Tensor
    before: Tensor
    update: Tensor


def sums_of(seen: Seen, after: Tensor) -> Tensor:
    """The numbers that SUMS names, in float64."""
    g, before, update = (t.double() for t in seen)
    arrived = before - after.double()
    largest = update.abs().amax() if update.numel() else update.new_zeros(())
    numbers = [
        (g * g).sum(),
        (before * before).sum(),
        (update * update).sum(),
        (update * g).sum(),
        (update * arrived).sum(),
        (~g.isfinite()).sum(),
        ((update != 0) & (after == seen.before)).sum(),
        largest,
        largest.new_full((), update.numel()),
    ]
    return torch.stack([number.double() for number in numbers])
