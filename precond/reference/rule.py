"""What the families share: what a rule is and needs, and a rule with each decay.

A formula ``(p, g, states, hyper, step, fresh) -> (step, states)`` returns a Step, what it takes from p, and the new states. It
leaves p alone: ``Rule.update`` applies the step and the rule's decay, for all rules. A formula with a decay is given its name as
the keyword ``decay``. One without a decay returns the new p itself in place of a step, or what has become of p.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .decays import stepped
from .step import Hyper, Moved, States, Step

Formula = Callable[[Tensor, Tensor, States, Hyper, int, bool], tuple[Step | Moved | Tensor, States]]


class Rule(NamedTuple):
    """A formula, and what it needs."""

    formula: Formula
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
    #: True where these are float64: sums, which float32 stops to add to.
    wide_scalars: bool = False
    #: From the hyper-parameters, the number of the step and the scalar state before it: that state after it.
    advance: Callable[[Hyper, int, float], float] | None = None
    #: A hyper-parameter that, unless it is 0, gives the first step a formula of its own.
    first_differs: str | None = None
    #: Which of decays.py.
    decay: str = ""

    def update(
        self, p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool
    ) -> tuple[Tensor, States]:
        """The new p and states: the one place where a decay is applied."""
        made, new_states = self.formula(p, g, states, hyper, step, fresh)
        if isinstance(made, Step):
            return stepped(p, made, hyper, self.decay), new_states
        return made.p if isinstance(made, Moved) else made, new_states


#: What a rule needs, without its formula: the fields of Rule after the first.
Needs = dict[str, Any]


NO_STATES: Needs = dict(states=())
MOMENTUM: Needs = dict(states=("momentum_buffer",))


def with_decay(formula: Callable[..., Any], decay: str, needs: Needs, **options: Any) -> Rule:
    """A rule with one decay."""
    return Rule(functools.partial(formula, decay=decay, **options), decay=decay, **needs)


def with_decays(
    name: str,
    formula: Callable[..., Any],
    needs: Needs,
    suffix: str = "",
    *,
    coupled: str | None = None,
    **options: Any,
) -> dict[str, Rule]:
    """A rule with each intrinsic decay and, under the name ``coupled``, with the penalty in the gradient."""
    names = {name: "l2", f"{name}_l1": "proximal", f"{name}_l1_subgradient": "subgradient"}
    if coupled is not None:
        names[coupled] = "coupled"
    return {f"{each}{suffix}": with_decay(formula, decay, needs, **options) for each, decay in names.items()}
