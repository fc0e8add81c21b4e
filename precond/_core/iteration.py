"""One step of orthogonal iteration for a batch of symmetric matrices, in matrix products. Called by ``precond.bases`` and by the
methods that keep Kronecker bases.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Cholesky factors of at most this size are LAPACK's or cuSOLVER's; larger ones are products of these.
_LEAF = 64
#: Triangular products are cut into this many block columns, which leaves (1 + 1 / 4) / 2 of the full product.
_PANELS = 4
#: Where Householder QR is used: LAPACK's takes 3.7 products of matrices of 512 x 512 (one thread), which leaves nothing to gain.
_REFLECTS = ("cpu",)
#: How far from orthogonal the columns may be that one Cholesky factor makes so: the product of the largest diagonal elements of
#: their Gram matrix and of its inverse. At 1 they are orthogonal; the factor's error grows with it.
_SPREAD = 4.0
#: How far they may be for a second one to finish it; beyond, float32 has too few digits for the first.
_SPREAD_OF_TWO = 1e4


class Refreshed(NamedTuple):
    """New bases Q', the order of the old columns in them, and the turn Q[:, order]^T Q'."""

    basis: Tensor
    order: Tensor
    turn: Tensor


def largest_of(a: Tensor) -> Tensor:
    """The largest magnitude of a matrix, at least in float32: inf or NaN where it has any."""
    wide = a.detach().to(torch.promote_types(a.dtype, torch.float32))
    return wide.abs().amax() if wide.numel() else wide.new_ones(())


def normalised(a: Tensor, largest: Tensor) -> Tensor:
    """A matrix, or each one of a batch, over its largest magnitude."""
    return a.detach().to(largest.dtype) / torch.where(largest > 0, largest, 1.0)[..., None, None]


def shift_of(size: int, dtype: torch.dtype) -> float:
    """What is added to the diagonal of a normalised matrix: more than the rounding errors of its products."""
    return float(16 * size**0.5 * torch.finfo(dtype).eps)


def refreshed(basis: Tensor, a: Tensor) -> tuple[Refreshed, Tensor]:
    """One step of orthogonal iteration of normalised matrices (k, d, d): the Q of A Q + shift Q, its columns sorted by the
    diagonal of Q^T A Q. The second result says how far from orthogonal each was before its last step: ``settled`` reads it.

    A QR decomposition is a sequence of small steps, which a GPU does badly. There the same Q comes from products. With
    B = Q^T A Q = L D L^T (Cholesky), A Q = Q B = (Q L)(D L^T), so that the Q of Q L is looked for: the iteration is the LR
    algorithm of B. L has ones on its diagonal and is near the identity where the basis is near the eigenvectors, however
    ill-conditioned A is. So one Cholesky factor of (Q L)^T (Q L) orthogonalises it to the precision of the dtype, also where
    Q was not orthogonal itself. Plain Cholesky QR of A Q would square the condition of A.
    """
    before, product, order = _sorted(basis, a)
    if a.device.type in _REFLECTS:
        return by_householder(before, product, order), before.new_ones(len(a))
    return _by_products(before, product, order)


def settled(found: Refreshed, spread: float, i: int, basis: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Basis, order and turn of the matrix with number i of a batch that was ``refreshed``, orthogonal to the dtype's precision:
    as they are, after a second Cholesky factor, or by reflections.
    """
    one = Refreshed(*(t[i : i + 1] for t in found))
    if not spread <= _SPREAD:
        again = _orthogonalised(one.basis, one.turn) if spread <= _SPREAD_OF_TWO else None
        if again is not None and float(again[2]) <= _SPREAD:
            one = Refreshed(again[0], one.order, again[1])
        else:
            one = by_householder(*_sorted(basis[i : i + 1], a[i : i + 1]))
    return one.basis[0], one.order[0], one.turn[0]


