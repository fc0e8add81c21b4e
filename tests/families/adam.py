"""The rows of Adam and AdamW."""

from __future__ import annotations

import torch

import precond

from .row import Optimizer, intrinsic

_ADAM = dict(lr=0.05, weight_decay=0.1)
_AMSGRAD = dict(lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, amsgrad=True, maximize=True)

ROWS = [
    Optimizer("adam", precond.Adam, _ADAM, torch.optim.Adam, (4.0, 2.0, 2.0), True),
    Optimizer("adam_amsgrad", precond.Adam, _AMSGRAD, torch.optim.Adam, (4.0, 2.0, 2.0, 2.0), True),
    *intrinsic("adamw", precond.AdamW, _ADAM, (4.0, 2.0, 2.0), peer=torch.optim.AdamW, l1_decay=0.6),
    *intrinsic(
        "adamw",
        precond.AdamW,
        _AMSGRAD,
        (4.0, 2.0, 2.0, 2.0),
        "_amsgrad",
        peer=torch.optim.AdamW,
        l1_decay=0.6,
        l1_cap=0.5,
    ),
]
#: One rule per class.
CLASSES = ("adam", "adamw")
#: Without momentum and decay.
MOVES = [
    (precond.Adam, dict(betas=(0.0, 0.9), eps=1e-3)),
    (precond.AdamW, dict(betas=(0.0, 0.9), eps=1e-3, weight_decay=0.0, amsgrad=True)),
]
