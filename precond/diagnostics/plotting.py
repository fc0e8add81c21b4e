"""Plots of spectral densities."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from .._core.extras import need
from .spectra import Density


def plot(densities: Density | Mapping[str, Density], path: str | PathLike[str], *, title: str = "") -> None:
    """Plots spectral densities into a file, on a logarithmic scale.

    Args:
        densities: a result of :func:`spectral_density`, or a mapping from names to several.
        path: the file; its suffix sets the format (png, pdf, svg).
        title: the title of the plot (default none).

    Raises:
        ImportError: matplotlib is missing: ``pip install 'precond[diagnostics]'``.

    Example:
        >>> import tempfile, pathlib, numpy as np
        >>> from precond import diagnostics
        >>> from scipy.sparse.linalg import aslinearoperator
        >>> found = diagnostics.spectral_density(aslinearoperator(np.diag([1.0, 2.0, 3.0])))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "density.svg")
        ...     diagnostics.plot({"H": found}, path)
        ...     path.stat().st_size > 1000
        True
    """
    figures = need("matplotlib.figure", "a plot")
    named = {"": densities} if isinstance(densities, Density) else densities
    # Not pyplot, which keeps figures and looks for a display.
    figure = figures.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    top = 1e-300
    for name, found in named.items():
        axes.semilogy(found.grid.numpy(), found.density.clamp(min=1e-300).numpy(), label=name)
        top = max(top, found.density.max().item())
    axes.set(xlabel="eigenvalue", ylabel="density", title=title, ylim=(top * 1e-7, top * 2))
    if any(named):
        axes.legend()
    figure.savefig(path, dpi=120)
