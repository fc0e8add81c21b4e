"""Dual space preconditioning: p -= lr grad K(u), K convex and a function of magnitudes (Maddison et al., arXiv 1902.02257).
And two passes of methods that map whole matrices: the average of gradients before that, and the step along the result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .rule import MOMENTUM, NO_STATES, Rule, with_decay
from .step import Hyper, States, Step

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
) -> tuple[Step, States]:
    """m = mu m + (1 - mu) g; u = m + lookahead (g - m), or g without a momentum; p -= lr (h'(|u|) sign(u) + wd p)."""
    lr = hyper["lr"]
    (new_states, u) = ((), g) if not states else averaged(g, states, hyper)
    return Step(lr * torch.sign(u) * kernel(u.abs(), hyper), lr), new_states


def averaged(g: Tensor, states: States, hyper: Hyper) -> tuple[States, Tensor]:
    """An average of gradients, m = mu m + (1 - mu) g, and a point between it and the gradient, m + lookahead (g - m)."""
    m = hyper["momentum"] * states[0] + (1 - hyper["momentum"]) * g
    return (m,), m + hyper["lookahead"] * (g - m)


def average(p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool) -> tuple[Tensor, States]:
    """Overwrites p with the direction of a momentum: what Muon and DualDescent map as a whole."""
    new_states, u = averaged(g, states, hyper)
    return u, new_states


def directed(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, decay: str
) -> tuple[Step, States]:
    """p -= lr (direction + wd p), along what an earlier pass has left in a state. Of g masks and statistics know."""
    return Step(hyper["lr"] * states[0], hyper["lr"]), states


#: Kernels with a rule of their own; the others are one ratio.
_ENTRYWISE = ("smoothed", "clip", "asinh", "log", "power")
RULES: dict[str, Rule] = {
    **{
        f"dual_{name}{suffix}": with_decay(dual, "l2", needs, kernel=kernel)
        for name, kernel in (("ratio", ratio), *((name, KERNELS[name]) for name in _ENTRYWISE))
        for suffix, needs in (("", NO_STATES), ("_momentum", MOMENTUM))
    },
    "average": Rule(average, **MOMENTUM),
    "directed": with_decay(directed, "l2", dict(states=("direction",))),
}
