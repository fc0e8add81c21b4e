"""Weight decay of an optimizer, coupled or not, for wrappers that hand it a gradient in other variables or change its step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._core.optimizer import FusedOptimizer
from .._core.scales import is_coupled, scale
from .wrapper import Wrapper

#: torch's classes whose decay is decoupled without a flag in their groups; torch 2.9 brought Muon.
_DECOUPLED = tuple(getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name))


def _owned(base: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], torch.optim.Optimizer]]:
    """Every group, with the optimizer whose rule it has: inside of wrappers, ``ZeroRedundancyOptimizer`` and ``Grouped``."""
    while isinstance(base, Wrapper):
        base = base.base
    inner = getattr(base, "optim", base)
    for group in base.param_groups:
        yield group, inner.part_of(group) if isinstance(inner, FusedOptimizer) else inner


def check_direction(base: torch.optim.Optimizer) -> None:
    """Raise where ``base`` changes or averages parameters beside a step that ``compose="direction"`` changes afterwards."""
    for group, owner in _owned(base):
        if hasattr(owner, "eval") or isinstance(owner, torch.optim.ASGD):
            raise ValueError(
                f"base must keep no average of its own with compose='direction', which it would take of other weights, got "
                f"{type(owner).__name__}"
            )
        if (ema_decay := group.get("ema_decay")) is not None:
            raise ValueError(
                f"ema_decay must be None with compose='direction', since base does not see the new weights, got {ema_decay!r}"
            )


def decoupled_decays(base: torch.optim.Optimizer) -> dict[Tensor, float | Tensor]:
    """For parameters whose optimizer subtracts ``lr * weight_decay * p`` beside its step: the factor of p."""
    decays: dict[Tensor, float | Tensor] = {}
    for group, owner in _owned(base):
        if not group.get("weight_decay") or is_coupled(type(owner), group):
            continue
        ours = isinstance(owner, FusedOptimizer)
        if not (ours or "decoupled_weight_decay" in group or isinstance(owner, _DECOUPLED)):
            raise ValueError(
                f"decoupled_weight_decay must be True or False in the groups of {type(owner).__name__} with "
                "compose='direction', which cannot see whether its weight_decay is part of the gradient"
            )
        hyper = {"lr": group["lr"], "weight_decay": group["weight_decay"], "l1_decay": 0.0}
        if ours:
            scale(hyper, group)
        factor = hyper["lr"] * hyper["weight_decay"]
        decays.update((p, factor.reshape(()) if isinstance(factor, Tensor) else factor) for p in group["params"])
    return decays


def coupled_decays(base: torch.optim.Optimizer) -> dict[Tensor, float]:
    """The weight decay of parameters whose optimizer adds it to the gradient, with the sign of a gradient."""
    decays: dict[Tensor, float] = {}
    for group, owner in _owned(base):
        weight_decay = group.get("weight_decay", 0.0)
        if isinstance(owner, FusedOptimizer) and "decay_scale" in group:
            weight_decay = weight_decay * group["decay_scale"]
        if weight_decay != 0.0 and is_coupled(type(owner), group):
            sign = -1.0 if group.get("maximize", False) else 1.0
            decays.update((p, sign * float(weight_decay)) for p in group["params"])
    return decays
