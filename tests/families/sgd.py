"""The rows of SGD and SGDW."""

from __future__ import annotations

import torch

import precond

from .row import Optimizer, intrinsic

_SGD = dict(lr=0.1, weight_decay=0.03)
_MOMENTUM = dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.03, maximize=True)
_NESTEROV = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.03)

ROWS = [
    Optimizer("sgd", precond.SGD, _SGD, torch.optim.SGD, (2.0,)),
    Optimizer("sgd_momentum", precond.SGD, _MOMENTUM, torch.optim.SGD, (2.0, 2.0)),
    Optimizer("sgd_nesterov", precond.SGD, _NESTEROV, torch.optim.SGD, (2.0, 2.0)),
    *intrinsic("sgdw", precond.SGDW, _SGD, (3.0,), l1_decay=0.6),
    *intrinsic("sgdw", precond.SGDW, _MOMENTUM, (3.0, 2.0), "_momentum", l1_decay=0.6),
    *intrinsic("sgdw", precond.SGDW, _NESTEROV, (3.0, 2.0), "_nesterov", l1_decay=0.6),
]
#: One rule per class.
CLASSES = ("sgd_momentum", "sgdw_momentum")
#: Without momentum and decay.
MOVES = [(precond.SGD, {}), (precond.SGDW, dict(weight_decay=0.0))]
