"""What a preconditioner does to a loss: spectra and condition numbers of P^T H P, and of a layer's inputs however normalised.

For experiments, not for training loops. scipy and matplotlib are imported when a function needs them. One file, since every
function but the last four is about one object, an operator; half of it is docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import curvature
from ._core.conversions import to_torch_state_dict
from ._core.extras import need
from ._core.optimizer import FusedOptimizer
from .adagrad import AdagradW
from .rmsprop import RMSpropW
from .sgd import SGDW

Map = Callable[[list[Tensor]], Sequence[Tensor]]
#: None; P elementwise, per parameter; an optimizer; or P and its transpose as functions of lists of tensors.
Preconditioner = None | Mapping[Tensor, Tensor] | Sequence[Tensor] | torch.optim.Optimizer | tuple[Map, Map]

#: Up to this size all eigenvalues are computed, by n products: a Lanczos iteration needs 500 to 10,000 for the smallest one.
_SMALL = 1024
#: Up to this size they are where there is no other way: 128 MiB.
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


class Standardized(NamedTuple):
    """Inputs of mean 0 and variance 1, and the constants for inputs to come: ``(x - mean) / scale``."""

    values: Tensor
    mean: Tensor
    scale: Tensor


class Comparison(dict[str, Spectrum]):
    """A spectrum per name, and a table of them as ``str``."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        lines = [f"{'':{width}} {'smallest':>11} {'largest':>11} {'condition':>11}"]
        lines += [
            f"{name:{width}} {s.smallest:11.3e} {s.largest:11.3e} {s.condition:11.3e}" for name, s in self.items()
        ]
        return "\n".join(lines)


# The operator.


def hessian_operator(
    loss: Tensor | Callable[[], Tensor], params: Iterable[Tensor], preconditioner: Preconditioner = None
) -> Any:
    r"""P^T H P as a ``scipy.sparse.linalg.LinearOperator``: the Hessian of the loss as a function of z, where p = P z.

    H u is :func:`precond.curvature.hessian_product`, so nothing of H's size is stored. The graph of the gradient lives as long as
    the operator; a function is evaluated once, so that dropout and batches do not change between products.

    Args:
        loss: a scalar with its graph, or a function without arguments that returns one.
        params: the tensors that p consists of, requiring a gradient: n elements in all. float64 where eigenvalues shall have more
            than about six digits.
        preconditioner: None (default) is the identity. A sequence with a tensor per parameter, or a mapping from parameters to
            them, is a diagonal P. An optimizer stands for :func:`preconditioner_of` it. A pair of functions, P and its transpose,
            each from a list of tensors to one, is any P: a method that mixes coordinates.

    Returns:
        A symmetric operator (n, n) in float64, over the elements of params in order.

    Raises:
        TypeError: loss is no scalar, or a preconditioner of another kind.
        ValueError: complex parameters, or a preconditioner that does not fit or is not finite.
        ImportError: scipy is missing: ``pip install 'precond[diagnostics]'``.

    Source: Ye, arXiv 2410.00232; METHODS A.1.

    Example:
        >>> import torch
        >>> from precond import diagnostics
        >>> w = torch.ones(2, requires_grad=True)
        >>> operator = diagnostics.hessian_operator(lambda: (w[0] ** 2 + 50 * w[1] ** 2), [w], [torch.tensor([1.0, 0.1])])
        >>> [round(x, 5) for x in diagnostics.dense(operator).flatten().tolist()]
        [2.0, 0.0, 0.0, 1.0]
    """
    params = list(params)
    if callable(loss):
        with torch.enable_grad():
            loss = loss()
    return _operator(lambda: curvature.hessian_of(loss, params), params, preconditioner)