def _sorted(basis: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of Q and of A Q, and their order."""
    product = a @ basis
    order = torch.argsort((basis * product).sum(-2), dim=-1, descending=True, stable=True)
    columns = order[:, None, :].expand_as(basis)
    return basis.gather(-1, columns), product.gather(-1, columns), order


def by_householder(before: Tensor, product: Tensor, order: Tensor) -> Refreshed:
    """The same by Householder reflections, from sorted columns of Q and A Q."""
    # torch.linalg.qr without R, which it copies.
    shifted = product + shift_of(before.shape[-1], before.dtype) * before
    q = torch.linalg.householder_product(*torch.geqrf(shifted))
    q = q * torch.where((before * q).sum(-2, keepdim=True) < 0, -1.0, 1.0).to(q.dtype)
    return Refreshed(q, order, before.mT @ q)


def _by_products(before: Tensor, product: Tensor, order: Tensor) -> tuple[Refreshed, Tensor]:
    size = before.shape[-1]
    inside = _lower(before.mT, product.mT)
    inside.diagonal(dim1=-2, dim2=-1).add_(shift_of(size, before.dtype))
    factor, _, failed = _cholesky(inside, inverse=False)
    unit = factor / factor.diagonal(dim1=-2, dim2=-1)[..., None, :]
    new, turn, spread = _orthogonalised(_times_lower(before, unit), unit)
    return Refreshed(new, order, turn), torch.where(failed == 0, spread, torch.inf)


def _orthogonalised(x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X R^-1 with the R of X = Q R by one Cholesky factor; the same of a matrix of turns; and how far from orthogonal X was, inf
    where there is no factor.
    """
    gram = _lower(x.mT, x.mT)
    _, inverse, failed = _cholesky(gram, inverse=True)
    assert inverse is not None
    # 1 for orthogonal columns. Where one is long or nearly in the span of others, the factor leaves more than rounding.
    spread = gram.diagonal(dim1=-2, dim2=-1).amax(-1) * inverse.square().sum(-2).amax(-1)
    spread = torch.where((failed == 0) & spread.isfinite(), spread, torch.inf)
    upper = inverse.mT
    turn = _times_upper(unit, upper)
    return _times_upper(x, upper), turn, spread


def _panels(size: int) -> list[slice]:
    width = max(_LEAF, -(-size // _PANELS))
    return [slice(i, min(i + width, size)) for i in range(0, size, width)]


def square_of(x: Tensor) -> Tensor:
    """X X^T of a batch, by its lower triangle."""
    out, parts = _lower(x, x), _panels(x.shape[-2])
    for part in parts[1:]:
        out[..., : part.start, part] = out[..., part, : part.start].mT
    return out


def _lower(x: Tensor, y: Tensor) -> Tensor:
    """The lower triangle of X Y^T; what is above its blocks is not set."""
    out = x.new_empty(*x.shape[:-1], y.shape[-2])
    for part in _panels(x.shape[-2]):
        out[..., part, : part.stop] = x[..., part, :] @ y[..., : part.stop, :].mT
    return out


def _times_lower(x: Tensor, lower: Tensor) -> Tensor:
    """X L with a lower triangular L."""
    return torch.cat([x[..., part.start :] @ lower[..., part.start :, part] for part in _panels(x.shape[-1])], -1)


def _times_upper(x: Tensor, upper: Tensor) -> Tensor:
    """X R with an upper triangular R."""
    return torch.cat([x[..., : part.stop] @ upper[..., : part.stop, part] for part in _panels(x.shape[-1])], -1)


def _cholesky(a: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The lower Cholesky factor of a batch from its lower triangle, the factor's inverse, and not 0 where there is no factor."""
    size = a.shape[-1]
    if size <= _LEAF:
        factor, failed = torch.linalg.cholesky_ex(a)
        eye = torch.eye(size, dtype=a.dtype, device=a.device).expand_as(factor)
        return factor, torch.linalg.solve_triangular(factor, eye, upper=False), failed
    half = 1 << ((size - 1).bit_length() - 1)  # the largest power of 2 below
    first, first_inverse, failed = _cholesky(a[..., :half, :half], inverse=True)
    assert first_inverse is not None
    below = a[..., half:, :half] @ first_inverse.mT
    last, last_inverse, failed_too = _cholesky(a[..., half:, half:] - _lower(below, below), inverse=inverse)
    failed = torch.maximum(failed, failed_too)
    factor = _of_blocks(first, below, last)
    if not inverse:
        return factor, None, failed
    assert last_inverse is not None
    return factor, _of_blocks(first_inverse, -(last_inverse @ (below @ first_inverse)), last_inverse), failed


def _of_blocks(first: Tensor, below: Tensor, last: Tensor) -> Tensor:
    """[[first, 0], [below, last]]."""
    size, half = below.shape[-2] + below.shape[-1], below.shape[-1]
    out = below.new_empty(*below.shape[:-2], size, size)
    out[..., :half, :half], out[..., :half, half:], out[..., half:, :half], out[..., half:, half:] = (
        first,
        0.0,
        below,
        last,
    )
    return out
