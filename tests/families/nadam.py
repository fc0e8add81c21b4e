"""The rows of NAdam and NAdamW."""

from __future__ import annotations

import torch

import precond

from .row import Optimizer, intrinsic

_NADAM = dict(lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, momentum_decay=0.5)

ROWS = [
    Optimizer("nadam", precond.NAdam, _NADAM, torch.optim.NAdam, (4.0, 2.0, 2.0), True),
    Optimizer(
        "nadamw",
        precond.NAdam,
        _NADAM | dict(decoupled_weight_decay=True, maximize=True),
        torch.optim.NAdam,
        (4.0, 2.0, 2.0),
        True,
    ),
    *intrinsic("nadamw", precond.NAdamW, _NADAM, (4.0, 2.0, 2.0), steep=True, l1_decay=0.6),
]
#: One rule per class.
CLASSES = ("nadam", "nadamw_l1")
#: Without momentum and decay.
MOVES = [
    (precond.NAdam, dict(betas=(0.0, 0.9), eps=1e-3)),
    (precond.NAdamW, dict(betas=(0.0, 0.9), eps=1e-3, weight_decay=0.0)),
]
