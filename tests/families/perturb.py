"""The rows of the perturbations, the first pass of sharpness-aware methods."""

from __future__ import annotations

from .alone import Alone
from .row import Optimizer

ROWS = [
    Optimizer("perturb", Alone, dict(rule="perturb", numbers=dict(radius=0.05, scale=1.0, eps=0.0)), None, (2.0, 0.0)),
    Optimizer(
        "perturb_adaptive",
        Alone,
        dict(rule="perturb_adaptive", numbers=dict(radius=0.05, scale=1.2, eps=1e-3)),
        None,
        (4.0, 0.0, 0.0),
    ),
]
