"""The norm of all gradients, csrc/plan/norm.h: a program per block of a tensor, then programs over blocks of sums."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.formats.names import PLAIN
from .formats import address, decode
from .tables import in_order, table

BLOCK = 8192
LANES = 1024
WARPS = 4
# Numbers of a tensor: the address of its gradient, its number of elements, and again that number if the address is a multiple of
# 16 bytes, else 0.
SLOTS = 3


@triton.jit
def magnitude(x):
    """Bits of a magnitude in fp64, in the order of the numbers, with NaN above all."""
    bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    return tl.where(x != x, 0x7FF8000000000000, bits)


@triton.jit
def combined(a, b, INF: tl.constexpr):
    if INF:
        u, v = magnitude(a), magnitude(b)
        result = tl.where(u > v, u, v).to(tl.float64, bitcast=True)
    else:
        result = a + b
    return result


@triton.jit
def by_halves(lanes, LANES: tl.constexpr, LEVELS: tl.constexpr, INF: tl.constexpr):
    """The lanes added up: i and i + n / 2, until one is left."""
    for level in tl.static_range(LEVELS):
        halves = tl.permute(tl.reshape(lanes, (2, LANES >> (level + 1))), (1, 0))
        low, high = tl.split(halves)
        lanes = combined(low, high, INF)
    return lanes


@triton.jit
def term(x, INF: tl.constexpr):
    """What one element adds to a norm; its square is exact."""
    x = x.to(tl.float64)
    if INF:
        x = magnitude(x).to(tl.float64, bitcast=True)
    else:
        x = x * x
    return x


@triton.jit
def sum_block(
    slots,
    begin,
    numel,
    G: tl.constexpr,
    INF: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    FULL: tl.constexpr,
):
    g_ptr = address(slots, G, FULL)
    lanes = tl.zeros((LANES,), dtype=tl.float64)
    for k in tl.static_range(BLOCK // LANES):
        offsets = begin + k * LANES + tl.arange(0, LANES)
        lanes = combined(lanes, term(decode(g_ptr, offsets, offsets < numel, G, FULL), INF), INF)
    return lanes


@triton.jit
def norm_kernel(
    chunks_ptr,
    tensors_ptr,
    sums_ptr,
    G: tl.constexpr,
    INF: tl.constexpr,
    SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One block. chunks_ptr: (tensor, first element, index of the block's sum)."""
    chunk = chunks_ptr + 3 * tl.program_id(0).to(tl.int64)
    slots = tensors_ptr + tl.load(chunk) * SLOT
    begin = tl.multiple_of(tl.load(chunk + 1), BLOCK)
    if begin + BLOCK <= tl.load(slots + 2):
        lanes = sum_block(slots, begin, 0, G, INF, BLOCK, LANES, True)
    else:
        lanes = sum_block(slots, begin, tl.load(slots + 1), G, INF, BLOCK, LANES, False)
    tl.store(sums_ptr + tl.load(chunk + 2) + tl.arange(0, 1), by_halves(lanes, LANES, LEVELS, INF))


@triton.jit
def fold_kernel(
    sums_ptr, count, out_ptr, INF: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, LEVELS: tl.constexpr
):
    """A block of sums."""
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.zeros((LANES,), dtype=tl.float64)
    for k in tl.static_range(BLOCK // LANES):
        offsets = program * BLOCK + k * LANES + tl.arange(0, LANES)
        lanes = combined(lanes, tl.load(sums_ptr + offsets, mask=offsets < count, other=0.0), INF)
    tl.store(out_ptr + program + tl.arange(0, 1), by_halves(lanes, LANES, LEVELS, INF))


_LEVELS = LANES.bit_length() - 1


def gradient_table(values: list[int]) -> Tensor:
    """Per tensor SLOTS numbers, from its address and number of elements."""
    found = torch.tensor(values, dtype=torch.int64, device="cpu").view(-1, 2)
    aligned = found[:, 1:] * (found[:, :1] % 16 == 0)
    return torch.cat([found, aligned], dim=1)


def block_table(values: list[int]) -> Tensor:
    """(tensor, first element, index of the sum) of every block, from each tensor's number of elements and first index."""
    sizes, first = torch.tensor(values, dtype=torch.int64, device="cpu").view(-1, 2).unbind(1)
    counts = (sizes + BLOCK - 1) // BLOCK
    tensor = torch.repeat_interleave(counts)
    block = torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, block * BLOCK, first[tensor] + block], dim=1)


def norm(items: Sequence[tuple[Tensor, Tensor, int]], classes: int, inf: bool) -> Tensor:
    """Per class the sum of squares, or the largest magnitude, of gradients: items of (parameter, gradient, class) on one device.

    Does not wait for the device.
    """
    device = items[0][0].device
    ends = []
    first_sum: dict[int, int] = {}
    end = 0
    for norm_class in range(classes):
        for i, (_, g, of) in enumerate(items):
            if of == norm_class:
                first_sum[i] = end
                end += triton.cdiv(g.numel(), BLOCK)
        ends.append(end)
    sums = torch.empty(max(end, 1), dtype=torch.float64, device=device)
    total = torch.empty(classes, dtype=torch.float64, device=device)
    by_format: dict[str, list[int]] = {}
    for i, (_, g, _of) in enumerate(items):
        by_format.setdefault(PLAIN[g.dtype], []).append(i)
    alive = []
    with torch.cuda.device_of(total):
        for name, members in by_format.items():
            values, blocks = [], []
            for i in members:
                g = in_order(items[i][0], items[i][1])
                alive.append(g)
                values += [g.data_ptr(), g.numel()]
                blocks += [g.numel(), first_sum[i]]
            key = ("norm", device, name, len(members), values[0])
            chunks = table(("blocks", *key), blocks, block_table, device)
            if len(chunks) == 0:
                continue
            norm_kernel[(len(chunks),)](
                chunks,
                table(("gradients", *key), values, gradient_table, device),
                sums,
                G=name,
                INF=inf,
                SLOT=SLOTS,
                BLOCK=BLOCK,
                LANES=LANES,
                LEVELS=_LEVELS,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        begin = 0
        for norm_class, end in enumerate(ends):
            part = sums[begin:end]
            begin = end
            while True:
                count = len(part)
                blocks = max(1, triton.cdiv(count, BLOCK))
                out = total[norm_class:] if blocks == 1 else torch.empty(blocks, dtype=torch.float64, device=device)
                fold_kernel[(blocks,)](
                    part, count, out, INF=inf, BLOCK=BLOCK, LANES=LANES, LEVELS=_LEVELS, num_warps=WARPS, enable_fp_fusion=False
                )  # fmt: skip
                if blocks == 1:
                    break
                part = out
    return total
