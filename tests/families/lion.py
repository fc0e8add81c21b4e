"""The rows of Lion."""

from __future__ import annotations

import precond

from .row import intrinsic

ROWS = [
    *intrinsic("lion", precond.Lion, dict(lr=0.05, weight_decay=0.1), (2.0, 2.0), steep=True, l1_decay=0.6),
]
#: One rule per class.
CLASSES = ("lion",)
