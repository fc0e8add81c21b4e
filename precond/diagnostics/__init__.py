"""What a preconditioner does to a loss: spectra and condition numbers of P^T H P, and of the inputs of a layer.

For experiments, not for training loops. scipy and matplotlib are imported when a function needs them.
"""

from __future__ import annotations

from .comparison import Comparison, compare, report
from .layers import Standardized, layer_conditions, standardize
from .operators import gauss_newton_operator, hessian_operator
from .plotting import plot
from .preconditioner import Map, Preconditioner, preconditioner_of
from .spectra import Density, Extremes, Spectrum, condition_number, dense, extreme_eigenvalues, spectral_density

__all__ = [
    "Comparison",
    "Density",
    "Extremes",
    "Map",
    "Preconditioner",
    "Spectrum",
    "Standardized",
    "compare",
    "condition_number",
    "dense",
    "extreme_eigenvalues",
    "gauss_newton_operator",
    "hessian_operator",
    "layer_conditions",
    "plot",
    "preconditioner_of",
    "report",
    "spectral_density",
    "standardize",
]

# A pickle names the package, as it did when this was one file.
for _class in (Comparison, Density, Extremes, Spectrum, Standardized):
    _class.__module__ = __name__
del _class
