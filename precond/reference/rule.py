"""What the families share: what a rule is and needs, and a rule with each decay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

States = tuple[Tensor, ...]
Number = float | Tensor
Hyper = Mapping[str, Number]
Update = Callable[[Tensor, Tensor, States, Hyper, int, bool], tuple[Tensor, States]]


class Rule(NamedTuple):
    """A formula, and what it needs."""

    update: Update
    #: torch's names of the states that it updates, in the order of its arguments.
    states: tuple[str, ...]
    #: Those of them that are a mean or a sum of squares, or else divide and are never negative: the ones that a short format
    #: harms, and whose codes have no sign.
    second_moments: tuple[str, ...] = ()
    #: False where they are of a gradient's own size, which float16 has room for.
    squares: bool = True
    #: How much of its second moments a step keeps: a hyper-parameter, or a number.
    keeps: str | float = 0.0
    #: True where the formula reads the number of the step: then every parameter has a counter.
    reads_step: bool = False
    #: True where the formula does not, but torch's class has one all the same.
    counts_steps: bool = False
    #: States of one number, at most one, with their initial value. ``hyper`` has the one after this step under its name.
    scalars: Mapping[str, float] = {}
    #: From the hyper-parameters, the number of the step and the scalar state before it: that state after it.
    advance: Callable[[Hyper, int, float], float] | None = None
    #: A hyper-parameter that, unless it is 0, gives the first step a formula of its own.
    first_differs: str | None = None


#: What a rule needs, without its formula: the fields of Rule after the first.
Needs = dict[str, Any]


NO_STATES: Needs = dict(states=())
MOMENTUM: Needs = dict(states=("momentum_buffer",))


def with_decays(
    name: str, update: Callable[..., Any], needs: Needs, suffix: str = "", *, coupled: str | None = None, **options: Any
) -> dict[str, Rule]:
    """A rule with each intrinsic decay and, under the name ``coupled``, with the penalty in the gradient."""
    names = {name: "l2", f"{name}_l1": "proximal", f"{name}_l1_subgradient": "subgradient"}
    if coupled is not None:
        names[coupled] = "coupled"
    return {
        f"{each}{suffix}": Rule(functools.partial(update, decay=decay, **options), **needs)
        for each, decay in names.items()
    }
