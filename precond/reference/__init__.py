"""Every rule in plain PyTorch, in the papers' own algebra: the text that tests hold the kernels against, and the backend
that runs anywhere. Slow, and says so: several temporaries and passes per step.

``RULES[name].update`` is a function ``(p, g, states, hyper, step, fresh) -> (p, states)`` of tensors in one compute dtype; the
names are those of the compiled rules. A file has a family, as in csrc/rules and triton_kernels/families.
"""

from __future__ import annotations

import importlib
import math

import torch
from torch import Tensor

from .decays import clamped, soft_threshold
from .dual import KERNELS
from .parts import Composed, with_average, with_parts
from .rule import Rule
from .statistics import Seen
from .step import Hyper, Moved

__all__ = [
    "FAMILIES",
    "KERNELS",
    "RULES",
    "Composed",
    "Hyper",
    "Rule",
    "clamped",
    "soft_threshold",
    "update",
    "update_sparse",
]

#: The families of rules: a file of that name here, in triton_kernels/families, in tests/families and, by CMakeLists.txt's own
#: list, in csrc/rules.
FAMILIES = (
    "sgd", "adam", "nadam", "radam", "adamax", "adagrad", "rmsprop", "adadelta", "lion", "schedule_free", "dual", "gauss_newton",
    "perturb",
)  # fmt: skip

RULES: dict[str, Rule] = Composed({"parts": with_parts, "ema": with_average})
for _family in FAMILIES:
    RULES.update(importlib.import_module(f"{__name__}.{_family}").RULES)


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
    measures: str | None = None,
) -> Seen | None:
    """Run a rule on tensors of any dtype, layout and device, in place; computes in fp64 if one of them is, else fp32.

    ``measures``: of a rule with parts returns what statistics are made of; "only" updates nothing, and leaves a decay out
    that is no part of the gradient.
    """
    wide = (
        torch.float64 if any(t.dtype in (torch.float64, torch.complex128) for t in (p, g, *states)) else torch.float32
    )
    views = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (p, g, *states)]
    # Autograd keeps what a formula read, so where it watches that must not be the tensor that is written below.
    wide_p, wide_g, *wide_states = (t.to(wide, copy=torch.is_grad_enabled()) for t in views)
    wide_g = clamped(wide_g * grad_coef, clip_value)
    seen = None
    if measures is None:
        new_p, new_states = RULES[rule].update(wide_p, wide_g, tuple(wide_states), hyper, step, fresh)
    else:
        if measures == "only" and RULES[rule].decay != "coupled":
            hyper = {**hyper, "weight_decay": 0.0, "l1_decay": 0.0}
        made, new_states = RULES[rule].formula(wide_p, wide_g, tuple(wide_states), hyper, step, fresh)
        assert isinstance(made, Moved)
        new_p = made.p
        seen = Seen(*(t.detach().clone() for t in (wide_g, wide_p, made.taken)))
        if measures == "only":
            return seen
    views[0].copy_(new_p)
    for state, new in zip(views[2:], new_states, strict=True):
        state.copy_(new)
    # A lazy conjugate was resolved into another tensor.
    for t, view in zip((p, *states), (views[0], *views[2:]), strict=True):
        if t.is_conj():
            t.copy_(torch.view_as_complex(view))
    return seen


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
