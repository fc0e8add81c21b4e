"""Every rule in plain PyTorch, in the papers' own algebra: the text that tests hold the kernels against, and the backend
that runs anywhere. Slow, and says so: several temporaries and passes per step.

A rule is a function ``(p, g, states, hyper, step, fresh) -> (p, states)`` of tensors in one compute dtype; the names in
``RULES`` are those of the compiled rules.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

States = tuple[Tensor, ...]
Number = float | Tensor
Hyper = Mapping[str, Number]
Update = Callable[[Tensor, Tensor, States, Hyper, int, bool], tuple[Tensor, States]]


class Rule(NamedTuple):
    """A formula, and what it needs."""

    update: Update
    #: torch's names of the states that it updates, in the order of its arguments.
    states: tuple[str, ...]
    #: Those of them that are a mean or a sum of squares: the ones that a short format harms, and of which codes hold the root.
    second_moments: tuple[str, ...] = ()
    #: How much of its second moments a step keeps: a hyper-parameter, or a number.
    keeps: str | float = 0.0
    #: True where the formula reads the number of the step: then every parameter has a counter.
    reads_step: bool = False
    #: States of one number, at most one, with their initial value. ``hyper`` has the one after this step under its name.
    scalars: Mapping[str, float] = {}
    #: From the hyper-parameters, the number of the step and the scalar state before it: that state after it.
    advance: Callable[[Hyper, int, float], float] | None = None


# Decays. ``decay`` is "coupled", "l2", "proximal" or "subgradient".


def soft_threshold(x: Tensor, t: Tensor) -> Tensor:
    """S_t(x) = sign(x) max(|x| - t, 0)."""
    return torch.sign(x) * torch.clamp(x.abs() - t, min=0)


def intrinsic_l1_threshold(den: Tensor, v: Tensor, lr: Number, hyper: Hyper) -> Tensor:
    """lr min(l1 den^(-1/2), cap), and no threshold where the coordinate never saw a gradient (METHODS A.2.2)."""
    t = lr * torch.clamp(hyper["l1_decay"] * den**-0.5, max=hyper["l1_cap"])
    return torch.where(v == 0, torch.zeros_like(t), t)


def decayed_gradient(p: Tensor, g: Tensor, hyper: Hyper, decay: str) -> Tensor:
    """What the statistics see: g, or with a penalty on p itself g + wd p."""
    if decay != "coupled":
        return g
    return g + p * hyper["weight_decay"]


def decayed(
    p: Tensor, step: Tensor, lr: Number, hyper: Hyper, decay: str, den: Tensor | None = None, v: Tensor | None = None
) -> Tensor:
    """p - step, and the decay that a penalty on z = den^(1/2) p brings; den = 1 where there is none."""
    if decay == "coupled":
        return p - step
    q = p - lr * hyper["weight_decay"] * p - step
    if decay == "l2":
        return q
    if den is None or v is None:
        t = torch.ones_like(p) * (lr * hyper["l1_decay"])
    else:
        t = intrinsic_l1_threshold(den, v, lr, hyper)
    return soft_threshold(q, t) if decay == "proximal" else q - t * torch.sign(p)


# Rules.


def sgd(
    p: Tensor,
    g: Tensor,
    states: States,
    hyper: Hyper,
    step: int,
    fresh: bool,
    *,
    decay: str,
    nesterov: bool = False,
) -> tuple[Tensor, States]:
    """torch.optim.SGD: b = mu b + (1 - dampening) d, b = d at first; p -= lr (b, or d + mu b)."""
    lr = hyper["lr"]
    d = decayed_gradient(p, g, hyper, decay)
    if not states:
        return decayed(p, lr * d, lr, hyper, decay), ()
    (b,) = states
    b = d if fresh else hyper["momentum"] * b + (1 - hyper["dampening"]) * d
    u = d + hyper["momentum"] * b if nesterov else b
    return decayed(p, lr * u, lr, hyper, decay), (b,)


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
) -> tuple[Tensor, States]:
    """Kingma and Ba, algorithm 1; with decay="l2" Loshchilov and Hutter, algorithm 2: p -= lr (m_hat / den + wd p)."""
    m, v = states[:2]
    d = decayed_gradient(p, g, hyper, decay)
    m = hyper["beta1"] * m + (1 - hyper["beta1"]) * d
    v = hyper["beta2"] * v + (1 - hyper["beta2"]) * d * d
    largest = torch.maximum(states[2], v) if amsgrad else v
    m_hat = m / (1 - hyper["beta1"] ** step)
    v_hat = largest / (1 - hyper["beta2"] ** step)
    den = v_hat.sqrt() + hyper["eps"]
    p = decayed(p, hyper["lr"] * m_hat / den, hyper["lr"], hyper, decay, den, largest)
    return p, (m, v, largest) if amsgrad else (m, v)


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
) -> tuple[Tensor, States]:
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
    return decayed(p, lr * u, lr, hyper, decay, den, v), tuple(new_states)


def lion(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, decay: str
) -> tuple[Tensor, States]:
    """Chen et al., algorithm 2: u = sign(beta1 m + (1 - beta1) g); p -= lr (u + wd p); m = beta2 m + (1 - beta2) g."""
    (m,) = states
    lr = hyper["lr"]
    d = decayed_gradient(p, g, hyper, decay)
    u = torch.sign(hyper["beta1"] * m + (1 - hyper["beta1"]) * d)
    m = hyper["beta2"] * m + (1 - hyper["beta2"]) * d
    return decayed(p, lr * u, lr, hyper, decay), (m,)


# Dual space preconditioning: p -= lr grad K(u), K convex and a function of magnitudes (Maddison et al., arXiv 1902.02257).

#: Of each kernel what it makes of a magnitude r >= 0: h'(r) for K = h(|g|), of an entry, a norm or a singular value.
KERNELS: dict[str, Callable[[Tensor, Hyper], Tensor]] = {
    "identity": lambda r, hyper: r,
    "normalize": lambda r, hyper: torch.sign(r),
    "smoothed": lambda r, hyper: r / torch.hypot(r, torch.full_like(r, float(hyper["scale"]))),
    "adam": lambda r, hyper: r / (r + hyper["scale"]),
    "clip": lambda r, hyper: torch.clamp(r, max=hyper["scale"]),
    "rational": lambda r, hyper: r / (1 + r / hyper["scale"]),
    "asinh": lambda r, hyper: hyper["scale"] * torch.asinh(r / hyper["scale"]),
    "log": lambda r, hyper: hyper["scale"] * torch.log1p(r / hyper["scale"]),
    "power": lambda r, hyper: hyper["scale"] * (r / hyper["scale"]) ** hyper["exponent"],
}


def ratio(r: Tensor, hyper: Hyper) -> Tensor:
    """r / (offset + slope r), 0 at 0: identity (1, 0), normalize (0, 1), adam (scale, 1) and rational (1, 1 / scale)."""
    return torch.where(r == 0, r, r / (hyper["offset"] + hyper["slope"] * r))


def dual(
    p: Tensor,
    g: Tensor,
    states: States,
    hyper: Hyper,
    step: int,
    fresh: bool,
    *,
    decay: str,
    kernel: Callable[[Tensor, Hyper], Tensor],
) -> tuple[Tensor, States]:
    """m = mu m + (1 - mu) g; u = m + lookahead (g - m), or g without a momentum; p -= lr (h'(|u|) sign(u) + wd p)."""
    lr = hyper["lr"]
    (new_states, u) = ((), g) if not states else averaged(g, states, hyper)
    return decayed(p, lr * torch.sign(u) * kernel(u.abs(), hyper), lr, hyper, decay), new_states


def averaged(g: Tensor, states: States, hyper: Hyper) -> tuple[States, Tensor]:
    """An average of gradients, m = mu m + (1 - mu) g, and a point between it and the gradient, m + lookahead (g - m)."""
    m = hyper["momentum"] * states[0] + (1 - hyper["momentum"]) * g
    return (m,), m + hyper["lookahead"] * (g - m)


def average(p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool) -> tuple[Tensor, States]:
    """Overwrites p with the direction of a momentum: what Muon and DualDescent map as a whole."""
    new_states, u = averaged(g, states, hyper)
    return u, new_states


# Diagonal Gauss-Newton (Liu et al., arXiv 2510.13680; METHODS C).


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
) -> tuple[Tensor, States]:
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
    return decayed(p, lr * u, lr, hyper, decay, den, seen), (m, h)


