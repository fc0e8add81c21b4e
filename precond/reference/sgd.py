"""Stochastic gradient descent."""

from __future__ import annotations

from torch import Tensor

from .decays import decayed_gradient
from .rule import MOMENTUM, NO_STATES, Rule, with_decays
from .step import Hyper, States, Step


def sgd(
    p: Tensor,
    g: Tensor,
    states: States,
    hyper: Hyper,
    step: int,
    fresh: bool,
    *,
    decay: str,
    nesterov: bool = False,
) -> tuple[Step, States]:
    """torch.optim.SGD: b = mu b + (1 - dampening) d, b = d at first; p -= lr (b, or d + mu b)."""
    lr = hyper["lr"]
    d = decayed_gradient(p, g, hyper, decay)
    if not states:
        return Step(lr * d, lr), ()
    (b,) = states
    b = d if fresh else hyper["momentum"] * b + (1 - hyper["dampening"]) * d
    u = d + hyper["momentum"] * b if nesterov else b
    return Step(lr * u, lr), (b,)


_MOMENTUM = {**MOMENTUM, "first_differs": "dampening"}

RULES: dict[str, Rule] = {
    **with_decays("sgdw", sgd, NO_STATES, coupled="sgd"),
    **with_decays("sgdw", sgd, _MOMENTUM, "_momentum", coupled="sgd"),
    **with_decays("sgdw", sgd, _MOMENTUM, "_nesterov", coupled="sgd", nesterov=True),
}
