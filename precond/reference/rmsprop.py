"""RMSprop."""

from __future__ import annotations

import torch
from torch import Tensor

from .decays import decayed_gradient
from .rule import Needs, Rule, with_decays
from .step import Hyper, States, Step


def rmsprop(
    p: Tensor,
    g: Tensor,
    states: States,
    hyper: Hyper,
    step: int,
    fresh: bool,
    *,
    decay: str,
    centered: bool = False,
    momentum: bool = False,
) -> tuple[Step, States]:
    """torch.optim.RMSprop: v = a v + (1 - a) d^2; b = mu b + d / den; p -= lr b. Centered: den from v - mean^2 >= 0."""
    lr, alpha = hyper["lr"], hyper["alpha"]
    d = decayed_gradient(p, g, hyper, decay)
    v = alpha * states[0] + (1 - alpha) * d * d
    new_states = [v]
    variance = v
    if centered:
        mean = alpha * states[-1] + (1 - alpha) * d
        variance = torch.clamp(v - mean * mean, min=0)
    den = variance.sqrt() + hyper["eps"]
    u = d / den
    if momentum:
        u = hyper["momentum"] * states[1] + u
        new_states.append(u)
    if centered:
        new_states.append(mean)
    return Step(lr * u, lr, den, v), tuple(new_states)


def _with(*beside: str) -> Needs:
    """What the rule needs that has states beside its mean of squares."""
    return dict(states=("square_avg", *beside), second_moments=("square_avg",), keeps="alpha", counts_steps=True)


RULES: dict[str, Rule] = {
    **with_decays("rmspropw", rmsprop, _with(), coupled="rmsprop"),
    **with_decays("rmspropw", rmsprop, _with("grad_avg"), "_centered", coupled="rmsprop", centered=True),
    **with_decays("rmspropw", rmsprop, _with("momentum_buffer"), "_momentum", coupled="rmsprop", momentum=True),
    **with_decays(
        "rmspropw",
        rmsprop,
        _with("momentum_buffer", "grad_avg"),
        "_centered_momentum",
        coupled="rmsprop",
        centered=True,
        momentum=True,
    ),
}