# Perturbations of a two-gradient step: the parameter goes to a state, to be copied back.


def perturb(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, adaptive: bool
) -> tuple[Tensor, States]:
    """p + radius P P^T g, with P P^T = 1 / (sqrt(scale v) + eps), 0 where v is; or without a v the identity."""
    if not adaptive:
        return p + hyper["radius"] * g, (p.clone(),)
    den = (hyper["scale"] * states[1]).sqrt() + hyper["eps"]
    moved = p + hyper["radius"] * g / den
    return torch.where(states[1] > 0, moved, p), (p.clone(), states[1])


#: What a rule needs, without its formula: the fields of Rule after the first.
Needs = dict[str, Any]

_NO_STATES: Needs = dict(states=())
_MOMENTUM: Needs = dict(states=("momentum_buffer",))
_ADAM: Needs = dict(states=("exp_avg", "exp_avg_sq"), second_moments=("exp_avg_sq",), keeps="beta2", reads_step=True)
_AMSGRAD: Needs = _ADAM | dict(
    states=(*_ADAM["states"], "max_exp_avg_sq"), second_moments=("exp_avg_sq", "max_exp_avg_sq")
)
_ADAGRAD: Needs = dict(states=("sum",), second_moments=("sum",), keeps=1.0, reads_step=True)
_CURVATURE: Needs = dict(states=("exp_avg", "curvature"), second_moments=("curvature",), keeps="beta2", reads_step=True)
#: Kernels with a rule of their own; the others are one ratio.
_ENTRYWISE = ("smoothed", "clip", "asinh", "log", "power")


