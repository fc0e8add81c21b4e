"""Lion."""

from __future__ import annotations

from torch import Tensor

from .decays import decayed_gradient, sign
from .rule import Rule, with_decays
from .step import Hyper, States, Step


def lion(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, decay: str
) -> tuple[Step, States]:
    """Chen et al., algorithm 2: u = sign(beta1 m + (1 - beta1) g); p -= lr (u + wd p); m = beta2 m + (1 - beta2) g."""
    (m,) = states
    lr = hyper["lr"]
    d = decayed_gradient(p, g, hyper, decay)
    u = sign(hyper["beta1"] * m + (1 - hyper["beta1"]) * d)
    m = hyper["beta2"] * m + (1 - hyper["beta2"]) * d
    return Step(lr * u, lr), (m,)


RULES: dict[str, Rule] = with_decays("lion", lion, dict(states=("exp_avg",)))