def gauss_newton_operator(
    outputs: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    params: Iterable[Tensor],
    preconditioner: Preconditioner = None,
) -> Any:
    """P^T G P as an operator, with G the Gauss-Newton matrix: positive semidefinite where the Hessian of a network is not.

    Args:
        outputs, loss_fn: as for :func:`precond.curvature.gauss_newton_product`.
        params, preconditioner: as for :func:`hessian_operator`.

    Returns, raises: as :func:`hessian_operator`.

    Source: Schraudolph 2002; METHODS A.1 and C.1.

    Example:
        >>> import torch
        >>> from precond import diagnostics
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> operator = diagnostics.gauss_newton_operator(w**2, lambda z: z.square().sum() / 2, [w])
        >>> diagnostics.dense(operator).tolist()
        [[4.0, 0.0], [0.0, 16.0]]
    """
    params = list(params)
    return _operator(lambda: curvature.gauss_newton_of(outputs, loss_fn, params), params, preconditioner)


def _operator(product: Callable[[], curvature.Product], params: list[Tensor], preconditioner: Preconditioner) -> Any:
    scipy_linalg = need("scipy.sparse.linalg", "an operator")
    if any(p.is_complex() for p in params):
        raise ValueError("params must be real, got complex ones")
    times = product()
    into, out_of = _maps(preconditioner, params)
    sizes = [p.numel() for p in params]

    def matvec(z: Any) -> Any:
        parts = torch.split(torch.from_numpy(z.reshape(-1).astype("float64")), sizes)
        moved = out_of(times(into([part.view(p.shape).to(p) for part, p in zip(parts, params, strict=True)])))
        return torch.cat([t.detach().reshape(-1).double().cpu() for t in moved]).numpy()

    n = sum(sizes)
    return scipy_linalg.LinearOperator((n, n), matvec=matvec, rmatvec=matvec, dtype="float64")


def _maps(preconditioner: Preconditioner, params: list[Tensor]) -> tuple[Map, Map]:
    """P and its transpose."""
    given: Any = preconditioner
    if given is None:
        return list, list
    if isinstance(given, torch.optim.Optimizer):
        given = preconditioner_of(given)
    if isinstance(given, Mapping):
        missing = sum(p not in given for p in params)
        if missing:
            raise ValueError(
                f"preconditioner must have every parameter, got none for {missing} of {len(params)}: "
                "an optimizer has one after a step on it"
            )
        given = [given[p] for p in params]
    if not isinstance(given, Sequence) or not all(isinstance(t, Tensor) for t in given):
        if isinstance(given, Sequence) and len(given) == 2 and all(map(callable, given)):
            return tuple(given)
        raise TypeError(
            "preconditioner must be None, an optimizer, a mapping or sequence of tensors, or a pair of functions, "
            f"got a {type(given).__name__}"
        )
    shapes = [tuple(p.shape) for p in params], [tuple(t.shape) for t in given]
    if shapes[0] != shapes[1]:
        raise ValueError(f"preconditioner must have the parameters' shapes {shapes[0]}, got {shapes[1]}")
    if not all(bool(t.isfinite().all()) for t in given):
        raise ValueError("preconditioner must be finite, got inf or NaN in it")
    scales = [t.detach().to(p) for t, p in zip(given, params, strict=True)]

    def scaled(vectors: list[Tensor]) -> list[Tensor]:
        return [scale * u for scale, u in zip(scales, vectors, strict=True)]

    return scaled, scaled


