"""The table of optimizers: one row per rule, read by parity, reference, API, checkpoint and benchmark code."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

import precond


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One rule and how to get it. ``ulps``: tolerance in fp32 ulp of the operands, for p and for each state. ``steep``: the
    result may be that of operands a few ulp away, because the rule has a jump or a cancellation.
    """

    rule: str
    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]
    peer: type[torch.optim.Optimizer] | None
    ulps: tuple[float, ...]
    steep: bool = False

    def __str__(self) -> str:
        return self.rule


def intrinsic(name, cls, kwargs, ulps, suffix="", steep=False, peer=None, **l1) -> list[Optimizer]:
    """A rule with each intrinsic decay; with L2 alone it may have a peer."""
    forms = {"": {}, "_l1": l1, "_l1_subgradient": l1 | {"l1_form": "subgradient"}}
    return [
        Optimizer(f"{name}{infix}{suffix}", cls, kwargs | options, None if infix else peer, ulps, steep)
        for infix, options in forms.items()
    ]


_SGD = dict(lr=0.1, weight_decay=0.03)
_MOMENTUM = dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.03, maximize=True)
_NESTEROV = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.03)
_ADAM = dict(lr=0.05, weight_decay=0.1)
_AMSGRAD = dict(lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, amsgrad=True, maximize=True)
_ADAGRAD = dict(lr=0.05, lr_decay=0.1, initial_accumulator_value=0.1, weight_decay=0.1)
_RMSPROP = dict(lr=0.05, alpha=0.9, weight_decay=0.1)
_CENTERED = dict(lr=0.05, alpha=0.9, weight_decay=0.1, centered=True, maximize=True)

# Worst of `python -m bench errors` (10 seeds x 3 steps x 72,000 elements x 9 mixes of dtypes): p 1.0 to 2.0 for the SGDs, 1.6 to
# 2.7 for the adaptive rules, but for steep ones.
OPTIMIZERS = [
    Optimizer("sgd", precond.SGD, _SGD, torch.optim.SGD, (2.0,)),
    Optimizer("sgd_momentum", precond.SGD, _MOMENTUM, torch.optim.SGD, (2.0, 2.0)),
    Optimizer("sgd_nesterov", precond.SGD, _NESTEROV, torch.optim.SGD, (2.0, 2.0)),
    *intrinsic("sgdw", precond.SGDW, _SGD, (3.0,), l1_decay=0.6),
    *intrinsic("sgdw", precond.SGDW, _MOMENTUM, (3.0, 2.0), "_momentum", l1_decay=0.6),
    *intrinsic("sgdw", precond.SGDW, _NESTEROV, (3.0, 2.0), "_nesterov", l1_decay=0.6),
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
    Optimizer("adagrad", precond.Adagrad, _ADAGRAD, torch.optim.Adagrad, (4.0, 2.0), True),
    *intrinsic("adagradw", precond.AdagradW, _ADAGRAD, (4.0, 2.0), l1_decay=0.6),
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
    *intrinsic("lion", precond.Lion, dict(lr=0.05, weight_decay=0.1), (2.0, 2.0), steep=True, l1_decay=0.6),
]
BY_RULE = {row.rule: row for row in OPTIMIZERS}
WITH_PEER = [row for row in OPTIMIZERS if row.peer is not None]
#: One row per class, for what does not depend on the rule.
CLASSES = [
    BY_RULE[rule]
    for rule in (
        "sgd_momentum",
        "sgdw_momentum",
        "adam",
        "adamw",
        "adagrad",
        "adagradw",
        "rmsprop_centered_momentum",
        "rmspropw_momentum",
        "lion",
    )
]
#: One row per number of states, for what depends on where operands lie.
BY_STATES = [BY_RULE[rule] for rule in ("sgd", "sgd_momentum", "adamw", "adamw_amsgrad")]
#: Those that torch has too.
DROP_INS = [row for row in CLASSES if row.peer is not None]


def stock(row: Optimizer):
    """What a row is compared with: torch's class, or where torch has none ours on the reference backend."""
    return row.peer or functools.partial(row.cls, backend="reference")
