"""Adagrad."""

from __future__ import annotations

from torch import Tensor

from .decays import decayed_gradient
from .rule import Needs, Rule, with_decays
from .step import Hyper, States, Step


def adagrad(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, decay: str
) -> tuple[Step, States]:
    """Duchi et al., the diagonal case: s += d^2; p -= lr_t d / (sqrt(s) + eps), lr_t = lr / (1 + (t - 1) lr_decay)."""
    (s,) = states
    lr = hyper["lr"] / (1 + (step - 1) * hyper["lr_decay"])
    d = decayed_gradient(p, g, hyper, decay)
    s = s + d * d
    den = s.sqrt() + hyper["eps"]
    return Step(lr * d / den, lr, den, s), (s,)


_ADAGRAD: Needs = dict(states=("sum",), second_moments=("sum",), keeps=1.0, reads_step=True)
RULES: dict[str, Rule] = with_decays("adagradw", adagrad, _ADAGRAD, coupled="adagrad")
