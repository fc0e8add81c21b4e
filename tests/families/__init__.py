"""The table of optimizers, put together from the rows of each family: parity, reference, API, checkpoint and benchmark code
reads it. A new optimizer is rows in the file of its family, or a new file and its name below.
"""

from __future__ import annotations

import functools

from . import adagrad, adam, dual, gauss_newton, lion, perturb, rmsprop, sgd
from .row import Optimizer

__all__ = ["ALL_RULES", "BEYOND", "BY_RULE", "BY_STATES", "CLASSES", "DROP_INS", "OPTIMIZERS", "OVERWRITING", "WITH_PEER",
           "Optimizer", "stock"]  # fmt: skip

# Tolerances are from the worst of `python -m bench errors` (10 seeds x 3 steps x 72,000 elements x 9 mixes of dtypes): p 1.0 to
# 2.0 for the SGDs, 1.6 to 2.7 for the adaptive rules, but for steep ones.
_FAMILIES = (sgd, adam, adagrad, rmsprop, lion)
#: Rules that are an optimizer's whole step: every test of the table.
OPTIMIZERS = [row for family in _FAMILIES for row in family.ROWS]
#: Rules that are a pass of a method with several. They are held to the reference and to the same bits on every backend; what an
#: optimizer promises (checkpoints, groups, loss scaling, formats) is tested with the method, in its own file.
BEYOND = [*dual.ROWS, *gauss_newton.ROWS, *perturb.ROWS]
ALL_RULES = [*OPTIMIZERS, *BEYOND]
BY_RULE = {row.rule: row for row in ALL_RULES}
WITH_PEER = [row for row in OPTIMIZERS if row.peer is not None]
#: One row per class, for what does not depend on the rule.
CLASSES = [BY_RULE[rule] for family in _FAMILIES for rule in family.CLASSES]
#: One row per number of states, for what depends on where operands lie.
BY_STATES = [BY_RULE[rule] for rule in ("sgd", "sgd_momentum", "adamw", "adamw_amsgrad")]
#: Those that torch has too.
DROP_INS = [row for row in CLASSES if row.peer is not None]


def stock(row: Optimizer):
    """What a row is compared with: torch's class, or where torch has none ours on the reference backend."""
    return row.peer or functools.partial(row.cls, backend="reference")


#: Rules that overwrite their parameter or their first state, and so do not load it.
OVERWRITING = ("average", "perturb", "perturb_adaptive")
