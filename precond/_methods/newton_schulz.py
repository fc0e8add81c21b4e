"""Orthogonal factors of a batch of matrices by products, for Muon. docs/newton_schulz.md has the numerics and the counts."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .._core.backend import why_not

#: torch's, of the quintic iteration.
NS_COEFFICIENTS: Final = (3.4445, -4.775, 2.0315)
METHODS: Final = (None, "gram", "polar_express")
#: How large the noise of a Gram matrix may become before it is computed anew: that of its sums, times the growth of the
#: smallest eigenvalues.
NOISE: Final = 0.1

#: Amsel, Persson, Musco, Gower 2025 (arXiv 2505.16932): for singular values in [1e-3, 1], the odd quintic nearest to 1 (minimax),
#: composed greedily, the lower end held above 0.02407327424182761 of the upper one. tests/test_newton_schulz.py computes them.
POLAR_EXPRESS: Final = (
    (8.287212018145626, -23.595886519098818, 17.30038731253092),
    (4.107059111542198, -2.947849916737908, 0.5448431082926598),
    (3.948690853482296, -2.9089021159629485, 0.5518191394370133),
    (3.318419657370597, -2.488488024314872, 0.5100489401237197),
    (2.30065201995482, -1.6689039845747526, 0.41880731195256793),
    (1.891301407787399, -1.2679958271945888, 0.3768040894852493),
)
#: What follows them, to first order in the distance to 1: Newton-Schulz of degree 5.
LAST: Final = (1.875, -1.25, 0.375)
#: Arguments of all polynomials but the last are divided by it, as in the paper: rounding may take them above 1.
SAFETY: Final = 1.01

#: Below that many multiply-adds of a product on the CPU, a call costs more than it computes: matrices are batched.
SMALL: Final = 1 << 22
#: Bytes to whose multiples torch's tensors are aligned on the CPU.
ALIGNED: Final = 64
#: Elements of matrices that a device works on at once.
CHUNK: Final = 1 << 28

Coefficients = tuple[float, float, float]
#: A number, or a number for each matrix of a batch (k, 1, 1).
Scalar = Any


def coefficients(group: dict[str, Any]) -> list[Coefficients]:
    """(a, b, c) of every step: X = a X + (b A + c A^2) X, A = X X^T."""
    steps: int = group["ns_steps"]
    if group.get("method") != "polar_express":
        a, b, c = group["ns_coefficients"]
        return [(a, b, c)] * steps
    found = [*POLAR_EXPRESS, *[LAST] * steps][:steps]
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in found[:-1]]
    return [*safe, *found[-1:]]


def strip(m: int) -> int:
    """Rows of a strip of a symmetric product on the CPU. Half of the product is computed beside the strips' corners."""
    # 16 of 512: 8.0 ms with 128, 8.4 with 256, 10.2 whole. 8 of 1024: 27.7 with 128, 27.4 with 256, 42 whole (2 cores).
    return 128 if m <= 1024 else 256


def share(m: int, rows: int) -> float:
    """The part of a symmetric product m x m that strips of ``rows`` compute."""
    return sum(min(rows, m - i) * min(i + rows, m) for i in range(0, m, rows)) / (m * m)


def operations(m: int, n: int, blocks: Sequence[int], part: float = 1.0) -> float:
    """Floating-point operations for m x n, m <= n, if a symmetric product takes ``part`` of a whole one.

    A block of k steps multiplies X twice, and takes 4 k - 3 symmetric products m x m.
    """
    return sum(2 * m * m * n * (1 + part) + 2 * m**3 * part * (4 * k - 3) for k in blocks)


@functools.cache
def room(a: float, b: float, c: float) -> tuple[float, float]:
    """The largest singular value that steps of one polynomial make of those up to 1, and how much more they take back."""

    def step(x: float) -> float:
        return abs(x * (a + x * x * (b + x * x * c)))

    grid = [i / 1000 for i in range(2001)]
    reach = 1.0
    for _ in range(3):
        reach = max(reach, *(step(x) for x in grid if x <= reach))
    return reach, next((x for x in grid if x > reach and not step(x) <= x), max(reach, grid[-1])) - reach


def blocks_of(
    m: int, n: int, coefs: Sequence[Coefficients], dtype: torch.dtype, method: str | None, part: float
) -> list[int]:
    """Steps of each block: between blocks X is there, within one only its Gram matrix.

    All methods but ``"gram"`` take one each in types of two bytes. Else the rule: as many steps as noise allows, or one each,
    whichever takes fewer operations. A small singular value grows by a every step, and the error of its square by a^2. float16
    is cut as bfloat16.

    The product P of polynomials cancels: P X = q0 X + q X, where q0 is up to the product of all a and P is about 1. Half an ulp
    of q may move a singular value by that much of q0 times the largest one. ``"gram"`` ends a block before this exceeds the room
    between the largest singular value and those that the polynomial takes to infinity: 0.062 with torch's coefficients, of
    which two steps in bfloat16 take 0.056 and three 0.19.
    """
    single = [1] * len(coefs)
    if method != "gram" and dtype.itemsize == 2:
        return single
    # Half an ulp. Types of two bytes are added up in float32, the others in their own precision: equal numbers lose one each.
    unit = torch.finfo(torch.bfloat16).eps / 2 if dtype.itemsize == 2 else torch.finfo(dtype).eps / 2 * n
    long: list[int] = []
    growth = lost = math.inf
    for a, b, c in coefs:
        reach, left = room(float(a), float(b), float(c)) if method == "gram" else (0.0, 0.0)
        lost *= max(abs(a), 1.0)
        if growth <= NOISE and lost * reach <= left:
            long[-1] += 1
        else:
            long.append(1)
            growth, lost = unit, unit * max(abs(a), 1.0)
        growth *= max(a * a, 1.0)
    return min(long, single, key=lambda blocks: (operations(m, n, blocks, part), len(blocks)))


