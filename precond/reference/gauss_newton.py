"""Diagonal Gauss-Newton (Liu et al., arXiv 2510.13680)."""

from __future__ import annotations

import torch
from torch import Tensor

from .decays import clamped
from .rule import Needs, Rule, with_decays
from .step import Hyper, States, Step


def gauss_newton(
    p: Tensor,
    g: Tensor,
    states: States,
    hyper: Hyper,
    step: int,
    fresh: bool,
    *,
    decay: str,
    root: bool,
    own: bool = False,
) -> tuple[Step, States]:
    """den = scale h + eps, or its root; p -= lr (clamp(m_hat / den, -clip, clip) + wd p). own: h is a mean of g^2."""
    m, h = states
    lr, scale = hyper["lr"], hyper["scale"]
    m = hyper["beta1"] * m + (1 - hyper["beta1"]) * g
    if own:
        h = hyper["beta2"] * h + (1 - hyper["beta2"]) * g * g
        scale = scale / (1 - hyper["beta2"] ** step)
    seen = torch.clamp(h, min=0)  # an estimate of a Hessian's diagonal may be negative
    den = scale * seen + hyper["eps"]
    den = den.sqrt() if root else den
    m_hat = m / (1 - hyper["beta1"] ** step) if hyper["corrected"] else m
    u = clamped(m_hat / den, float(hyper["clip"]))
    return Step(lr * u, lr, den, seen), (m, h)


_CURVATURE: Needs = dict(states=("exp_avg", "curvature"), second_moments=("curvature",), keeps="beta2", reads_step=True)
RULES: dict[str, Rule] = {
    **with_decays("gauss_newton", gauss_newton, _CURVATURE, root=False),
    **with_decays("gauss_newton", gauss_newton, _CURVATURE, "_root", root=True),
    **with_decays("gauss_newton", gauss_newton, _CURVATURE, "_own", root=False, own=True),
    **with_decays("gauss_newton", gauss_newton, _CURVATURE, "_own_root", root=True, own=True),
}
