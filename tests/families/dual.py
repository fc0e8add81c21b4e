"""The rows of the dual maps, and of the passes of a method before and after one."""

from __future__ import annotations

import precond

from .alone import Alone
from .row import Optimizer

_DUAL = dict(lr=0.1, granularity="entry", weight_decay=0.03, scale=0.3)
_AVERAGED = dict(momentum=0.9, nesterov=True, maximize=True)
_KERNELS = {"ratio": ("adam", 3.0), "smoothed": ("smoothed", 3.0), "clip": ("clip", 3.0), "asinh": ("asinh", 6.0)}
_KERNELS |= {"log": ("log", 6.0), "power": ("power", 6.0)}

ROWS = [
    Optimizer("average", Alone, dict(rule="average", numbers=dict(momentum=0.9, lookahead=0.1)), None, (3.0, 3.0)),
    Optimizer("directed", Alone, dict(rule="directed", numbers=dict(weight_decay=0.03)), None, (3.0, 0.0)),
    *(
        Optimizer(
            f"dual_{name}{suffix}", precond.DualDescent, _DUAL | dict(kernel=kernel) | options, None, ulps, bool(suffix)
        )
        for name, (kernel, error) in _KERNELS.items()
        for suffix, options, ulps in (("", {}, (error,)), ("_momentum", _AVERAGED, (error + 1.0, 3.0)))
    ),
]
