"""Parts that ride along with a rule, whatever it is: what needs just p, g and the states, and so no pass of its own. A rule with
parts is a rule; its name says which, as "adamw+ema".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from .decays import decayed_gradient, stepped, taken_from
from .rule import Rule
from .step import Hyper, Moved, States, Step

R = TypeVar("R")


class Composed(dict[str, R]):
    """Rules by their names. Those with parts are made when they are asked for, and are not counted among them."""

    def __init__(self, parts: Mapping[str, Callable[[R], R]]) -> None:
        super().__init__()
        self._parts = parts
        self._made: dict[str, R] = {}

    def __missing__(self, name: str) -> R:
        if name not in self._made:
            rule, _, part = name.rpartition("+")
            if rule not in self or part not in self._parts:
                raise KeyError(name)
            self._made[name] = self._parts[part](self[rule])
        return self._made[name]


def weight_in_average(hyper: Hyper, step: int) -> float:
    """Of the new p. Up to step ``ema_start`` + 1 the average is p itself; ``ema_decay`` < 0: then the mean of all p since."""
    averaged = step - float(hyper["ema_start"])
    if not averaged > 1:
        return 1.0
    return 1.0 / averaged if hyper["ema_decay"] < 0 else 1.0 - float(hyper["ema_decay"])


def moved(p: Tensor, g: Tensor, step: Step, hyper: Hyper, decay: str) -> Moved:
    """The new p: no update where it does not go down the gradient, no decay where the update goes the other way; updates are
    multiplied with ``factor`` (precond/_core/statistics.py).
    """
    update = step.taken
    if hyper["cautious_update"]:
        d = decayed_gradient(p, g, hyper, decay)
        idle = ((update > 0) & (d <= 0)) | ((update < 0) & (d >= 0))
        update = torch.where(idle, torch.zeros_like(update), update)
    update = update * hyper.get("factor", 1.0)
    step = step._replace(taken=update)
    new_p, taken = stepped(p, step, hyper, decay), taken_from(p, step, hyper, decay)
    if hyper["cautious_decay"]:
        against = ((p > 0) & (update < 0)) | ((p < 0) & (update > 0))
        new_p, taken = torch.where(against, p - update, new_p), torch.where(against, update, taken)
    return Moved(new_p, taken)


def formula_with_parts(
    rule: Rule, averages: bool, p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool
) -> tuple[Moved, States]:
    """A rule with masks; and then, of an average, ema = ema + w (p - ema)."""
    made, new = rule.formula(p, g, states[:-1] if averages else states, hyper, step, fresh)
    if isinstance(made, Step):
        made = moved(p, g, made, hyper, rule.decay)
    elif isinstance(made, Tensor):
        made = Moved(made, p - made)
    if not averages:
        return made, new
    weight = weight_in_average(hyper, step)
    return made, (*new, made.p.clone() if weight == 1.0 else states[-1] + weight * (made.p - states[-1]))


def with_parts(rule: Rule) -> Rule:
    """A rule with its masks."""
    return rule._replace(formula=functools.partial(formula_with_parts, rule, False))


def with_average(rule: Rule) -> Rule:
    """The same, which keeps an average of the weights besides."""
    formula = functools.partial(formula_with_parts, rule, True)
    return rule._replace(formula=formula, states=(*rule.states, "ema"), reads_step=True)