def intrinsic(name: str, update: Callable[..., Any], needs: Needs, suffix: str = "", **options: Any) -> dict[str, Rule]:
    """A rule with each intrinsic decay."""
    return {
        f"{name}{infix}{suffix}": Rule(functools.partial(update, decay=decay, **options), **needs)
        for infix, decay in (("", "l2"), ("_l1", "proximal"), ("_l1_subgradient", "subgradient"))
    }


def coupled(update: Callable[..., Any], needs: Needs, **options: Any) -> Rule:
    """A rule whose weight decay is part of the gradient."""
    return Rule(functools.partial(update, decay="coupled", **options), **needs)


def _rmsprop(*beside: str) -> Needs:
    """What RMSprop needs with states beside its mean of squares."""
    return dict(states=("square_avg", *beside), second_moments=("square_avg",), keeps="alpha")


RULES: dict[str, Rule] = {
    "sgd": coupled(sgd, _NO_STATES),
    "sgd_momentum": coupled(sgd, _MOMENTUM),
    "sgd_nesterov": coupled(sgd, _MOMENTUM, nesterov=True),
    **intrinsic("sgdw", sgd, _NO_STATES),
    **intrinsic("sgdw", sgd, _MOMENTUM, "_momentum"),
    **intrinsic("sgdw", sgd, _MOMENTUM, "_nesterov", nesterov=True),
    "adam": coupled(adam, _ADAM),
    "adam_amsgrad": coupled(adam, _AMSGRAD, amsgrad=True),
    **intrinsic("adamw", adam, _ADAM),
    **intrinsic("adamw", adam, _AMSGRAD, "_amsgrad", amsgrad=True),
    "adagrad": coupled(adagrad, _ADAGRAD),
    **intrinsic("adagradw", adagrad, _ADAGRAD),
    "rmsprop": coupled(rmsprop, _rmsprop()),
    "rmsprop_centered": coupled(rmsprop, _rmsprop("grad_avg"), centered=True),
    "rmsprop_momentum": coupled(rmsprop, _rmsprop("momentum_buffer"), momentum=True),
    "rmsprop_centered_momentum": coupled(
        rmsprop, _rmsprop("momentum_buffer", "grad_avg"), centered=True, momentum=True
    ),
    **intrinsic("rmspropw", rmsprop, _rmsprop()),
    **intrinsic("rmspropw", rmsprop, _rmsprop("grad_avg"), "_centered", centered=True),
    **intrinsic("rmspropw", rmsprop, _rmsprop("momentum_buffer"), "_momentum", momentum=True),
    **intrinsic(
        "rmspropw",
        rmsprop,
        _rmsprop("momentum_buffer", "grad_avg"),
        "_centered_momentum",
        centered=True,
        momentum=True,
    ),
    **intrinsic("lion", lion, dict(states=("exp_avg",))),
    **{
        f"dual_{name}{suffix}": Rule(functools.partial(dual, decay="l2", kernel=kernel), **needs)
        for name, kernel in (("ratio", ratio), *((name, KERNELS[name]) for name in _ENTRYWISE))
        for suffix, needs in (("", _NO_STATES), ("_momentum", _MOMENTUM))
    },
    "average": Rule(average, **_MOMENTUM),
    **intrinsic("gauss_newton", gauss_newton, _CURVATURE, root=False),
    **intrinsic("gauss_newton", gauss_newton, _CURVATURE, "_root", root=True),
    **intrinsic("gauss_newton", gauss_newton, _CURVATURE, "_own", root=False, own=True),
    **intrinsic("gauss_newton", gauss_newton, _CURVATURE, "_own_root", root=True, own=True),
    "perturb": Rule(functools.partial(perturb, adaptive=False), ("backup",)),
    "perturb_adaptive": Rule(
        functools.partial(perturb, adaptive=True), ("backup", "exp_avg_sq"), second_moments=("exp_avg_sq",)
    ),
}


