"""Adam."""

from __future__ import annotations

import torch
from torch import Tensor

from .decays import decayed_gradient
from .rule import Needs, Rule, with_decays
from .step import Hyper, States, Step


def adam(
    p: Tensor,
    g: Tensor,
    states: States,
    hyper: Hyper,
    step: int,
    fresh: bool,
    *,
    decay: str,
    amsgrad: bool = False,
) -> tuple[Step, States]:
    """Kingma and Ba, algorithm 1; with decay="l2" Loshchilov and Hutter, algorithm 2: p -= lr (m_hat / den + wd p)."""
    m, v = states[:2]
    d = decayed_gradient(p, g, hyper, decay)
    m = hyper["beta1"] * m + (1 - hyper["beta1"]) * d
    v = hyper["beta2"] * v + (1 - hyper["beta2"]) * d * d
    largest = torch.maximum(states[2], v) if amsgrad else v
    m_hat = m / (1 - hyper["beta1"] ** step)
    v_hat = largest / (1 - hyper["beta2"] ** step)
    den = v_hat.sqrt() + hyper["eps"]
    return Step(hyper["lr"] * m_hat / den, hyper["lr"], den, largest), (m, v, largest) if amsgrad else (m, v)


_ADAM: Needs = dict(states=("exp_avg", "exp_avg_sq"), second_moments=("exp_avg_sq",), keeps="beta2", reads_step=True)
_AMSGRAD: Needs = _ADAM | dict(
    states=(*_ADAM["states"], "max_exp_avg_sq"), second_moments=("exp_avg_sq", "max_exp_avg_sq")
)
RULES: dict[str, Rule] = {
    **with_decays("adamw", adam, _ADAM, coupled="adam"),
    **with_decays("adamw", adam, _AMSGRAD, "_amsgrad", coupled="adam", amsgrad=True),
}
