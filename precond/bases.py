"""Orthogonal bases for diagonal preconditioners: eigenbases of matrices and their refresh, Kronecker-factored bases, and the
geodesic between two bases. Called by methods that rotate gradients, and by experiments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._core import iteration
from ._core.extras import need
from ._core.precision import at_stated_precision


@at_stated_precision
def interpolate_basis(u0: Tensor, u1: Tensor, s: float | Tensor, *, match: bool = True) -> Tensor:
    r"""A basis on the geodesic from one orthonormal basis to another.

    .. math::
        U_s = U_0 \exp(s \log(U_0^T U_1)), \qquad s \in [0, 1]

    The order and the signs of eigenvectors are arbitrary, so :func:`match_columns` first brings U_1 close to U_0. The logarithm
    is the principal one of the rotation nearest to U_0^T U_1. It is a sum of plane rotations whose angles are multiplied by s, so
    U_s is orthogonal for every s. For Kronecker-factored bases interpolate the factors: U_s = L_s (x) R_s.

    Args:
        u0, u1: real orthogonal matrices (d, d) whose columns are the basis vectors. 16-bit matrices are not orthogonal enough.
        s: a number in [0, 1], or a tensor of n such numbers.
        match: True (default) matches columns first; the path then ends at U_1 up to the order and signs of its columns. False
            ends exactly at u1, by a longer path.

    Returns:
        U_s (d, d), or (n, d, d), of u0's dtype and on its device. Computed in float64 on the CPU, O(d^3) once for all s.

    If u1 turns a plane of u0 by exactly pi (an eigenvalue of -1, twice), both directions are equally short and one is taken.

    Raises:
        ValueError: the matrices are not square, differ in shape, or are not orthogonal within the square root of the dtype's
            precision; s is outside [0, 1]; with match=False, det(u0^T u1) < 0, so that no rotation leads to u1.
        ImportError: scipy is missing: ``pip install 'precond[diagnostics]'``.

    Source: the summary of Liu et al., arXiv 2510.13680, names a "geodesic interpolation method between bases"; the construction
    is derived in docs/theory.md, C.4.

    Example:
        >>> import torch, precond
        >>> quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
        >>> half_way = precond.interpolate_basis(torch.eye(2, dtype=torch.float64), quarter, 0.5, match=False)
        >>> [[round(x, 6) for x in row] for row in half_way.tolist()]
        [[0.707107, -0.707107], [0.707107, 0.707107]]
        >>> precond.interpolate_basis(torch.eye(2), quarter.float(), 0.5).tolist()  # the same two axes: nothing to do
        [[1.0, 0.0], [0.0, 1.0]]
    """
    _check_pair(u0, u1)
    parts = torch.as_tensor(s, dtype=torch.float64, device="cpu").detach()
    if parts.ndim > 1 or not bool(((parts >= 0) & (parts <= 1)).all()):
        raise ValueError(f"s must be in [0, 1], a number or a tensor of one dimension, got {s!r}")
    start = _wide(u0)
    target = match_columns(u0, u1)[0].detach().double().cpu() if match else _wide(u1)
    z, planes, angles = _rotation(start.T @ target)
    moved = (start @ z).expand(*parts.shape, *start.shape).clone()
    if planes:
        turn = parts[..., None, None] * angles
        i, j = (torch.tensor(side, device="cpu") for side in zip(*planes, strict=True))
        first, second = moved[..., i], moved[..., j]
        moved[..., i] = torch.cos(turn) * first + torch.sin(turn) * second
        moved[..., j] = torch.cos(turn) * second - torch.sin(turn) * first
    return (moved @ z.T).to(u0)


@at_stated_precision
def distance(u0: Tensor, u1: Tensor, *, match: bool = True) -> float:
    """The length of the path that :func:`interpolate_basis` takes, the Frobenius norm of log(u0^T u1).

    Args:
        u0, u1, match: as for :func:`interpolate_basis`, with its errors.

    Returns:
        A number from 0 to pi sqrt(d).

    Source: docs/theory.md, C.4.

    Example:
        >>> import math, torch
        >>> from precond import bases
        >>> quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> round(bases.distance(torch.eye(2), quarter, match=False) / (math.pi / 2), 6), bases.distance(torch.eye(2), quarter)
        (1.414214, 0.0)
    """
    _check_pair(u0, u1)
    target = match_columns(u0, u1)[0].detach().double().cpu() if match else _wide(u1)
    _, _, angles = _rotation(_wide(u0).T @ target)
    return math.sqrt(2.0) * float(angles.norm())


@at_stated_precision
def match_columns(u0: Tensor, u1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orders and signs the columns of one basis so that they are closest to another.

    The order maximises the sum of ``|u0^T u1|`` on the diagonal (an assignment problem), and signs make the diagonal positive. If
    the determinant of u0^T u1 is then -1, the worst fitting column is flipped back, so that a rotation leads from u0 to the
    result.

    Args:
        u0, u1: as for :func:`interpolate_basis`, with its errors.

    Returns:
        ``(matched, order, signs)`` with ``matched = u1[:, order] * signs``. Reorder states per column of u1 likewise.

    Source: docs/theory.md, C.4.

    Example:
        >>> import torch
        >>> from precond import bases
        >>> matched, order, signs = bases.match_columns(torch.eye(3), torch.tensor([[0.0, 1, 0], [0, 0, -1], [-1, 0, 0]]))
        >>> torch.equal(matched, torch.eye(3)), order.tolist(), signs.tolist()
        (True, [1, 2, 0], [1.0, -1.0, -1.0])
    """
    _check_pair(u0, u1)
    scipy_optimize = need("scipy.optimize", "matching columns")
    overlap = _wide(u0).T @ _wide(u1)
    _, columns = scipy_optimize.linear_sum_assignment(overlap.abs().numpy(), maximize=True)
    order = torch.as_tensor(columns, dtype=torch.int64, device="cpu")
    matched = overlap[:, order]
    signs = torch.where(matched.diagonal() < 0, -1.0, 1.0).double()
    if torch.linalg.det(matched * signs) < 0:
        signs[matched.diagonal().abs().argmin()] *= -1
    order, signs = order.to(u1.device), signs.to(u1)
    return u1[:, order] * signs, order, signs


