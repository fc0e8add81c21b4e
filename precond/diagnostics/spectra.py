"""Eigenvalues, condition numbers and densities of eigenvalues of any symmetric ``LinearOperator``, not only of a Hessian."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.extras import need
from .._core.precision import at_stated_precision

#: Up to this size all eigenvalues are computed, by n products: a Lanczos iteration takes 500 to 10,000 for the smallest one.
_SMALL = 1024
#: Up to this size all are computed where nothing else works: the matrix takes 128 MiB.
_DENSE = 4096


class Spectrum(NamedTuple):
    """Both ends of a spectrum, and their ratio."""

    smallest: float
    largest: float
    condition: float


class Extremes(NamedTuple):
    """The k smallest and the k largest eigenvalues, each in ascending order, float64."""

    smallest: Tensor
    largest: Tensor


class Density(NamedTuple):
    """A density of eigenvalues on a grid, and the quadrature it comes from: nodes, with weights that sum to 1. float64."""

    grid: Tensor
    density: Tensor
    nodes: Tensor
    weights: Tensor


@at_stated_precision
def dense(operator: Any) -> Tensor:
    """The matrix of a symmetric operator, (n, n) in float64, by n products and symmetrised.

    Example:
        >>> import numpy as np
        >>> from precond import diagnostics
        >>> from scipy.sparse.linalg import aslinearoperator
        >>> diagnostics.dense(aslinearoperator(np.diag([1.0, 2.0]))).tolist()
        [[1.0, 0.0], [0.0, 2.0]]
    """
    n = operator.shape[0]
    units = torch.eye(n, dtype=torch.float64, device="cpu")
    columns = [torch.from_numpy(operator.matvec(e.numpy())) for e in units]
    a = torch.stack(columns) if columns else units
    return (a + a.T) / 2


@at_stated_precision
def extreme_eigenvalues(operator: Any, k: int = 1, *, tol: float = 1e-6) -> Extremes:
    """The k smallest and the k largest eigenvalues.

    Up to n = 1024 all eigenvalues are computed; above, ARPACK's restarted Lanczos iteration finds both ends.

    Args:
        operator: symmetric, (n, n), such as :func:`hessian_operator` gives.
        k: how many at each end, from 1 to n (default 1).
        tol: bound of the iteration's residual, relative to each eigenvalue (default 1e-6; the error of the eigenvalue is about
            the square of that). Small eigenvalues that are close together, relative to the largest, need thousands of products.
            If 100 restarts are not enough, all eigenvalues are computed, up to n = 4096.

    Returns:
        ``Extremes(smallest, largest)``.

    Raises:
        ValueError: k is out of range.
        RuntimeError: no convergence above n = 4096 (``scipy.sparse.linalg.ArpackNoConvergence``): raise tol.
        ImportError: scipy is missing: ``pip install 'precond[diagnostics]'``.

    Source: ``scipy.sparse.linalg.eigsh``; Lehoucq, Sorensen and Yang 1998.

    Example:
        >>> import numpy as np
        >>> from precond import diagnostics
        >>> from scipy.sparse.linalg import aslinearoperator
        >>> smallest, largest = diagnostics.extreme_eigenvalues(aslinearoperator(np.diag(np.arange(1.0, 101.0))), 2)
        >>> [round(x, 6) for x in (smallest.tolist() + largest.tolist())]
        [1.0, 2.0, 99.0, 100.0]
    """
    scipy_linalg = need("scipy.sparse.linalg", "extreme eigenvalues")
    n = operator.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to n = {n}, got {k}")
    if n <= max(_SMALL, 4 * k):
        return _dense_extremes(operator, k)
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(n, dtype=torch.float64, device="cpu", generator=generator).numpy()
    # One Krylov space for both ends, of 128 dimensions: a third fewer products than with 64, where both converge at all.
    options = dict(which="BE", v0=start, tol=tol, ncv=min(n, max(128, 6 * k)), maxiter=100)
    try:
        found = scipy_linalg.eigsh(operator, 2 * k, return_eigenvectors=False, **options)
    except scipy_linalg.ArpackNoConvergence:
        if n > _DENSE:
            raise
        return _dense_extremes(operator, k)
    values = torch.from_numpy(found).sort().values
    return Extremes(values[:k], values[k:])


def _dense_extremes(operator: Any, k: int) -> Extremes:
    values = torch.linalg.eigvalsh(dense(operator))
    return Extremes(values[:k], values[len(values) - k :])


@at_stated_precision
def condition_number(operator: Any, *, nonzero: bool = False, rtol: float = 1e-10, tol: float = 1e-6) -> float:
    r"""The ratio kappa of the largest to the smallest eigenvalue, which says how fast gradient descent can converge.

    Near a minimiser, with the best learning rate, each step shrinks the error by a factor (kappa - 1) / (kappa + 1).

    Args:
        operator: symmetric, (n, n).
        nonzero: divide by the smallest eigenvalue that is not 0 (default False). Gradient descent does not move along directions
            on which the loss does not depend, such as those of a normalised network. Needs all eigenvalues, so n <= 4096.
        rtol: eigenvalues within rtol times the largest magnitude count as 0, with nonzero (default 1e-10: for float64; take 1e-5
            for float32).
        tol: of :func:`extreme_eigenvalues`.

    Returns:
        kappa >= 1; inf if the operator is not positive definite (with nonzero: not semidefinite, or 0).

    Raises:
        ValueError: nonzero with n > 4096.
        ImportError: scipy is missing: ``pip install 'precond[diagnostics]'``.

    Source: Polyak; the nonzero form is that of the BNP paper (Lange, Helfrich, Ye, JMLR 23(72), 2022) as
    docs/theory.md, A.3.2, has it.

    Example:
        >>> import numpy as np
        >>> from precond import diagnostics
        >>> from scipy.sparse.linalg import aslinearoperator
        >>> operator = aslinearoperator(np.diag([0.0, 2.0, 8.0]))
        >>> diagnostics.condition_number(operator), diagnostics.condition_number(operator, nonzero=True)
        (inf, 4.0)
    """
    return spectrum_of(operator, nonzero, rtol, tol).condition


@at_stated_precision
def spectrum_of(operator: Any, nonzero: bool, rtol: float, tol: float) -> Spectrum:
    """Both ends of an operator's spectrum, with the options of :func:`condition_number`."""
    if not nonzero:
        ends = extreme_eigenvalues(operator, tol=tol)
        smallest, largest = ends.smallest.item(), ends.largest.item()
    else:
        if operator.shape[0] > _DENSE:
            raise ValueError(f"nonzero must be False above n = {_DENSE}, got n = {operator.shape[0]}")
        values = torch.linalg.eigvalsh(dense(operator))
        values = values[values.abs() > rtol * values.abs().amax()]
        smallest, largest = (values[0].item(), values[-1].item()) if len(values) else (0.0, 0.0)
    return Spectrum(smallest, largest, largest / smallest if smallest > 0 else math.inf)


