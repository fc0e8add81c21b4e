"""The table of optimizers: one row per rule, read by parity, reference, API, checkpoint and benchmark code."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import precond


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One rule and how to get it. ``ulps``: tolerance in fp32 ulp of the operands, for p and for each state."""

    rule: str
    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]
    peer: type[torch.optim.Optimizer] | None
    ulps: tuple[float, ...]

    def __str__(self) -> str:
        return self.rule


# Worst of 20 seeds x 4 steps x 70,000 elements: p 1.0 to 1.7 for sgd, 1.7 to 2.9 for adamw; states 1.0 to 1.4.
OPTIMIZERS = [
    Optimizer("sgd", precond.SGD, dict(lr=0.1, weight_decay=0.03), torch.optim.SGD, (2.0,)),
    Optimizer(
        "sgd_momentum",
        precond.SGD,
        dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.03, maximize=True),
        torch.optim.SGD,
        (2.0, 2.0),
    ),
    Optimizer(
        "sgd_nesterov",
        precond.SGD,
        dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.03),
        torch.optim.SGD,
        (2.0, 2.0),
    ),
    Optimizer("adamw", precond.AdamW, dict(lr=0.05, weight_decay=0.1), torch.optim.AdamW, (4.0, 2.0, 2.0)),
    Optimizer(
        "adamw_amsgrad",
        precond.AdamW,
        dict(lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, amsgrad=True, maximize=True),
        torch.optim.AdamW,
        (4.0, 2.0, 2.0, 2.0),
    ),
    Optimizer("adamw_l1", precond.AdamW, dict(lr=0.05, weight_decay=0.1, l1_decay=0.6), None, (4.0, 2.0, 2.0)),
    Optimizer(
        "adamw_l1_amsgrad",
        precond.AdamW,
        dict(lr=0.05, weight_decay=0.1, l1_decay=0.6, l1_cap=0.5, amsgrad=True),
        None,
        (4.0, 2.0, 2.0, 2.0),
    ),
    Optimizer(
        "adamw_l1_subgradient",
        precond.AdamW,
        dict(lr=0.05, weight_decay=0.1, l1_decay=0.6, l1_form="subgradient"),
        None,
        (4.0, 2.0, 2.0),
    ),
    Optimizer(
        "adamw_l1_subgradient_amsgrad",
        precond.AdamW,
        dict(lr=0.05, weight_decay=0.1, l1_decay=0.6, l1_form="subgradient", amsgrad=True),
        None,
        (4.0, 2.0, 2.0, 2.0),
    ),
]
WITH_PEER = [row for row in OPTIMIZERS if row.peer is not None]
#: One row per class, for what does not depend on the rule.
CLASSES = [next(row for row in OPTIMIZERS if row.rule == name) for name in ("sgd_momentum", "adamw")]
