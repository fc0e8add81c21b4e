"""Bounds of the spectral norms of a batch of matrices, without a decomposition: what FOP asks of its M at each step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._core.backend import on_device


def square(M: Tensor) -> Tensor:
    """M M^T of a batch; a large one on the CPU by blocks on and below the diagonal, 5/8 of the operations."""
    r = M.shape[-1]
    if on_device(M) or r < 256:
        return M @ M.mT
    out = torch.empty_like(M)
    step = -(-r // 4)
    for begin in range(0, r, step):
        rows = slice(begin, begin + step)
        torch.bmm(M[:, rows], M[:, : begin + step].mT, out=out[:, rows, : begin + step])
        out[:, :begin, rows] = out[:, rows, :begin].mT
    return out


def bounds(M: Tensor, P: Tensor | None = None) -> Iterator[tuple[Tensor, float]]:
    """Bounds of the spectral norms of a batch, each at most that of the one before, and by what factor each may be above the
    norm. With P = M M^T, ||M||^2 is at most ||M||_1 ||M||_inf and at most ||P^n||_inf^(1/n) for n = 1, 2, 4, 8. NaN for a
    matrix that is zero or not finite. No decomposition, which would wait for the device.
    """
    r = M.shape[-1]
    if P is None:
        magnitudes = M.abs()
        sums = [magnitudes.sum(dim).amax(-1) for dim in (-1, -2)]
        del magnitudes
        yield (sums[0] * sums[1]).sqrt(), r**0.5
        P = square(M)
    largest = P.abs().sum(-1).amax(-1)
    yield largest.sqrt(), r**0.25
    S = P / largest[:, None, None]
    for n in (2, 4, 8):
        S = square(S)
        yield (largest * S.abs().sum(-1).amax(-1) ** (1 / n)).sqrt(), r ** (0.25 / n)


def allowed(M: Tensor, P: Tensor | None, max_norm: float) -> Tensor:
    """True for each matrix of a batch whose last bound is in (0, max_norm]: neither NaN, infinity nor 0, from which no update
    leads away. On the CPU the first bound that leaves no doubt about the last one ends the search; a device would have to be
    waited for.
    """
    last = M.shape[-1] ** (1 / 32)
    for bound, above in bounds(M, P):
        found = (bound > 0.0) & (bound * (last if above > last else 1.0) <= max_norm)
        if not on_device(M) and bool((found | ~(bound / above <= max_norm)).all()):
            break
    return found
