"""The rows of RAdam and RAdamW."""

from __future__ import annotations

import torch

import precond

from .row import Optimizer, intrinsic

#: The warm-up ends with the fifth step.
_STEPS = 7
_RADAM = dict(lr=0.05, betas=(0.8, 0.99), weight_decay=0.1)

ROWS = [
    Optimizer("radam", precond.RAdam, _RADAM, torch.optim.RAdam, (4.0, 2.0, 2.0), True, steps=_STEPS),
    Optimizer(
        "radamw",
        precond.RAdam,
        _RADAM | dict(decoupled_weight_decay=True, maximize=True),
        torch.optim.RAdam,
        (4.0, 2.0, 2.0),
        True,
        steps=_STEPS,
    ),
    *intrinsic("radamw", precond.RAdamW, _RADAM, (4.0, 2.0, 2.0), steep=True, steps=_STEPS, l1_decay=0.6),
]
#: One rule per class.
CLASSES = ("radam", "radamw_l1")
#: Without momentum and decay; after the warm-up, and where it does not end.
MOVES = [
    (precond.RAdam, dict(betas=(0.0, 0.9), eps=1e-3)),
    (precond.RAdamW, dict(betas=(0.0, 0.6), eps=1e-3, weight_decay=0.0)),
]
