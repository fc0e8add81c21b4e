"""The rows of Adamax and AdamaxW."""

from __future__ import annotations

import torch

import precond

from .row import Optimizer, intrinsic

_ADAMAX = dict(lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)

ROWS = [
    Optimizer("adamax", precond.Adamax, _ADAMAX, torch.optim.Adamax, (4.0, 2.0, 2.0), True),
    *intrinsic("adamaxw", precond.AdamaxW, _ADAMAX | dict(maximize=True), (4.0, 2.0, 2.0), l1_decay=0.6),
]
#: One rule per class.
CLASSES = ("adamax", "adamaxw")
#: Without momentum and decay.
MOVES = [
    (precond.Adamax, dict(betas=(0.0, 0.9), eps=1e-3)),
    (precond.AdamaxW, dict(betas=(0.0, 0.9), eps=1e-3, weight_decay=0.0)),
]
