"""Weight decay that an optimizer adds to the gradient, for wrappers that hand it a gradient in other variables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.optimizer import FusedOptimizer
from .wrapper import Wrapper

#: torch's classes whose ``weight_decay`` is added to the gradient; a group's "decoupled_weight_decay" comes first.
_COUPLED = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
)


def coupled_decays(base: torch.optim.Optimizer) -> dict[Tensor, float]:
    """The weight decay of parameters whose optimizer adds it to the gradient, with the sign of a gradient."""
    decays: dict[Tensor, float] = {}
    for group in base.param_groups:
        weight_decay = group.get("weight_decay", 0.0)
        decoupled = group.get("decoupled_weight_decay", not _is_coupled(base, group))
        if weight_decay != 0.0 and not decoupled:
            sign = -1.0 if group.get("maximize", False) else 1.0
            decays.update((p, sign * float(weight_decay)) for p in group["params"])
    return decays


def _is_coupled(base: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    while isinstance(base, Wrapper):
        base = base.base
    return isinstance(base.part_of(group) if isinstance(base, FusedOptimizer) else base, _COUPLED)