def clamped(g: Tensor, limit: float) -> Tensor:
    """g between -limit and limit."""
    return g if limit == math.inf else torch.clamp(g, -limit, limit)


def update(
    rule: str,
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    hyper: Hyper,
    step: int,
    fresh: bool,
    grad_coef: float,
    clip_value: float = math.inf,
) -> None:
    """Run a rule on tensors of any dtype, layout and device, in place; computes in fp64 if one of them is, else fp32."""
    wide = (
        torch.float64 if any(t.dtype in (torch.float64, torch.complex128) for t in (p, g, *states)) else torch.float32
    )
    views = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (p, g, *states)]
    # Autograd keeps what a formula read, so where it watches that must not be the tensor that is written below.
    wide_p, wide_g, *wide_states = (t.to(wide, copy=torch.is_grad_enabled()) for t in views)
    new_p, new_states = RULES[rule].update(
        wide_p, clamped(wide_g * grad_coef, clip_value), tuple(wide_states), hyper, step, fresh
    )
    views[0].copy_(new_p)
    for state, new in zip(views[2:], new_states, strict=True):
        state.copy_(new)
    # A lazy conjugate was resolved into another tensor.
    for t, view in zip((p, *states), (views[0], *views[2:]), strict=True):
        if t.is_conj():
            t.copy_(torch.view_as_complex(view))


def update_sparse(
    rule: str,
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    hyper: Hyper,
    step: int,
    fresh: bool,
    grad_coef: float,
    clip_value: float = math.inf,
) -> None:
    """The same for a sparse g. Without momentum a zero gradient changes nothing, so only the places in g are touched."""
    if "momentum_buffer" in RULES[rule].states or g.sparse_dim() == 0:
        update(rule, p, g.to_dense(), states, hyper, step, fresh, grad_coef, clip_value)
        return
    g = g.coalesce()
    places = tuple(g.indices())
    touched = [t[places] for t in (p, *states)]
    update(rule, touched[0], g.values(), touched[1:], hyper, step, fresh, grad_coef, clip_value)
    for t, new in zip((p, *states), touched, strict=True):
        t[places] = new
