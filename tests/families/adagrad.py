"""The rows of Adagrad and AdagradW."""

from __future__ import annotations

import torch

import precond

from .row import Optimizer, intrinsic

_ADAGRAD = dict(lr=0.05, lr_decay=0.1, initial_accumulator_value=0.1, weight_decay=0.1)

ROWS = [
    Optimizer("adagrad", precond.Adagrad, _ADAGRAD, torch.optim.Adagrad, (4.0, 2.0), True),
    *intrinsic("adagradw", precond.AdagradW, _ADAGRAD, (4.0, 2.0), l1_decay=0.6),
]
#: One rule per class.
CLASSES = ("adagrad", "adagradw")
#: Without momentum and decay.
MOVES = [(precond.Adagrad, dict(initial_accumulator_value=0.1)), (precond.AdagradW, dict(weight_decay=0.0))]