def preconditioner_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    r"""The diagonal P in whose variables z = P^{-1} p an optimizer is gradient descent, from its states.

    .. math::
        P = \mathrm{den}^{-1/2}, \qquad \mathrm{den} = \sqrt{v / (1 - \beta_2^t)} + \epsilon
        \;\text{(Adam)}, \quad \sqrt{s} + \epsilon \;\text{(Adagrad)}, \quad \sqrt{v} + \epsilon \;\text{(RMSprop)}

    amsgrad takes the largest v, centered RMSprop the variance. Momentum is not part of P. SGD has P = 1.

    Args:
        optimizer: Adam, Adagrad, RMSprop or SGD of torch or precond, or one of precond's with a W; with any ``state_format``.

    Returns:
        P, in float32 or wider, for every real parameter that has been stepped; for SGD for all parameters.

    Raises:
        TypeError: another optimizer: Lion's sign is not a P, and one that mixes coordinates needs a pair of functions.

    Source: Ye, arXiv 2410.00232; the table of METHODS A.1.

    Example:
        >>> import torch, precond
        >>> from precond import diagnostics
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = precond.RMSprop([w], alpha=0.0, eps=0.0)
        >>> w.grad = torch.tensor([4.0, 100.0])
        >>> opt.step()
        >>> [round(x, 6) for x in diagnostics.preconditioner_of(opt)[w].tolist()]
        [0.5, 0.1]
    """
    optim = torch.optim
    if isinstance(optimizer, optim.SGD | SGDW):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return {p: torch.ones_like(p, dtype=_at_least_single(p), requires_grad=False) for p in params}
    if isinstance(optimizer, optim.Adam | optim.AdamW):
        den_of = _adam_den
    elif isinstance(optimizer, optim.Adagrad | AdagradW):
        den_of = _adagrad_den
    elif isinstance(optimizer, optim.RMSprop | RMSpropW):
        den_of = _rmsprop_den
    else:
        raise TypeError(
            f"optimizer must be an Adam, Adagrad, RMSprop or SGD of torch or precond, got a {type(optimizer).__name__}"
        )
    grouped = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    # A state dict numbers the parameters in this order, and that one has decoded states.
    decoded = to_torch_state_dict(optimizer)["state"] if isinstance(optimizer, FusedOptimizer) else None
    found = {}
    for i, (group, p) in enumerate(grouped):
        state = optimizer.state.get(p, {}) if decoded is None else decoded.get(i, {})
        if float(state.get("step", 0)) > 0 and not p.is_complex():
            found[p] = den_of(group, state).pow(-0.5).to(_at_least_single(p))
    return found


