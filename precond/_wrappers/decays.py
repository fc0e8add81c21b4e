"""Weight decay of an optimizer, coupled or not, for wrappers that hand it a gradient in other variables or change its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.optimizer import FusedOptimizer
from .._core.scales import is_coupled, scale
from .wrapper import Wrapper


def _innermost(base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    while isinstance(base, Wrapper):
        base = base.base
    return base


def _owner(base: torch.optim.Optimizer, group: dict[str, Any]) -> type[object]:
    """The class whose rule a group has."""
    return type(base.part_of(group) if isinstance(base, FusedOptimizer) else base)


def decoupled_decays(base: torch.optim.Optimizer) -> dict[Tensor, float | Tensor]:
    """For parameters whose optimizer subtracts ``lr * weight_decay * p`` beside its step: the factor of p."""
    base = _innermost(base)
    decays: dict[Tensor, float | Tensor] = {}
    for group in base.param_groups:
        if group.get("weight_decay", 0.0) != 0.0 and not is_coupled(_owner(base, group), group):
            hyper = {"lr": group["lr"], "weight_decay": group["weight_decay"], "l1_decay": 0.0}
            if isinstance(base, FusedOptimizer):
                scale(hyper, group)
            decays.update((p, hyper["lr"] * hyper["weight_decay"]) for p in group["params"])
    return decays


def coupled_decays(base: torch.optim.Optimizer) -> dict[Tensor, float]:
    """The weight decay of parameters whose optimizer adds it to the gradient, with the sign of a gradient."""
    base = _innermost(base)
    ours = isinstance(base, FusedOptimizer)
    decays: dict[Tensor, float] = {}
    for group in base.param_groups:
        weight_decay = group.get("weight_decay", 0.0)
        if ours and "decay_scale" in group:
            weight_decay = weight_decay * group["decay_scale"]
        if weight_decay != 0.0 and is_coupled(_owner(base, group), group):
            sign = -1.0 if group.get("maximize", False) else 1.0
            decays.update((p, sign * float(weight_decay)) for p in group["params"])
    return decays
