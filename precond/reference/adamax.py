"""Adamax."""

from __future__ import annotations

import torch
from torch import Tensor

from .decays import decayed_gradient
from .rule import Needs, Rule, with_decays
from .step import Hyper, States, Step


def adamax(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, decay: str
) -> tuple[Step, States]:
    """Kingma and Ba, algorithm 2: u = max(b2 u, |d|); p -= lr m_hat / den. torch adds eps to |d|; den = u + eps otherwise."""
    m, u = states
    d = decayed_gradient(p, g, hyper, decay)
    m = hyper["beta1"] * m + (1 - hyper["beta1"]) * d
    if decay == "coupled":
        den = u = torch.maximum(hyper["beta2"] * u, d.abs() + hyper["eps"])
    else:
        u = torch.maximum(hyper["beta2"] * u, d.abs())
        den = u + hyper["eps"]
    m_hat = m / (1 - hyper["beta1"] ** step)
    return Step(hyper["lr"] * m_hat / den, hyper["lr"], den, u), (m, u)


_ADAMAX: Needs = dict(
    states=("exp_avg", "exp_inf"), second_moments=("exp_inf",), squares=False, keeps="beta2", reads_step=True
)
RULES: dict[str, Rule] = with_decays("adamaxw", adamax, _ADAMAX, coupled="adamax")