def _at_least_single(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _adam_den(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    v: Tensor = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    correction: float = 1 - float(group["betas"][1]) ** float(state["step"])
    return (v.double() / correction).sqrt() + float(group["eps"])


def _adagrad_den(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    s: Tensor = state["sum"]
    return s.double().sqrt() + float(group["eps"])


def _rmsprop_den(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    v: Tensor = state["square_avg"].double()
    if group["centered"]:
        v = (v - state["grad_avg"].double().square()).clamp(min=0)
    return v.sqrt() + float(group["eps"])


# Spectra. An operator is any symmetric LinearOperator, not only a Hessian.


def dense(operator: Any) -> Tensor:
    """The matrix of a symmetric operator, (n, n) in float64, by n products; symmetrised.

    Example:
        >>> import numpy as np
        >>> from precond import diagnostics
        >>> from scipy.sparse.linalg import aslinearoperator
        >>> diagnostics.dense(aslinearoperator(np.diag([1.0, 2.0]))).tolist()
        [[1.0, 0.0], [0.0, 2.0]]
    """
    n = operator.shape[0]
    columns = [torch.from_numpy(operator.matvec(e.numpy())) for e in torch.eye(n, dtype=torch.float64)]
    a = torch.stack(columns) if columns else torch.zeros(0, 0, dtype=torch.float64)
    return (a + a.T) / 2


def extreme_eigenvalues(operator: Any, k: int = 1, *, tol: float = 1e-6) -> Extremes:
    """Eigenvalues at both ends of the spectrum: up to n = 1024 all are computed, above by ARPACK's restarted Lanczos iteration.

    Args:
        operator: symmetric, (n, n), such as :func:`hessian_operator` gives.
        k: how many at each end, from 1 to n (default 1).
        tol: of the iteration's residual, relative to each eigenvalue (default 1e-6; the eigenvalue's own error is of the order of
            its square). Small eigenvalues that lie close together, relative to the largest, need thousands of products; where
            100 restarts are not enough, all eigenvalues are computed up to n = 4096.

    Returns:
        ``Extremes(smallest, largest)``.

    Raises:
        ValueError: k out of range.
        RuntimeError: no convergence above n = 4096, ``scipy.sparse.linalg.ArpackNoConvergence``: raise tol.
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
    start = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
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


def condition_number(operator: Any, *, nonzero: bool = False, rtol: float = 1e-10, tol: float = 1e-6) -> float:
    r"""The largest over the smallest eigenvalue, which says how fast gradient descent can converge.

    With the best learning rate an error shrinks by (kappa - 1) / (kappa + 1) per step near a minimiser.

    Args:
        operator: symmetric, (n, n).
        nonzero: take the smallest eigenvalue that is not 0 (default False). Where a loss does not depend on some direction, as
            that of a normalised network, gradient descent does not move there. Needs all eigenvalues, so n <= 4096.
        rtol: eigenvalues within rtol times the largest magnitude count as 0, with nonzero (default 1e-10: for float64; take 1e-5
            for float32).
        tol: of :func:`extreme_eigenvalues`.

    Returns:
        kappa >= 1; inf where the operator is not positive definite (with nonzero: not semidefinite, or 0).

    Raises:
        ValueError: nonzero for a larger operator.
        ImportError: scipy is missing: ``pip install 'precond[diagnostics]'``.

    Source: Polyak; the nonzero form is that of the BNP paper (Lange, Helfrich, Ye, JMLR 23(72), 2022) as METHODS A.3.2 has it.

    Example:
        >>> import numpy as np
        >>> from precond import diagnostics
        >>> from scipy.sparse.linalg import aslinearoperator
        >>> operator = aslinearoperator(np.diag([0.0, 2.0, 8.0]))
        >>> diagnostics.condition_number(operator), diagnostics.condition_number(operator, nonzero=True)
        (inf, 4.0)
    """
    return _spectrum(operator, nonzero, rtol, tol).condition


def _spectrum(operator: Any, nonzero: bool, rtol: float, tol: float) -> Spectrum:
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

    with theta and tau the eigenvalues and the first elements of the eigenvectors of the tridiagonal matrix of a Lanczos iteration
    from a random unit vector v. scipy offers no such iteration: ARPACK's is restarted for single eigenvalues and keeps no
    weights. Ours is orthogonalised in full, twice, since lost orthogonality would count eigenvalues again.

    Args:
        operator: symmetric, (n, n).
        probes: random vectors, >= 1 (default 8). Means over the density have a relative error of about 1 / sqrt(n probes).
        steps: products per probe, >= 1 (default 64), and nodes; at most n are made. Memory: steps vectors of n float64.
        sigma: width of the Gaussians, > 0; None (default) is 1 % of the range of the nodes.
        points: of the grid, at least (default 1000); more where sigma needs them. The grid reaches 5 sigma beyond the nodes.
        seed: of the probes (default 0).

    Returns:
        ``Density(grid, density, nodes, weights)``; density integrates to 1 on the grid, by the trapezoidal rule.

    Raises:
        ValueError: an argument out of range.

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
    generator = torch.Generator().manual_seed(seed)
    quadratures = [_quadrature(operator, steps, generator) for _ in range(probes)]
    nodes = torch.cat([q[0] for q in quadratures])
    weights = torch.cat([q[1] for q in quadratures]) / probes
    low, high = nodes.min().item(), nodes.max().item()
    if sigma is None:
        sigma = (high - low) / 100 or max(abs(high), 1.0) / 100
    low, high = low - 5 * sigma, high + 5 * sigma
    grid = torch.linspace(low, high, max(points, math.ceil(4 * (high - low) / sigma)), dtype=torch.float64)
    density = torch.zeros_like(grid)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        density += weight * torch.exp(-0.5 * ((grid - node) / sigma) ** 2)
    return Density(grid, density / torch.trapezoid(density, grid), nodes, weights)


def _quadrature(operator: Any, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Nodes and weights of one Lanczos iteration."""
    n = operator.shape[0]
    v = torch.randn(n, dtype=torch.float64, generator=generator)
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
        # What is left of an invariant subspace is rounding.
        if len(diagonal) == min(steps, n) or rest <= 1e-12 * size:
            break
        beside.append(rest)
        basis = torch.cat([basis, (w / rest)[None]])
    t = torch.stack(diagonal).diag()
    if beside:
        t += torch.stack(beside).diag(1) + torch.stack(beside).diag(-1)
    nodes, vectors = torch.linalg.eigh(t)
    return nodes, vectors[0].square()


# Comparisons.


def compare(
    loss: Tensor | Callable[[], Tensor],
    params: Iterable[Tensor],
    preconditioners: Mapping[str, Preconditioner],
    *,
    nonzero: bool = False,
    rtol: float = 1e-10,
    tol: float = 1e-6,
) -> Comparison:
    """Both ends of the spectrum of P^T H P and their ratio, for several P.

    Args:
        loss, params: as for :func:`hessian_operator`; a function is evaluated once.
        preconditioners: names, and what :func:`hessian_operator` takes.
        nonzero, rtol, tol: as for :func:`condition_number`.

    Returns:
        A dictionary from names to ``Spectrum(smallest, largest, condition)``, which prints as a table.

    Raises:
        as :func:`hessian_operator` and :func:`condition_number`.

    Source: METHODS A.1.

    Example:
        >>> import torch
        >>> from precond import diagnostics
        >>> w = torch.zeros(2, requires_grad=True)
        >>> found = diagnostics.compare(w[0] ** 2 + 100 * w[1] ** 2, [w], {"plain": None, "P": [torch.tensor([1.0, 0.1])]})
        >>> print(found)
                 smallest     largest   condition
        plain   2.000e+00   2.000e+02   1.000e+02
        P       2.000e+00   2.000e+00   1.000e+00
    """
    params = list(params)
    if callable(loss):
        with torch.enable_grad():
            loss = loss()
    return Comparison(
        (name, _spectrum(hessian_operator(loss, params, p), nonzero, rtol, tol)) for name, p in preconditioners.items()
    )


def report(
    loss: Tensor | Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    nonzero: bool = False,
    rtol: float = 1e-10,
    tol: float = 1e-6,
) -> Comparison:
    """What an optimizer's preconditioner does to the condition number of the loss where its parameters are now.

    Args:
        loss: as for :func:`hessian_operator`.
        optimizer: as for :func:`preconditioner_of`; its parameters that require a gradient are p.
        nonzero, rtol, tol: as for :func:`condition_number`.

    Returns:
        The spectra of "identity" and of the optimizer, by the name of its class: :func:`compare`.

    Raises:
        as :func:`preconditioner_of`, :func:`hessian_operator` and :func:`condition_number`.

    Source: METHODS A.1.

    Example:
        >>> import torch, precond
        >>> from precond import diagnostics
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> def loss():
        ...     return w[0] ** 2 + 100 * w[1] ** 2
        >>> opt = precond.Adam([w], lr=1e-3)
        >>> loss().backward()
        >>> opt.step()
        >>> print(diagnostics.report(loss, opt))
                    smallest     largest   condition
        identity   2.000e+00   2.000e+02   1.000e+02
        Adam       1.000e+00   1.000e+00   1.000e+00
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    rows = {"identity": None, type(optimizer).__name__: preconditioner_of(optimizer)}
    return compare(loss, params, rows, nonzero=nonzero, rtol=rtol, tol=tol)


def standardize(inputs: Tensor) -> Standardized:
    """Inputs of mean 0 and variance 1 in each feature: what BNP makes of a layer's inputs without touching them.

    Args:
        inputs: (..., m), a feature per column, real; all other dimensions are samples.

    Returns:
        ``Standardized(values, mean, scale)``, float32 for halves; test inputs take the same constants. A constant feature
        becomes 0, with scale 1. The variance is the biased one.

    Raises:
        ValueError: no sample.

    Source: METHODS A.3.2.

    Example:
        >>> import torch
        >>> from precond import diagnostics
        >>> values, mean, scale = diagnostics.standardize(torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
        >>> values.tolist(), mean.tolist(), scale.tolist()
        ([[-1.0, 0.0], [1.0, 0.0]], [2.0, 7.0], [1.0, 1.0])
    """
    rows = _rows(inputs)
    rows = rows.to(_at_least_single(rows))
    constant = (rows == rows[0]).all(0)  # its deviations from a rounded mean would be blown up
    mean = torch.where(constant, rows[0], rows.mean(0))
    scale = torch.where(constant, 1.0, rows.var(0, correction=0).sqrt())
    return Standardized(((rows - mean) / scale).view(inputs.shape), mean, scale)


def layer_conditions(
    inputs: Tensor,
    *,
    eps1: float = 1e-2,
    eps2: float = 1e-4,
    batch_size: int | None = None,
    eps: float = 1e-5,
) -> dict[str, float]:
    r"""Condition numbers of a dense layer's extended inputs, [1, inputs], as they are and normalised in several ways.

    The Hessian of a mean loss with respect to one output's bias and weights is X^T S X, with X the extended inputs and S
    diagonal, so kappa(H) <= kappa(X)^2 kappa(S). Small is good; 1 is best.

    ==============  ======================================================================================================
    "inputs"        as they are
    "centred"       minus their means: BNP's U
    "standardized"  (x - mean) / sqrt(var): BNP's U D without regularisation
    "bnp"           (x - mean) / sqrt(var + eps1 max(var) + eps2): BNP's U D as it is used
    "batch_norm"    (x - mean) / sqrt(var + eps) within each batch
    "layer_norm"    (x - mean) / sqrt(var + eps) within each sample
    ==============  ======================================================================================================

    Args:
        inputs: (..., m), a feature per column; all other dimensions are samples, more than features to say something.
        eps1, eps2: BNP's, >= 0 (defaults 1e-2 and 1e-4, as recalled from the paper). eps1 is relative to the largest
            variance: features of less than 1 % of it stay small.
        batch_size: of batch normalisation, >= 1; None (default): all samples are one batch.
        eps: of batch and layer normalisation, >= 0 (default 1e-5, torch's).

    Returns:
        The largest over the smallest nonzero singular value, computed in float64, for each name; nan where all are 0. Zero is
        what is below numerical rank: layer normalisation always makes the columns sum to 0, and gradient descent does not move
        along that direction.

    Raises:
        ValueError: no sample, or an argument out of range.

    Source: BNP (Lange, Helfrich, Ye, JMLR 23(72), 2022); METHODS A.3.

    Example:
        >>> import torch
        >>> from precond import diagnostics
        >>> x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1.0, 10.0, 100.0])
        >>> {name: round(kappa, 1) for name, kappa in diagnostics.layer_conditions(x).items() if name != "layer_norm"}
        {'inputs': 1029.9, 'centred': 1029.9, 'standardized': 1.1, 'bnp': 103.0, 'batch_norm': 1.1}
    """
    for name, value in (("eps1", eps1), ("eps2", eps2), ("eps", eps)):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be None or >= 1, got {batch_size}")
    x = _rows(inputs).detach().double()
    mean, var = x.mean(0), x.var(0, correction=0)

    def normalized(t: Tensor, dim: int) -> Tensor:
        return (t - t.mean(dim, keepdim=True)) / (t.var(dim, correction=0, keepdim=True) + eps).sqrt()

    size = len(x) if batch_size is None else batch_size
    forms = {
        "inputs": x,
        "centred": x - mean,
        "standardized": standardize(x).values,
        "bnp": (x - mean) / (var + eps1 * var.amax() + eps2).sqrt(),
        "batch_norm": torch.cat([normalized(x[i : i + size], 0) for i in range(0, len(x), size)]),
        "layer_norm": normalized(x, 1),
    }
    return {name: _kappa(t) for name, t in forms.items()}


def _rows(inputs: Tensor) -> Tensor:
    if inputs.ndim < 1 or inputs.numel() == 0 or not inputs.is_floating_point():
        raise ValueError(
            f"inputs must be real floats (..., m) with samples, got {tuple(inputs.shape)} of {inputs.dtype}"
        )
    return inputs.reshape(-1, inputs.shape[-1])


def _kappa(x: Tensor) -> float:
    """The condition number of [1, x] among singular values that are not 0."""
    extended = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
    values = torch.linalg.svdvals(extended)
    values = values[values > values[0] * max(extended.shape) * torch.finfo(values.dtype).eps]
    return (values[0] / values[-1]).item() if len(values) else math.nan


def plot(densities: Density | Mapping[str, Density], path: str | PathLike[str], *, title: str = "") -> None:
    """Draw spectral densities into a file, on a logarithmic scale.

    Args:
        densities: what :func:`spectral_density` gave, or names and several of them.
        path: of the file; its suffix says the format (png, pdf, svg).
        title: above the picture (default none).

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
    # Not pyplot: it keeps figures, and looks for a display.
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
