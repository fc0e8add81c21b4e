"""The problems of docs/theory.md, each solved by the classes of precond: rows of expected and measured, for bench/theory.py.

The expected numbers come from float64 experiments without the library. Where their random numbers are not known, ours
are others, and the tolerance is what that allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from . import ghane, liu, moskovitz, ye
from .row import Row as Row

Table = Callable[[dict[str, Any]], Iterator[Row]]
TABLES: dict[str, Table] = {
    "A.2.2": ye.l1_fixed_points,
    "A.3.6": ye.bnp_conditioning,
    "B.3": ghane.thresholds,
    "B.4": ghane.dual_bias,
    "B.4 Adam": ghane.adam_bias,
    "B.4 Muon": ghane.spectral_momentum,
    "B.4 SOAP": ghane.soap_bias,
    "C.3.1": liu.block_covariance,
    "C.3.2": liu.logistic,
    "C.3.4": liu.quadrants,
    "D.2": moskovitz.fop,
    "D.2 noise": moskovitz.fop_noise,
}
#: Seconds altogether.
QUICK = ("A.3.6", "C.3.2", "D.2")
