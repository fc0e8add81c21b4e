"""The rows of RMSprop and RMSpropW."""

from __future__ import annotations

import torch

import precond

from .row import Optimizer, intrinsic

_RMSPROP = dict(lr=0.05, alpha=0.9, weight_decay=0.1)
_CENTERED = dict(lr=0.05, alpha=0.9, weight_decay=0.1, centered=True, maximize=True)

ROWS = [
    Optimizer("rmsprop", precond.RMSprop, _RMSPROP, torch.optim.RMSprop, (4.0, 2.0), True),
    Optimizer("rmsprop_centered", precond.RMSprop, _CENTERED, torch.optim.RMSprop, (4.0, 2.0, 2.0), True),
    Optimizer(
        "rmsprop_momentum", precond.RMSprop, _RMSPROP | dict(momentum=0.8), torch.optim.RMSprop, (4.0, 2.0, 4.0), True
    ),
    Optimizer(
        "rmsprop_centered_momentum",
        precond.RMSprop,
        _CENTERED | dict(momentum=0.8),
        torch.optim.RMSprop,
        (4.0, 2.0, 4.0, 2.0),
        True,
    ),
    *intrinsic("rmspropw", precond.RMSpropW, _RMSPROP, (4.0, 2.0), l1_decay=0.6),
    *intrinsic("rmspropw", precond.RMSpropW, _CENTERED, (4.0, 2.0, 2.0), "_centered", True, l1_decay=0.6),
    *intrinsic(
        "rmspropw",
        precond.RMSpropW,
        _RMSPROP | dict(momentum=0.8),
        (4.0, 2.0, 4.0),
        "_momentum",
        l1_decay=0.6,
        l1_cap=0.5,
    ),
    *intrinsic(
        "rmspropw",
        precond.RMSpropW,
        _CENTERED | dict(momentum=0.8),
        (4.0, 2.0, 4.0, 2.0),
        "_centered_momentum",
        True,
        l1_decay=0.6,
    ),
]
#: One rule per class.
CLASSES = ("rmsprop_centered_momentum", "rmspropw_momentum")
#: Without momentum and decay.
MOVES = [
    (precond.RMSprop, dict(alpha=0.9, eps=1e-3)),
    (precond.RMSpropW, dict(alpha=0.9, eps=1e-3, weight_decay=0.0, centered=True)),
]
