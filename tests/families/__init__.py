"""The table of optimizers, put together from the rows of each family: parity, reference, API, checkpoint and benchmark code
reads it. A new optimizer is rows in the file of its family.
"""

from __future__ import annotations

import functools
import importlib

from precond.reference import FAMILIES

from .row import Optimizer

__all__ = ["ALL_RULES", "BEYOND", "BY_RULE", "BY_STATES", "CLASSES", "DROP_INS", "MOVES", "NEXT", "OPTIMIZERS",
           "OVERWRITING", "WITH_PEER", "Optimizer", "stock"]  # fmt: skip

# Tolerances are from the worst of `python -m bench errors` (10 seeds x 3 steps x 72,000 elements x 9 mixes of dtypes): p 1.0 to
# 2.0 for the SGDs, 1.6 to 2.7 for the adaptive rules, but for steep ones.
_FILES = [importlib.import_module(f"{__name__}.{family}") for family in FAMILIES]
#: Those of whole steps: they say which row stands for each class.
_FAMILIES = [file for file in _FILES if hasattr(file, "CLASSES")]
#: Rules that are an optimizer's whole step: every test of the table.
OPTIMIZERS = [row for family in _FAMILIES for row in family.ROWS]
#: Rules that are a pass of a method with several. They are held to the reference and to the same bits on every backend; what an
#: optimizer promises (checkpoints, groups, loss scaling, formats) is tested with the method, in its own file.
BEYOND = [row for file in _FILES if file not in _FAMILIES for row in file.ROWS]
ALL_RULES = [*OPTIMIZERS, *BEYOND]
#: Classes with options without momentum and decay, so that a step is lr P P^T times the gradient.
MOVES = [move for file in _FAMILIES for move in getattr(file, "MOVES", [])]
#: The same for classes that have P P^T of their next step, not of the last one.
NEXT = [move for file in _FAMILIES for move in getattr(file, "NEXT", [])]
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
