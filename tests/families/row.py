"""One row of the table of optimizers; a file beside this one has the rows of each family."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from precond import reference


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A rule, the class and arguments that run it, and what it is compared with."""

    rule: str
    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]
    #: torch's class with the same arguments, states and, within float32 rounding, steps; None where torch has none.
    peer: type[torch.optim.Optimizer] | None
    #: Tolerance of a step against the float64 reference, for p and then for each state, in fp32 ulp of the operands.
    ulps: tuple[float, ...]
    #: The rule has a jump or a cancellation: the results of operands a few ulp away are right too.
    steep: bool = False
    #: Relative difference allowed between the float64 reference and ``peer`` after 20 steps in float64.
    peer_rtol: float = 1e-13
    #: Steps at least until each case of the formula was met: where they are more than a test takes, it takes as many.
    steps: int = 0

    def __str__(self) -> str:
        return self.rule

    @property
    def counts_steps(self) -> bool:
        """True where every parameter has a step counter."""
        rule = reference.RULES[self.rule]
        return rule.reads_step or rule.counts_steps


def intrinsic(name, cls, kwargs, ulps, suffix="", steep=False, peer=None, steps=0, **l1) -> list[Optimizer]:
    """A rule with each intrinsic decay: L2, proximal L1 and the subgradient of L1. Only the one with L2 may have a peer."""
    forms = {"": {}, "_l1": l1, "_l1_subgradient": l1 | {"l1_form": "subgradient"}}
    return [
        Optimizer(f"{name}{infix}{suffix}", cls, kwargs | options, None if infix else peer, ulps, steep, steps=steps)
        for infix, options in forms.items()
    ]
