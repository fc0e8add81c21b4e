"""Perturbations of a step of two gradients: the parameter goes to a state, to be copied back."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .rule import Rule
from .step import Hyper, States


def perturb(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, adaptive: bool
) -> tuple[Tensor, States]:
    """p + radius P P^T g, with P P^T = 1 / (sqrt(scale v) + eps), 0 where v is; or without a v the identity."""
    if not adaptive:
        return p + hyper["radius"] * g, (p.clone(),)
    den = (hyper["scale"] * states[1]).sqrt() + hyper["eps"]
    moved = p + hyper["radius"] * g / den
    return torch.where(states[1] > 0, moved, p), (p.clone(), states[1])


RULES: dict[str, Rule] = {
    "perturb": Rule(functools.partial(perturb, adaptive=False), ("backup",)),
    "perturb_adaptive": Rule(
        functools.partial(perturb, adaptive=True), ("backup", "exp_avg_sq"), second_moments=("exp_avg_sq",)
    ),
}
