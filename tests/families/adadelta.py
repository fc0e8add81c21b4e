"""The rows of Adadelta and AdadeltaW."""

from __future__ import annotations

import torch

import precond

from .row import Optimizer, intrinsic

# With a larger eps, so that steps and what acc_delta adds to them show.
_ADADELTA = dict(lr=0.5, eps=1e-3, weight_decay=0.1)

ROWS = [
    Optimizer("adadelta", precond.Adadelta, _ADADELTA, torch.optim.Adadelta, (4.0, 2.0, 5.0), True),
    *intrinsic("adadeltaw", precond.AdadeltaW, _ADADELTA | dict(maximize=True), (4.0, 2.0, 5.0), l1_decay=0.6),
]
#: One rule per class.
CLASSES = ("adadelta", "adadeltaw")
#: Without decay. acc_delta has the last step in it.
NEXT = [(precond.Adadelta, {}), (precond.AdadeltaW, dict(weight_decay=0.0))]
