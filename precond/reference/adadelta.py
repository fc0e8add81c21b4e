"""Adadelta."""

from __future__ import annotations

from torch import Tensor

from .decays import decayed_gradient
from .rule import Needs, Rule, with_decays
from .step import Hyper, States, Step


def adadelta(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, decay: str
) -> tuple[Step, States]:
    """Zeiler, algorithm 1: u = rms(acc) / rms(v) d, rms(x) = sqrt(x + eps); p -= lr u; acc is the mean of u^2 before it."""
    v, acc = states
    rho, eps = hyper["rho"], hyper["eps"]
    d = decayed_gradient(p, g, hyper, decay)
    v = rho * v + (1 - rho) * d * d
    rms_v, rms_acc = (v + eps).sqrt(), (acc + eps).sqrt()
    u = rms_acc / rms_v * d
    acc = rho * acc + (1 - rho) * u * u
    return Step(hyper["lr"] * u, hyper["lr"], rms_v / rms_acc, v), (v, acc)


_ADADELTA: Needs = dict(
    states=("square_avg", "acc_delta"), second_moments=("square_avg", "acc_delta"), keeps="rho", counts_steps=True
)
RULES: dict[str, Rule] = with_decays("adadeltaw", adadelta, _ADADELTA, coupled="adadelta")
