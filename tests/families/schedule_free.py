"""The rows of ScheduleFreeAdamW and ScheduleFreeSGD."""

from __future__ import annotations

import precond

from .row import Optimizer

_AVERAGE = dict(weight_decay=0.1, warmup_steps=2)

ROWS = [
    Optimizer(
        "schedule_free_adamw",
        precond.ScheduleFreeAdamW,
        _AVERAGE | dict(lr=0.05, betas=(0.8, 0.95), r=0.5),
        None,
        (3.0, 3.0, 2.0),
    ),
    Optimizer(
        "schedule_free_sgd",
        precond.ScheduleFreeSGD,
        _AVERAGE | dict(lr=0.2, momentum=0.8, weight_lr_power=1.5, maximize=True),
        None,
        (2.0, 2.0),
    ),
]
#: One rule per class.
CLASSES = ("schedule_free_adamw", "schedule_free_sgd")
#: Almost without the interpolation, which may not be 0, and without decay.
MOVES = [(precond.ScheduleFreeAdamW, dict(betas=(1e-13, 0.9), eps=1e-3))]
NEXT = [(precond.ScheduleFreeSGD, dict(momentum=1e-13))]
