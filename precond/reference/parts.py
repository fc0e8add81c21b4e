"""Parts that ride along with a rule, whatever it is: what needs just p, g and the states, and so no pass of its own. A rule with
parts is a rule; its name says which, as "adamw+ema".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from .decays import decayed_gradient, stepped
from .rule import Rule
from .step import Hyper, States, Step

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


def moved(p: Tensor, g: Tensor, step: Step, hyper: Hyper, decay: str) -> Tensor:
    """The new p: no update where it does not go down the gradient, no decay where the update goes the other way."""
    taken = step.taken
    if hyper["cautious_update"]:
        d = decayed_gradient(p, g, hyper, decay)
        idle = ((taken > 0) & (d <= 0)) | ((taken < 0) & (d >= 0))
        taken = torch.where(idle, torch.zeros_like(taken), taken)
    new_p = stepped(p, step._replace(taken=taken), hyper, decay)
    if hyper["cautious_decay"]:
        against = ((p > 0) & (taken < 0)) | ((p < 0) & (taken > 0))
        new_p = torch.where(against, p - taken, new_p)
    return new_p


def formula_with_parts(
    rule: Rule, averages: bool, p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool
) -> tuple[Tensor, States]:
    """A rule with masks; and then, of an average, ema = ema + w (p - ema)."""
    made, new = rule.formula(p, g, states[:-1] if averages else states, hyper, step, fresh)
    p = moved(p, g, made, hyper, rule.decay) if isinstance(made, Step) else made
    if not averages:
        return p, new
    weight = weight_in_average(hyper, step)
    return p, (*new, p.clone() if weight == 1.0 else states[-1] + weight * (p - states[-1]))


def with_parts(rule: Rule) -> Rule:
    """A rule with its masks."""
    return rule._replace(formula=functools.partial(formula_with_parts, rule, False))


def with_average(rule: Rule) -> Rule:
    """The same, which keeps an average of the weights besides."""
    formula = functools.partial(formula_with_parts, rule, True)
    return rule._replace(formula=formula, states=(*rule.states, "ema"), reads_step=True)