@at_stated_precision
def spectral_density(
    operator: Any,
    *,
    probes: int = 8,
    steps: int = 64,
    sigma: float | None = None,
    points: int = 1000,
    seed: int = 0,
) -> Density:
    r"""The density of all eigenvalues, smoothed, by stochastic Lanczos quadrature.

    .. math::
        \phi(t) = \frac1n \sum_i N(t; \lambda_i, \sigma^2)
        \approx \frac1{\text{probes}} \sum_v \sum_j \tau_{vj}^2\, N(t; \theta_{vj}, \sigma^2)

    where theta are the eigenvalues, and tau the first elements of the eigenvectors, of the tridiagonal matrix that a Lanczos
    iteration makes from a random unit vector v. The iteration is orthogonalised in full, twice, because lost orthogonality would
    count eigenvalues again. (scipy has none that serves: ARPACK's restarts for single eigenvalues and keeps no weights.)

    Args:
        operator: symmetric, (n, n).
        probes: number of random vectors, >= 1 (default 8). Means over the density have a relative error of about
            1 / sqrt(n probes).
        steps: products, and nodes, per probe, >= 1 (default 64; at most n are made). Memory: ``steps`` vectors of n float64.
        sigma: width of the Gaussians, > 0; None (default) is 1 % of the range of the nodes.
        points: lower bound of the number of grid points (default 1000); a small sigma takes more. The grid reaches 5 sigma beyond
            the nodes.
        seed: seed of the probes (default 0).

    Returns:
        ``Density(grid, density, nodes, weights)``; density integrates to 1 on the grid, by the trapezoidal rule.

    Raises:
        ValueError: an argument is out of range.

    Source: Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao, arXiv 1901.10159.

    Example:
        >>> import numpy as np, torch
        >>> from precond import diagnostics
        >>> from scipy.sparse.linalg import aslinearoperator
        >>> found = diagnostics.spectral_density(aslinearoperator(np.diag([1.0] * 90 + [5.0] * 10)), sigma=0.1)
        >>> near_five = found.grid > 3
        >>> round(torch.trapezoid(found.density, found.grid).item(), 6)
        1.0
        >>> 0.05 < torch.trapezoid(found.density[near_five], found.grid[near_five]).item() < 0.15
        True
    """
    for name, value in (("probes", probes), ("steps", steps), ("points", points)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if sigma is not None and not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be None or > 0, got {sigma}")
    generator = torch.Generator("cpu").manual_seed(seed)
    quadratures = [_quadrature(operator, steps, generator) for _ in range(probes)]
    nodes = torch.cat([q[0] for q in quadratures])
    weights = torch.cat([q[1] for q in quadratures]) / probes
    low, high = nodes.min().item(), nodes.max().item()
    if sigma is None:
        sigma = (high - low) / 100 or max(abs(high), 1.0) / 100
    low, high = low - 5 * sigma, high + 5 * sigma
    points = max(points, math.ceil(4 * (high - low) / sigma))
    grid = torch.linspace(low, high, points, dtype=torch.float64, device="cpu")
    density = torch.zeros_like(grid)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        density += weight * torch.exp(-0.5 * ((grid - node) / sigma) ** 2)
    return Density(grid, density / torch.trapezoid(density, grid), nodes, weights)


def _quadrature(operator: Any, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Nodes and weights of one Lanczos iteration."""
    n = operator.shape[0]
    v = torch.randn(n, dtype=torch.float64, device="cpu", generator=generator)
    basis = (v / v.norm())[None]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    while True:
        w = torch.from_numpy(operator.matvec(basis[-1].numpy()))
        size = w.norm()
        diagonal.append(w @ basis[-1])
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        rest = w.norm()
        # In an invariant subspace only rounding errors are left.
        if len(diagonal) == min(steps, n) or rest <= 1e-12 * size:
            break
        beside.append(rest)
        basis = torch.cat([basis, (w / rest)[None]])
    t = torch.stack(diagonal).diag()
    if beside:
        t += torch.stack(beside).diag(1) + torch.stack(beside).diag(-1)
    nodes, vectors = torch.linalg.eigh(t)
    return nodes, vectors[0].square()
