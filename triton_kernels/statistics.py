"""The update of rules with parts, and the statistics of it, csrc/plan/statistics.h: a program for each block of a norm, then one
for each tensor.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._core.statistics import SUMS
from .formats import block_at
from .items import chunk_table
from .kernel import ALIGNED, NUMEL, SLOTS, WARPS, update_block
from .norms import BLOCK as STRETCH
from .norms import by_halves, combined
from .prologue import SCALAR_FLOATS
from .tables import table

LANES = 256
LEVELS = LANES.bit_length() - 1
# Of a block; the number of elements comes to those of a tensor.
BLOCK_SUMS = len(SUMS) - 1
LARGEST = SUMS.index("largest_update")


@triton.jit
def add_row(sums, g, before, taken, after):
    """One element more to each lane."""
    grad, param, update, along, arrived = sums
    u = taken.to(tl.float64)
    g = g.to(tl.float64)
    moved = (before - after).to(tl.float64)
    before = before.to(tl.float64)
    return grad + g * g, param + before * before, update + u * u, along + u * g, arrived + u * moved


@triton.jit
def rows_of(x, LANES: tl.constexpr):
    """A block of four rows, row by row."""
    even, odd = tl.split(tl.permute(tl.reshape(x, (2, 2, LANES)), (2, 0, 1)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def add_seen(sums, counts, seen, mask, LANES: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """A block's elements to the lanes, by their index."""
    g, before, taken, after = seen
    if not FULL:
        g = tl.where(mask, g, 0.0)
        before = tl.where(mask, before, 0.0)
        taken = tl.where(mask, taken, 0.0)
        after = tl.where(mask, after, 0.0)
    if BLOCK == LANES:
        sums = add_row(sums, g, before, taken, after)
    else:
        g0, g1, g2, g3 = rows_of(g, LANES)
        before0, before1, before2, before3 = rows_of(before, LANES)
        taken0, taken1, taken2, taken3 = rows_of(taken, LANES)
        after0, after1, after2, after3 = rows_of(after, LANES)
        sums = add_row(sums, g0, before0, taken0, after0)
        sums = add_row(sums, g1, before1, taken1, after1)
        sums = add_row(sums, g2, before2, taken2, after2)
        sums = add_row(sums, g3, before3, taken3, after3)
    nonfinite, lost, largest = counts
    nonfinite += tl.sum(tl.where(tl.abs(g) < float("inf"), 0, 1), 0)
    lost += tl.sum(tl.where((taken != 0.0) & (after == before), 1, 0), 0)
    largest = tl.maximum(largest, tl.max(taken.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
    return sums, (nonfinite, lost, largest)


@triton.jit
def measured_kernel(
    chunks_ptr,
    tensors_ptr,
    scalars_ptr,
    control_ptr,
    clip_value,
    table_ptr,
    UPDATE: tl.constexpr,
    DECAY: tl.constexpr,
    OPTION: tl.constexpr,
    STATES: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    MEASURED: tl.constexpr,
    STRETCH: tl.constexpr,
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """As update_kernel, for STRETCH elements; table_ptr: BLOCK_SUMS numbers for each program."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * chunk)
    begin = tl.multiple_of(tl.load(chunks_ptr + 2 * chunk + 1), STRETCH)
    slots = tensors_ptr + tensor * SLOTS
    scalars = scalars_ptr + tensor * SCALAR_FLOATS
    grad_coef = tl.load(control_ptr + 1 + tensor)
    skip = tl.load(control_ptr) != 0.0
    numel = tl.where(skip, 0, tl.load(slots + NUMEL))
    aligned = tl.where(skip, 0, tl.load(slots + ALIGNED))
    none = tl.zeros((LANES,), dtype=tl.float64)
    sums = (none, none, none, none, none)
    count = tl.full((), 0, tl.int32)
    counts = (count, count, count)
    for k in range(STRETCH // BLOCK):
        first = tl.multiple_of(begin + k * BLOCK, BLOCK)
        if first + BLOCK <= aligned:
            block = block_at(first, numel, BLOCK)
            seen = update_block(
                slots,
                block,
                scalars,
                grad_coef,
                clip_value,
                UPDATE,
                DECAY,
                OPTION,
                STATES,
                P,
                G,
                S0,
                S1,
                S2,
                AVERAGE,
                BLOCK,
                True,
                MEASURED,
            )
            sums, counts = add_seen(sums, counts, seen, None, LANES, BLOCK, True)
        else:
            for part in range(BLOCK // LANES):
                at = first + part * LANES
                if at < numel:
                    block = block_at(at, numel, LANES)
                    seen = update_block(
                        slots,
                        block,
                        scalars,
                        grad_coef,
                        clip_value,
                        UPDATE,
                        DECAY,
                        OPTION,
                        STATES,
                        P,
                        G,
                        S0,
                        S1,
                        S2,
                        AVERAGE,
                        LANES,
                        False,
                        MEASURED,
                    )
                    sums, counts = add_seen(sums, counts, seen, block[3], LANES, LANES, False)
    row = table_ptr + chunk * BLOCK_SUMS + tl.arange(0, 1)
    grad, param, update, along, arrived = sums
    tl.store(row, by_halves(grad, LANES, LEVELS, False))
    tl.store(row + 1, by_halves(param, LANES, LEVELS, False))
    tl.store(row + 2, by_halves(update, LANES, LEVELS, False))
    tl.store(row + 3, by_halves(along, LANES, LEVELS, False))
    tl.store(row + 4, by_halves(arrived, LANES, LEVELS, False))
    nonfinite, lost, largest = counts
    zero = tl.zeros((1,), dtype=tl.float64)
    tl.store(row + 5, zero + nonfinite.to(tl.float64))
    tl.store(row + 6, zero + lost.to(tl.float64))
    largest = tl.where(largest > 0x7F800000, 0x7FC00000, largest).to(tl.float32, bitcast=True)
    tl.store(row + 7, zero + largest.to(tl.float64))


@triton.jit
def fold_statistics(
    jobs_ptr,
    table_ptr,
    control_ptr,
    sums_ptr,
    STRETCH: tl.constexpr,
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """A tensor. jobs_ptr: (first of its blocks, elements, its row of sums_ptr)."""
    job = jobs_ptr + 3 * tl.program_id(0).to(tl.int64)
    first = tl.load(job)
    numel = tl.load(job + 1)
    row = sums_ptr + tl.load(job + 2) * (BLOCK_SUMS + 1) + tl.arange(0, 1)
    taken = tl.arange(0, 1) < tl.where(tl.load(control_ptr) == 0.0, 1, 0)  # not of a step that is skipped
    blocks = (numel + STRETCH - 1) // STRETCH
    for k in tl.static_range(BLOCK_SUMS):
        lanes = tl.zeros((LANES,), dtype=tl.float64)
        for begin in range(0, blocks, LANES):
            offsets = begin + tl.arange(0, LANES)
            x = tl.load(table_ptr + (first + offsets) * BLOCK_SUMS + k, mask=offsets < blocks, other=0.0)
            lanes = combined(lanes, x, k == LARGEST)
        tl.store(row + k, by_halves(lanes, LANES, LEVELS, k == LARGEST), mask=taken)
    tl.store(row + BLOCK_SUMS, tl.zeros((1,), dtype=tl.float64) + numel.to(tl.float64), mask=taken)


def fold_table(values: list[int]) -> Tensor:
    """(first block, elements, row of the sums) of every tensor, from the last two."""
    sizes, numbers = torch.tensor(values, dtype=torch.int64, device="cpu").view(-1, 2).unbind(1)
    counts = (sizes + STRETCH - 1) // STRETCH
    return torch.stack([counts.cumsum(0) - counts, sizes, numbers], dim=1)


def run(
    key: tuple[object, ...],
    sizes: list[int],
    numbers: list[int],
    tensors: Tensor,
    scalars: Tensor,
    control: Tensor,
    clip_value: float,
    constants: dict[str, object],
    sums: Tensor,
    only: bool,
) -> None:
    """Update tensors and put their statistics into rows of ``sums``."""
    chunks = table(("stretches", *key), sizes, functools.partial(chunk_table, block=STRETCH), sums.device)
    jobs = table(
        ("folds", *key), [n for pair in zip(sizes, numbers, strict=True) for n in pair], fold_table, sums.device
    )
    found = torch.empty(max(len(chunks), 1), BLOCK_SUMS, dtype=torch.float64, device=sums.device)
    shared = {"STRETCH": STRETCH, "LANES": LANES, "LEVELS": LEVELS, "BLOCK_SUMS": BLOCK_SUMS}
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    if len(chunks):
        measured_kernel[(len(chunks),)](
            chunks,
            tensors,
            scalars,
            control,
            clip_value,
            found,
            **constants,
            MEASURED="only" if only else "statistics",
            **shared,
            **options,
        )
    fold_statistics[(len(sizes),)](jobs, found, control, sums, LARGEST=LARGEST, **shared, **options)
