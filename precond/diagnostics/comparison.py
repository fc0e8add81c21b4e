"""Spectra with and without a preconditioner, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .operators import hessian_operator
from .preconditioner import Preconditioner
from .spectra import Spectrum, spectrum_of


class Comparison(dict[str, Spectrum]):
    """A spectrum per name, and a table of them as ``str``."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        lines = [f"{'':{width}} {'smallest':>11} {'largest':>11} {'condition':>11}"]
        lines += [
            f"{name:{width}} {s.smallest:11.3e} {s.largest:11.3e} {s.condition:11.3e}" for name, s in self.items()
        ]
        return "\n".join(lines)


def compare(
    loss: Tensor | Callable[[], Tensor],
    params: Iterable[Tensor],
    preconditioners: Mapping[str, Preconditioner],
    *,
    nonzero: bool = False,
    rtol: float = 1e-10,
    tol: float = 1e-6,
) -> Comparison:
    """Compares the smallest and largest eigenvalue of P^T H P, and their ratio, for several P.

    Args:
        loss, params: as for :func:`hessian_operator`; a function is evaluated once.
        preconditioners: maps names to what :func:`hessian_operator` takes.
        nonzero, rtol, tol: as for :func:`condition_number`.

    Returns:
        A dictionary from names to ``Spectrum(smallest, largest, condition)``, which prints as a table.

    Raises:
        As :func:`hessian_operator` and :func:`condition_number`.

    Source: docs/theory.md, A.1.

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
        (name, spectrum_of(hessian_operator(loss, params, p), nonzero, rtol, tol))
        for name, p in preconditioners.items()
    )


def report(
    loss: Tensor | Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    nonzero: bool = False,
    rtol: float = 1e-10,
    tol: float = 1e-6,
) -> Comparison:
    """Compares the spectrum of the Hessian with and without an optimizer's preconditioner, at the present parameters.

    Args:
        loss: as for :func:`hessian_operator`.
        optimizer: one that has a preconditioner, diagonal or in a basis. Its parameters that require a gradient are p.
        nonzero, rtol, tol: as for :func:`condition_number`.

    Returns:
        The spectra for "identity" and for the optimizer, under its class's name, as :func:`compare` returns them.

    Raises:
        As :func:`hessian_operator` and :func:`condition_number`.

    Source: docs/theory.md, A.1.

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
    named: dict[str, Preconditioner] = {"identity": None, type(optimizer).__name__: optimizer}
    return compare(loss, params, named, nonzero=nonzero, rtol=rtol, tol=tol)
