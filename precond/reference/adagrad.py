"""Adagrad."""

from __future__ import annotations

from torch import Tensor

from .decays import decayed, decayed_gradient
from .rule import Hyper, Needs, Rule, States, with_decays


def adagrad(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, decay: str
) -> tuple[Tensor, States]:
    """Duchi et al., the diagonal case: s += d^2; p -= lr_t d / (sqrt(s) + eps), lr_t = lr / (1 + (t - 1) lr_decay)."""
    (s,) = states
    lr = hyper["lr"] / (1 + (step - 1) * hyper["lr_decay"])
    d = decayed_gradient(p, g, hyper, decay)
    s = s + d * d
    den = s.sqrt() + hyper["eps"]
    return decayed(p, lr * d / den, lr, hyper, decay, den, s), (s,)


_ADAGRAD: Needs = dict(states=("sum",), second_moments=("sum",), keeps=1.0, reads_step=True)
RULES: dict[str, Rule] = with_decays("adagradw", adagrad, _ADAGRAD, coupled="adagrad")