def _wide(u: Tensor) -> Tensor:
    return u.detach().cpu().double()


def _check_pair(u0: Tensor, u1: Tensor) -> None:
    for name, u in (("u0", u0), ("u1", u1)):
        _check_square(name, u)
        wide = u.detach().double()
        error = (
            (wide.T @ wide - torch.eye(len(u), dtype=torch.float64, device=u.device)).abs().amax() if len(u) else 0.0
        )
        if not error <= torch.finfo(u.dtype).eps ** 0.5:
            raise ValueError(f"{name} must be orthogonal, got u^T u off the identity by {float(error):.1e}")
    if u0.shape != u1.shape:
        raise ValueError(f"u0 and u1 must have one shape, got {tuple(u0.shape)} and {tuple(u1.shape)}")


def _check_square(name: str, a: Tensor) -> None:
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.is_floating_point():
        raise ValueError(f"{name} must be a square matrix of real floats, got shape {tuple(a.shape)} of {a.dtype}")


def _rotation(q: Tensor) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
    """Planes, in an orthonormal basis z, and angles in (-pi, pi] of the rotation nearest to q."""
    scipy_linalg = need("scipy.linalg", "the logarithm of a rotation")
    left, _, right = torch.linalg.svd(q)
    q = left @ right
    if torch.linalg.det(q) < 0:
        raise ValueError("u0^T u1 must have determinant 1, got -1: match=True flips a column")
    # The real Schur form of a normal matrix has blocks of size 1 and 2 only, and an orthonormal basis even if angles repeat.
    t, z = map(torch.from_numpy, scipy_linalg.schur(q.numpy(), output="real"))
    below = t.diagonal(-1)
    pairs = [i for i in range(len(below)) if below[i] != 0]
    alone = sorted(set(range(len(t))) - set(pairs) - {i + 1 for i in pairs})
    reversed_ = [i for i in alone if t[i, i] < 0]  # an even number, since the determinant is 1
    angles = [math.atan2(t[i + 1, i] - t[i, i + 1], t[i, i] + t[i + 1, i + 1]) for i in pairs]
    planes = [(i, i + 1) for i in pairs] + list(itertools.pairwise(reversed_))[::2]
    turned = angles + [math.pi] * (len(reversed_) // 2)
    return z, planes, torch.tensor(turned, dtype=torch.float64, device="cpu")


# Bases of a matrix.


@at_stated_precision
def eigenbasis(a: Tensor) -> Tensor:
    """Eigenvectors of a symmetric positive semidefinite matrix, largest eigenvalue first.

    Args:
        a: (d, d), real and symmetric; only the lower triangle is read. Any scale works, since a is divided by its largest
            magnitude. A null space gets an arbitrary orthonormal basis.

    Returns:
        (d, d), orthogonal, the eigenvectors as columns; of a's dtype, float32 for 16-bit ones. If the decomposition fails, it is
        tried again on a float64 copy with a little noise on the diagonal.

    Raises:
        ValueError: a is not square, or contains inf or NaN.

    Source: the first step of SOAP (Vyas et al., arXiv 2409.11321, as its public code has it: ``eigh``, flipped); the scaling
    and the second try are this project's.

    Example:
        >>> import torch
        >>> from precond import bases
        >>> bases.eigenbasis(torch.diag(torch.tensor([1.0, 3.0, 2.0]))).abs().tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    scaled = _scaled(a)
    try:
        _, vectors = torch.linalg.eigh(scaled)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Different noise per coordinate separates the eigenvalues on which the iteration did not converge.
        noise = torch.linspace(1.0, 2.0, len(a), dtype=torch.float64, device=a.device) * 1e-10
        _, vectors = torch.linalg.eigh(scaled.double() + noise.diag())
    return torch.flip(vectors, (-1,)).to(scaled.dtype)


@at_stated_precision
def refreshed(basis: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    r"""One step of orthogonal iteration: moves a basis towards the eigenvectors of a matrix that has changed a little.

    .. math::
        Q' = \mathrm{qr}((A + \epsilon \lVert A \rVert I)\, Q_{:,\, \mathrm{order}}), \qquad
        \mathrm{order} = \mathrm{argsort}(-\mathrm{diag}(Q^T A Q))

    Signs are chosen so that no column turns by more than 90 degrees. epsilon is 16 sqrt(d) times the dtype's precision, which is
    more than the rounding errors of A Q: without it these would decide where columns in the null space of A go. A = 0 changes
    nothing. The norm is the largest magnitude.

    Args:
        basis: Q (d, d), orthogonal.
        a: A (d, d), symmetric positive semidefinite, of any scale.

    Returns:
        ``(Q', order)``: Q' has the dtype of basis, float32 for 16-bit ones; order (d,), int64, permutes states per column of Q
        for use with Q': ``state[:, order]``.

    Raises:
        ValueError: the matrices are not square, differ in shape, or a contains inf or NaN.

    Source: SOAP (Vyas et al., arXiv 2409.11321), as its public code has it; signs and epsilon are this project's.

    Example:
        >>> import torch
        >>> from precond import bases
        >>> basis, order = bases.refreshed(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> basis.abs().tolist(), order.tolist()
        ([[0.0, 1.0], [1.0, 0.0]], [1, 0])
    """
    _check_square("basis", basis)
    if basis.shape != a.shape:
        raise ValueError(f"basis and a must have one shape, got {tuple(basis.shape)} and {tuple(a.shape)}")
    scaled = _scaled(a)
    basis = basis.to(torch.promote_types(basis.dtype, torch.float32))[None]
    scaled = scaled.to(basis.dtype)[None]
    found, spread = iteration.refreshed(basis, scaled)
    new, order, _ = iteration.settled(found, float(spread), 0, basis, scaled)
    return new, order


def _scaled(a: Tensor) -> Tensor:
    """A matrix over its largest magnitude, at least in float32."""
    _check_square("a", a)
    largest = iteration.largest_of(a)
    if not bool(torch.isfinite(largest)):
        raise ValueError("a must be finite, got inf or NaN in it")
    return iteration.normalised(a, largest)


# Kronecker bases: U = L (x) R for a matrix parameter, which is rotated by its two small factors.


@at_stated_precision
def rotate(g: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Rotates a matrix into a Kronecker basis: L^T G R.

    Args:
        g: G (m, n), or a batch (..., m, n).
        left, right: L (m, m) and R (n, n), orthogonal, the basis vectors as columns, or one for each matrix of the batch; None
            is the identity.

    Returns:
        A tensor like g; ``rotate_back`` is the inverse.

    Raises:
        ValueError: g has fewer than two dimensions, or a factor does not fit.

    Source: docs/theory.md, C.1; SOAP, arXiv 2409.11321.

    Example:
        >>> import torch
        >>> from precond import bases
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> bases.rotate(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), swap, None).tolist()
        [[3.0, 4.0], [1.0, 2.0]]
    """
    _check_factors(g, left, right)
    g = g if left is None else left.mT @ g
    return g if right is None else g @ right


@at_stated_precision
def rotate_back(g: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Rotates a matrix out of a Kronecker basis, L G R^T: the inverse of :func:`rotate`, with its arguments and errors.

    Source: docs/theory.md, C.1; SOAP, arXiv 2409.11321.

    Example:
        >>> import torch
        >>> from precond import bases
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> g = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> torch.equal(bases.rotate_back(bases.rotate(g, turn, turn), turn, turn), g)
        True
    """
    _check_factors(g, left, right)
    g = g if left is None else left @ g
    return g if right is None else g @ right.mT


def _check_factors(g: Tensor, left: Tensor | None, right: Tensor | None) -> None:
    if g.ndim < 2:
        raise ValueError(f"g must be a matrix, got shape {tuple(g.shape)}")
    for name, factor, size in (("left", left, g.shape[-2]), ("right", right, g.shape[-1])):
        if factor is not None and (factor.ndim < 2 or factor.shape[-2:] != (size, size)):
            raise ValueError(
                f"{name} must have shape {(size, size)} for g of {tuple(g.shape)}, got {tuple(factor.shape)}"
            )


def merged_shape(shape: Sequence[int], max_size: int, *, keep: int = 0) -> tuple[int, ...]:
    """A shape with fewer dimensions: neighbours are merged as long as their product is at most max_size.

    Args:
        shape: the shape of a contiguous tensor.
        max_size: >= 1; a dimension that is larger is not merged.
        keep: number of leading dimensions that are never merged (default 0, as in SOAP, which makes vectors of small tensors; 1
            keeps a convolution a matrix of output channels by patches).

    Returns:
        The shape for ``reshape``. Dimensions of 1 are dropped, except one if there is no other.

    Raises:
        ValueError: max_size < 1, or keep is not between 0 and the number of dimensions.

    Source: ``merge_dims`` of SOAP's public code (arXiv 2409.11321); keep is this project's.

    Example:
        >>> from precond import bases
        >>> bases.merged_shape((64, 3, 7, 7), 1000), bases.merged_shape((64, 3, 7, 7), 10000, keep=1)
        ((192, 49), (64, 147))
    """
    _check_size(max_size)
    if not 0 <= keep <= len(shape):
        raise ValueError(f"keep must be between 0 and {len(shape)}, got {keep}")
    kept, merged, size = tuple(shape[:keep]), [], 1
    for n in shape[keep:]:
        if size * n <= max_size:
            size *= n
        else:
            merged += [size] if size > 1 else []
            size = n
    if size > 1 or not (kept or merged):
        merged.append(size)
    return (*kept, *merged)


def blocks(shape: Sequence[int], max_size: int) -> list[tuple[slice, ...]]:
    """Cuts a tensor into blocks whose sides are at most max_size.

    Args:
        shape: the shape of the tensor, with any number of dimensions.
        max_size: >= 1, the side of a block; the last block of each dimension is what is left.

    Returns:
        Indices ``tensor[block]``, which tile the tensor, the last dimension fastest.

    Raises:
        ValueError: max_size < 1.

    Source: the blocks of Distributed Shampoo (Shi et al., arXiv 2309.06497; its public code's ``max_preconditioner_dim``).

    Example:
        >>> from precond import bases
        >>> for rows, columns in bases.blocks((5, 4), 4):
        ...     print(rows, columns)
        slice(0, 4, None) slice(0, 4, None)
        slice(4, 5, None) slice(0, 4, None)
    """
    _check_size(max_size)
    sides = [[slice(i, min(i + max_size, n)) for i in range(0, n, max_size)] for n in shape]
    return list(itertools.product(*sides))


def _check_size(max_size: int) -> None:
    if max_size < 1:
        raise ValueError(f"max_size must be >= 1, got {max_size}")
