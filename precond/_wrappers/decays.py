"""Weight decay that an optimizer adds to the gradient, for wrappers that hand it a gradient in other variables."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.optimizer import FusedOptimizer
from .._core.scales import is_coupled
from .wrapper import Wrapper


def coupled_decays(base: torch.optim.Optimizer) -> dict[Tensor, float]:
    """The weight decay of parameters whose optimizer adds it to the gradient, with the sign of a gradient."""
    while isinstance(base, Wrapper):
        base = base.base
    ours = isinstance(base, FusedOptimizer)
    decays: dict[Tensor, float] = {}
    for group in base.param_groups:
        weight_decay = group.get("weight_decay", 0.0)
        if ours and "decay_scale" in group:
            weight_decay = weight_decay * group["decay_scale"]
        owner = base.part_of(group) if isinstance(base, FusedOptimizer) else base
        if weight_decay != 0.0 and is_coupled(type(owner), group):
            sign = -1.0 if group.get("maximize", False) else 1.0
            decays.update((p, sign * float(weight_decay)) for p in group["params"])
    return decays
