"""RAdam."""

from __future__ import annotations

import torch
from torch import Tensor

from .decays import decayed_gradient
from .rule import Needs, Rule, with_decays
from .step import Hyper, Number, States, Step


def rectification(beta2: Number, step: float) -> Number:
    """r^2 (1 - beta2^t), or 0 in the warm-up: by its root the step of sqrt(v) + eps is multiplied."""
    power = beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * power / (1 - power)
    if length <= 5:
        return 0.0
    return (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length) * (1 - power)


def radam(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, decay: str
) -> tuple[Step, States]:
    """Liu et al., algorithm 2: p -= lr r m_hat / (sqrt(v_hat) + eps') where v is a mean of enough squares, else lr m_hat.

    As torch.optim.RAdam has it: enough is more than 5, and sqrt(v_hat) + eps' = (sqrt(v) + eps) / sqrt(1 - beta2^t).
    """
    m, v = states
    d = decayed_gradient(p, g, hyper, decay)
    m = hyper["beta1"] * m + (1 - hyper["beta1"]) * d
    v = hyper["beta2"] * v + (1 - hyper["beta2"]) * d * d
    m_hat = m / (1 - hyper["beta1"] ** step)
    square = rectification(hyper["beta2"], step)
    den = (v.sqrt() + hyper["eps"]) / square**0.5 if square else torch.ones_like(v)
    return Step(hyper["lr"] * m_hat / den, hyper["lr"], den, v), (m, v)


_RADAM: Needs = dict(states=("exp_avg", "exp_avg_sq"), second_moments=("exp_avg_sq",), keeps="beta2", reads_step=True)
RULES: dict[str, Rule] = with_decays("radamw", radam, _RADAM, coupled="radam")
