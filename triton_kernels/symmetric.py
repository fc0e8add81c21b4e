"""Products that are known to be symmetric: a program per tile of the lower triangle, which stores the upper one too.
Called by precond/_methods/newton_schulz.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.backend import interpreting
from .._core.formats.names import PLAIN
from .formats.plain import plain_stored

#: Elements that are multiplied at once along the sum, and warps, by the tile's rows and columns.
TILES = {64: (32, 4), 128: (64, 8)}
# Two stages fit the shared memory of every target: 64 KB on gfx942.
STAGES = 2


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """To nearest. In integers for bfloat16: the interpreter's own conversion truncates."""
    stored = plain_stored(x, KIND)
    if KIND == "bf16":
        stored = (stored >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return stored


@triton.jit
def symmetric_kernel(
    a_ptr,
    b_ptr,
    y_ptr,
    w_ptr,
    out_ptr,
    beta_ptr,
    gamma_ptr,
    shift_ptr,
    alpha,
    m,
    n,
    a_batch,
    a_row,
    a_column,
    b_batch,
    b_row,
    b_column,
    y_batch,
    y_row,
    w_batch,
    w_row,
    out_batch,
    out_row,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """out = alpha a b^T + beta y + gamma w + shift I. Columns of y, w and out are adjacent."""
    index = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    # The tile (i, j), j <= i, that is number i (i + 1) / 2 + j; a root that is rounded may be off by one.
    i = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    j = index - i * (i + 1) // 2
    rows = i.to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = j.to(tl.int64) * TILE + tl.arange(0, TILE)
    inside, across = rows < m, columns < m
    depth = tl.arange(0, DEPTH).to(tl.int64)
    a_ptr += batch * a_batch + rows[:, None] * a_row
    b_ptr += batch * b_batch + columns[None, :] * b_row
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for step in range(STEPS):
        k = step * DEPTH + depth
        a = tl.load(a_ptr + k[None, :] * a_column, mask=inside[:, None] & (k < n)[None, :], other=0.0)
        b = tl.load(b_ptr + k[:, None] * b_column, mask=across[None, :] & (k < n)[:, None], other=0.0)
        if WIDEN:
            # The interpreter multiplies the bits of bfloat16.
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    total = total * alpha
    mask = inside[:, None] & across[None, :] & (rows[:, None] >= columns[None, :])
    if y_ptr is not None:
        y = tl.load(y_ptr + batch * y_batch + rows[:, None] * y_row + columns[None, :], mask=mask, other=0.0)
        total += tl.load(beta_ptr + batch) * y.to(tl.float32)
    if w_ptr is not None:
        w = tl.load(w_ptr + batch * w_batch + rows[:, None] * w_row + columns[None, :], mask=mask, other=0.0)
        total += tl.load(gamma_ptr + batch) * w.to(tl.float32)
    if shift_ptr is not None:
        total += tl.where(rows[:, None] == columns[None, :], tl.load(shift_ptr + batch), 0.0)
    value = rounded(total, KIND)
    out_ptr += batch * out_batch
    tl.store(out_ptr + rows[:, None] * out_row + columns[None, :], value, mask=mask)
    above = mask & (rows[:, None] > columns[None, :])
    tl.store(out_ptr + columns[:, None] * out_row + rows[None, :], tl.trans(value), mask=tl.trans(above))


def tile(m: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows of a tile, elements along the sum, and warps. Of float32 and of small matrices a tile is small."""
    rows = 64 if m <= 256 or dtype == torch.float32 else 128
    return rows, *TILES[rows]


def symmetric_product(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    y: Tensor | None = None,
    beta: Any = 0.0,
    w: Tensor | None = None,
    gamma: Any = 0.0,
    shift: Any = 0.0,
) -> Tensor:
    """alpha a b^T + beta y + gamma w + shift I of matrices (k, m, n), added up in float32 and rounded once.

    The result must be symmetric: only its lower triangle is computed, and only that of y and w is read. a and b may have any
    strides. beta, gamma and shift are numbers, or one for each matrix.
    """
    k, m, n = a.shape
    out = torch.empty(k, m, m, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    rows, depth, warps = tile(m, a.dtype)
    tiles = triton.cdiv(m, rows)
    y, w = (None if t is None else t if t.stride(-1) == 1 else t.contiguous() for t in (y, w))
    factors = [None if t is None else each(factor, out) for t, factor in ((y, beta), (w, gamma))]
    shifts = each(shift, out) if isinstance(shift, Tensor) or shift else None
    with torch.cuda.device_of(a):
        symmetric_kernel[(tiles * (tiles + 1) // 2, k)](
            a,
            b,
            y,
            w,
            out,
            *factors,
            shifts,
            alpha,
            m,
            n,
            *a.stride(),
            *b.stride(),
            *((0, 0) if y is None else y.stride()[:2]),
            *((0, 0) if w is None else w.stride()[:2]),
            *out.stride()[:2],
            KIND=PLAIN[a.dtype],
            TILE=rows,
            DEPTH=depth,
            STEPS=triton.cdiv(n, depth),
            WIDEN=interpreting(),
            num_warps=warps,
            num_stages=STAGES,
            enable_fp_fusion=False,
        )
    return out


def each(factor: Any, like: Tensor) -> Tensor:
    """A number for each matrix, on the device."""
    k = len(like)
    if isinstance(factor, Tensor):
        return factor.to(torch.float32).expand(k, 1, 1).reshape(k).contiguous()
    return torch.full((k,), factor, dtype=torch.float32, device=like.device)
