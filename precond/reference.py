"""Every rule in plain PyTorch, in the papers' own algebra: the text that tests hold the kernels against, and the backend
that runs anywhere. Slow, and says so: several temporaries and passes per step.

A rule is a function ``(p, g, states, hyper, step, fresh) -> (p, states)`` of tensors in one compute dtype; the names in
``RULES`` are those of the compiled rules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

States = tuple[Tensor, ...]
Hyper = Mapping[str, float]
Rule = Callable[[Tensor, Tensor, States, Hyper, int, bool], tuple[Tensor, States]]


def sgd(
    p: Tensor,
    g: Tensor,
    states: States,
    hyper: Hyper,
    step: int,
    fresh: bool,
    *,
    nesterov: bool = False,
) -> tuple[Tensor, States]:
    """torch.optim.SGD: d = g + wd p; b = mu b + (1 - dampening) d, b = d at first; p -= lr (b, or d + mu b)."""
    d = g + hyper["weight_decay"] * p
    if not states:
        return p - hyper["lr"] * d, ()
    (b,) = states
    b = d if fresh else hyper["momentum"] * b + (1 - hyper["dampening"]) * d
    u = d + hyper["momentum"] * b if nesterov else b
    return p - hyper["lr"] * u, (b,)


def soft_threshold(x: Tensor, t: Tensor) -> Tensor:
    """S_t(x) = sign(x) max(|x| - t, 0)."""
    return torch.sign(x) * torch.clamp(x.abs() - t, min=0)


def intrinsic_l1_threshold(den: Tensor, v: Tensor, hyper: Hyper) -> Tensor:
    """lr min(l1 den^(-1/2), cap), and no threshold where the coordinate never saw a gradient (METHODS A.2.2)."""
    t = hyper["lr"] * torch.clamp(hyper["l1_decay"] * den**-0.5, max=hyper["l1_cap"])
    return torch.where(v == 0, torch.zeros_like(t), t)


def adamw(
    p: Tensor,
    g: Tensor,
    states: States,
    hyper: Hyper,
    step: int,
    fresh: bool,
    *,
    amsgrad: bool = False,
    l1: str | None = None,
) -> tuple[Tensor, States]:
    """Loshchilov and Hutter, algorithm 2: p -= lr (m_hat / den + wd p), with the intrinsic L1 of METHODS A.2.2."""
    m, v = states[:2]
    m = hyper["beta1"] * m + (1 - hyper["beta1"]) * g
    v = hyper["beta2"] * v + (1 - hyper["beta2"]) * g * g
    largest = torch.maximum(states[2], v) if amsgrad else v
    m_hat = m / (1 - hyper["beta1"] ** step)
    v_hat = largest / (1 - hyper["beta2"] ** step)
    den = v_hat.sqrt() + hyper["eps"]

    lr = hyper["lr"]
    q = p - lr * hyper["weight_decay"] * p - lr * m_hat / den
    if l1 == "proximal":
        q = soft_threshold(q, intrinsic_l1_threshold(den, largest, hyper))
    elif l1 == "subgradient":
        q = q - intrinsic_l1_threshold(den, largest, hyper) * torch.sign(p)
    return q, (m, v, largest) if amsgrad else (m, v)


RULES: dict[str, Rule] = {
    "sgd": sgd,
    "sgd_momentum": sgd,
    "sgd_nesterov": functools.partial(sgd, nesterov=True),
    "adamw": adamw,
    "adamw_amsgrad": functools.partial(adamw, amsgrad=True),
    "adamw_l1": functools.partial(adamw, l1="proximal"),
    "adamw_l1_amsgrad": functools.partial(adamw, l1="proximal", amsgrad=True),
    "adamw_l1_subgradient": functools.partial(adamw, l1="subgradient"),
    "adamw_l1_subgradient_amsgrad": functools.partial(adamw, l1="subgradient", amsgrad=True),
}


def update(
    rule: str,
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    hyper: Hyper,
    step: int,
    fresh: bool,
    grad_coef: float,
) -> None:
    """Run a rule on tensors of any dtype, layout and device, in place; computes in fp64 if one of them is, else fp32."""
    wide = (
        torch.float64 if any(t.dtype in (torch.float64, torch.complex128) for t in (p, g, *states)) else torch.float32
    )
    views = [torch.view_as_real(t) if t.is_complex() else t for t in (p, g, *states)]
    wide_p, wide_g, *wide_states = (t.to(wide) for t in views)
    new_p, new_states = RULES[rule](wide_p, wide_g * grad_coef, tuple(wide_states), hyper, step, fresh)
    views[0].copy_(new_p)
    for state, new in zip(views[2:], new_states, strict=True):
        state.copy_(new)


#: How many states each rule updates.
STATES = {
    name: 0 if name == "sgd" else 1 if name.startswith("sgd") else 3 if name.endswith("amsgrad") else 2
    for name in RULES
}
