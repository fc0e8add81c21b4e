"""P^T H P and P^T G P as ``scipy.sparse.linalg.LinearOperator``: products, nothing of H's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import curvature
from .._core.extras import need
from .._core.precision import at_stated_precision
from .preconditioner import Preconditioner, maps_of


def hessian_operator(
    loss: Tensor | Callable[[], Tensor], params: Iterable[Tensor], preconditioner: Preconditioner = None
) -> Any:
    r"""P^T H P as a ``scipy.sparse.linalg.LinearOperator``: the Hessian of the loss as a function of z, where p = P z.

    Products use :func:`precond.curvature.hessian_product`, so nothing of H's size is stored. The graph of the gradient lives as
    long as the operator. A function is evaluated once, so that dropout and batches do not change between products.

    Args:
        loss: a scalar with its graph, or a function without arguments that returns one.
        params: the tensors that make up p, n elements in all, which require a gradient. Use float64 if you need more than about
            six digits of an eigenvalue.
        preconditioner: P. None (default) is the identity; a sequence with one tensor per parameter, or a mapping from parameters
            to tensors, is a diagonal. An optimizer gives the P that its last step left: :func:`preconditioner_of`, or for SOAP
            and GaussNewton in a basis U, U times such a diagonal. A pair of functions, P and its transpose, from a list of
            tensors to a list of tensors, is any P.

    Returns:
        A symmetric operator (n, n) in float64, over the elements of params in order.

    Raises:
        TypeError: loss is not a scalar; preconditioner is of another kind, or an optimizer without one (Lion, Muon, DualDescent).
        ValueError: a parameter is complex, or preconditioner does not fit or is not finite.
        ImportError: scipy is missing: ``pip install 'precond[diagnostics]'``.

    Source: Ye, arXiv 2410.00232; docs/theory.md, A.1.

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
    """P^T G P as an operator, where G is the Gauss-Newton matrix. Unlike the Hessian of a network it is positive semidefinite.

    Args:
        outputs, loss_fn: as for :func:`precond.curvature.gauss_newton_product`.
        params, preconditioner: as for :func:`hessian_operator`.

    Returns, raises: as :func:`hessian_operator`.

    Source: Schraudolph 2002; docs/theory.md, A.1 and C.1.

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
    if found := [position for position, p in enumerate(params) if p.is_complex()]:
        raise ValueError(f"params must be real, got complex ones at positions {found}")
    times = product()
    into, out_of = maps_of(preconditioner, params)
    sizes = [p.numel() for p in params]

    @at_stated_precision
    def matvec(z: Any) -> Any:
        parts = torch.split(torch.from_numpy(z.reshape(-1).astype("float64")), sizes)
        moved = out_of(times(into([part.view(p.shape).to(p) for part, p in zip(parts, params, strict=True)])))
        return torch.cat([t.detach().reshape(-1).double().cpu() for t in moved]).numpy()

    n = sum(sizes)
    return scipy_linalg.LinearOperator((n, n), matvec=matvec, rmatvec=matvec, dtype="float64")