def orthogonalized(u: Tensor, group: dict[str, Any]) -> Tensor:
    """Matrices (k, m, n) with singular values taken to about 1: the nearest orthogonal factors, roughly. Computed in u's dtype.

    group: ``ns_coefficients``, ``ns_steps``, ``eps``, and ``method``, which may be missing. On the CPU the result of a matrix has
    the same bits in every batch (see ``padded``). A matrix of zeros stays one, and a NaN spreads over its matrix. Besides the
    result there are one or two copies of the matrices in work (one large or all small ones on the CPU, up to CHUNK elements
    elsewhere), and up to six squares m x m for each.
    """
    k, rows, columns = u.shape
    m, n = min(rows, columns), max(rows, columns)
    result = torch.empty_like(u, memory_format=torch.contiguous_format)
    if u.numel() == 0:
        return result
    coefs = coefficients(group)
    by_itself = alone(u)
    blocks = [1] * len(coefs)
    small = u.device.type == "cpu" and not by_itself
    if not small:
        part = share(m, strip(m) if by_itself else tile(u, m))
        blocks = blocks_of(m, n, coefs, u.dtype, group.get("method"), part)
    chunk = 1 if by_itself else max(1, CHUNK // (m * n))
    for begin in range(0, k, chunk):
        x, out = u[begin : begin + chunk], result[begin : begin + chunk]
        if rows > columns:
            x, out = x.mT, out.mT
        x = normalized(x, group["eps"])
        # Where a matrix of the result begins must not choose the product.
        into = None if small or (by_itself and out.data_ptr() % ALIGNED) else out
        if small:
            x = padded(x)
        done = 0
        for i, steps in enumerate(blocks):
            last = i + 1 == len(blocks)
            x = block(x, coefs[done : done + steps], into if last else None)
            done += steps
        if not blocks or into is None:
            out.copy_(x[: len(out), :m, :n])
    return result


def padded(x: Tensor) -> Tensor:
    """A batch of small matrices whose bits depend neither on the batch nor on the place in it.

    On the CPU a product's order of summation depends on where an operand begins, and one matrix takes another path than several.
    Zeros fill sides up to multiples of 8, so that all matrices begin at multiples of ALIGNED bytes, and there are at least two.
    """
    # 200 of 64 x 64 in bfloat16: 101 ms, unpadded 100, one by one 711 (2 cores).
    k, m, n = x.shape
    out = x.new_zeros(max(k, 2), -(-m // 8) * 8, -(-n // 8) * 8)
    out[:k, :m, :n] = x
    return out


def alone(u: Tensor) -> bool:
    """True where each matrix of a batch is multiplied by itself: large ones on the CPU."""
    m, n = sorted(u.shape[-2:])
    return u.device.type == "cpu" and m * m * n >= SMALL


def normalized(x: Tensor, eps: float) -> Tensor:
    """Matrices over their Frobenius norms, so that no singular value is above 1."""
    wide = x.float() if x.dtype == torch.float16 else x  # whose squares overflow
    norm: Tensor = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    return (wide / norm.clamp(min=eps)).to(x.dtype)


def block(x: Tensor, coefs: Sequence[Coefficients], out: Tensor | None) -> Tensor:
    """Some steps in which X X^T is computed once: into ``out``, or a new tensor.

    More than one step is computed around the mean eigenvalue: R = mu I + r, and likewise Z = a I + b R + c R^2 = z0 I + z, the
    product of all Z = q0 I + q, and R Z = t0 I + t. Rounding is relative to r, z, q and t, which are small where singular
    values are alike. Without that, two last steps from one R lose 3.7 times as much (512 x 512 of normal numbers).
    """
    mu: Scalar = 0.0
    if len(coefs) > 1:
        # Roughly the mean, and a number of x's dtype, so that the diagonal is rounded once.
        norm = torch.linalg.vector_norm(x, dim=(-2, -1)) / math.sqrt(x.shape[-2])
        mu = scalar(norm.square(), x)
    r = product(x, x, shift=-mu)
    q, q0 = r, mu  # of no step yet
    for i, (a, b, c) in enumerate(coefs):
        z0 = a + (b + c * mu) * mu
        z = product(r, r, alpha=c, y=r, beta=b + 2 * c * mu)
        if i == 0:
            q, q0 = z, z0
        else:
            q, q0 = product(z, q, y=q, beta=z0, w=z, gamma=q0), q0 * z0
        if i + 1 < len(coefs):
            t, t0 = product(r, z, y=z, beta=mu, w=r, gamma=z0), mu * z0
            r, mu = product(t, z, y=t, beta=z0, w=z, gamma=t0), t0 * z0
            diagonal = r.diagonal(dim1=-2, dim2=-1)
            mean = diagonal.mean(-1, keepdim=True, dtype=_wide(r.dtype))
            diagonal.sub_(mean)
            mu = mu + scalar(mean[:, 0], r)
    return multiplied(x, q, q0, out)


def multiplied(x: Tensor, q: Tensor, q0: Scalar, out: Tensor | None) -> Tensor:
    """(q0 I + q) x."""
    if not isinstance(q0, float):
        scaled: Tensor = (x * q0).to(x.dtype)
        return torch.baddbmm(scaled, q, x) if out is None else torch.baddbmm(scaled, q, x, out=out)
    if len(x) > 1 or not alone(x):
        return torch.baddbmm(x, q, x, beta=q0) if out is None else torch.baddbmm(x, q, x, beta=q0, out=out)
    # The same product without copies of operands that are views.
    result = torch.empty_like(x) if out is None else out
    torch.addmm(x[0], q[0], x[0], beta=q0, out=result[0])
    return result


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def scalar(values: Tensor, like: Tensor) -> Scalar:
    """A number for each matrix: read where that costs nothing, else (k, 1, 1)."""
    if like.device.type == "cpu" and len(values) == 1:
        return float(values.item())
    return values.to(_wide(values.dtype))[:, None, None]


def product(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    y: Tensor | None = None,
    beta: Scalar = 0.0,
    w: Tensor | None = None,
    gamma: Scalar = 0.0,
    shift: Scalar = 0.0,
) -> Tensor:
    """alpha a b^T + beta y + gamma w for matrices (k, m, n), where the result is known to be symmetric, as y and w are.

    Or alpha a b^T + shift I.
    """
    k, m, _ = a.shape
    if kernels(a) is not None:
        found: Tensor = kernels(a).symmetric_product(a, b, alpha, y, beta, w, gamma, shift)
        return found
    if k == 1 and alone(a):
        return by_strips(a[0], b[0], alpha, y, beta, w, gamma, shift)
    if isinstance(shift, Tensor) or shift:
        y, beta = (torch.eye(m, device=a.device) * shift).to(a.dtype), 1.0
    if y is None:
        return a @ b.mT
    if w is not None or isinstance(beta, Tensor):
        y, beta = (y * beta + (0.0 if w is None else w * gamma)).to(a.dtype), 1.0
    return torch.baddbmm(y, a, b.mT, beta=beta, alpha=alpha)


def by_strips(
    a: Tensor, b: Tensor, alpha: float, y: Tensor | None, beta: float, w: Tensor | None, gamma: float, shift: float
) -> Tensor:
    """One matrix: strips of the lower triangle, which are then copied to the upper one."""
    m = len(a)
    rows = strip(m)
    # Rows of a power of two of bytes would share few sets of a cache: 8 of 1024 are mirrored in 3.3 ms, with the gap in 1.5.
    # oneDNN's products for AMX multiply what lies behind a row by 0: it must be a number.
    gapped = a.new_empty(1, m, m + 32)
    gapped[:, :, m:] = 0
    out = gapped[:, :, :m]
    lower = out[0]
    before = None if y is None else y[0]
    if before is not None and w is not None:
        # The larger factor is left to the product, which rounds once.
        big, small = (before, w[0]) if abs(beta) >= abs(gamma) else (w[0], before)
        beta, less = (beta, gamma) if big is before else (gamma, beta)
        before = torch.add(big, small, alpha=less / beta if less else 0.0)
    for i in range(0, m, rows):
        end = min(i + rows, m)
        to = lower[i:end, :end]
        if shift:
            to.zero_().diagonal(i).fill_(shift)
            torch.addmm(to, a[i:end], b[:end].mT, alpha=alpha, out=to)
        elif before is None:
            torch.mm(a[i:end], b[:end].mT, out=to)
        else:
            torch.addmm(before[i:end, :end], a[i:end], b[:end].mT, beta=beta, alpha=alpha, out=to)
        lower[:i, i:end] = to[:, :i].mT
    return out


def kernels(a: Tensor) -> Any:
    """The module with a kernel for this tensor, None if torch's products serve."""
    return _kernels() if a.is_cuda and a.dtype != torch.float64 else None


@functools.cache
def _kernels() -> Any:
    return None if why_not("triton") else importlib.import_module("precond.triton_kernels.symmetric")


def tile(u: Tensor, m: int) -> int:
    """Rows of a tile of a symmetric product on a device: m where torch computes it."""
    return m if kernels(u) is None else kernels(u).tile(m, u.dtype)[0]


def scale_of(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """What a direction is multiplied with, by the shape of its matrix: torch's ``adjust_lr_fn``."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
