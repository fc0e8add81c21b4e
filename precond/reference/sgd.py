"""Stochastic gradient descent."""

from __future__ import annotations

from torch import Tensor

from .decays import decayed, decayed_gradient
from .rule import MOMENTUM, NO_STATES, Hyper, Rule, States, with_decays


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
) -> tuple[Tensor, States]:
    """torch.optim.SGD: b = mu b + (1 - dampening) d, b = d at first; p -= lr (b, or d + mu b)."""
    lr = hyper["lr"]
    d = decayed_gradient(p, g, hyper, decay)
    if not states:
        return decayed(p, lr * d, lr, hyper, decay), ()
    (b,) = states
    b = d if fresh else hyper["momentum"] * b + (1 - hyper["dampening"]) * d
    u = d + hyper["momentum"] * b if nesterov else b
    return decayed(p, lr * u, lr, hyper, decay), (b,)


_MOMENTUM = {**MOMENTUM, "first_differs": "dampening"}

RULES: dict[str, Rule] = {
    **with_decays("sgdw", sgd, NO_STATES, coupled="sgd"),
    **with_decays("sgdw", sgd, _MOMENTUM, "_momentum", coupled="sgd"),
    **with_decays("sgdw", sgd, _MOMENTUM, "_nesterov", coupled="sgd", nesterov=True),
}
