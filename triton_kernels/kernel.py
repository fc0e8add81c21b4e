"""The update of one chunk, for every rule and all formats: load, rule, store."""

import triton
import triton.language as tl

from .arithmetic import clamped
from .families import decays, parts
from .formats import BESIDE, NO_AVERAGE, as_stored, block_at, draws, is_plain, load, operand, store
from .prologue import SCALAR_FLOATS, seed_in
from .random import draw_of, words_at

BLOCK = 1024
WARPS = 4
# Parts of a block that is not full or not aligned, where formats are not plain. A whole one, with a predicate and an address for
# each element, takes 188 registers for sm_90 with a split weight and 8-bit states; in four parts the full block's 124 decide.
PARTS = 4
# Slots of a tensor in the address table: p, g, up to three states and an average of the weights behind them, the number of
# elements, and again that number if every address is a multiple of 16 bytes and runs of random.py are whole, else 0; then what
# lies beside p, g and the states, and where the elements are in the unsharded tensor.
OPERANDS = 6
NUMEL = tl.constexpr(OPERANDS)
ALIGNED = tl.constexpr(OPERANDS + 1)
PLACE = tl.constexpr(BESIDE.value + OPERANDS)
SLOTS = tl.constexpr(PLACE.value + 3)


@triton.jit
def update_block(
    slots,
    block,
    scalars,
    grad_coef,
    clip_value,
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
    FULL: tl.constexpr,
    MEASURED: tl.constexpr,
):
    """Load, rule, store. AVERAGE: the format of an average of the weights, "" of a rule with parts that has none, "off" without
    parts. FULL: every offset is an element, the addresses are aligned, and runs of random.py whole. MEASURED: "" or, of a rule
    with parts, "statistics" or "only", which stores nothing; then returns what statistics are made of: g, p, what is taken from
    it, and p as it is stored.
    """
    p_at = operand(slots, P, FULL)
    p = load(p_at, block, P, BLOCK, FULL)
    g = clamped(grad_coef * load(operand(slots + 1, G, FULL), block, G, BLOCK, FULL), clip_value)
    word = 0
    if draws(P, S0, S1, S2, AVERAGE):
        word = words_at(*seed_in(scalars), slots + PLACE, block[0], g, BLOCK, FULL)
    if STATES == 0:
        step = UPDATE(p, g, scalars, DECAY, OPTION)
    elif STATES == 1:
        s0_at = operand(slots + 2, S0, FULL)
        s0 = load(s0_at, block, S0, BLOCK, FULL)
        step, s0 = UPDATE(p, g, s0, scalars, DECAY, OPTION)
    elif STATES == 2:
        s0_at = operand(slots + 2, S0, FULL)
        s1_at = operand(slots + 3, S1, FULL)
        s0 = load(s0_at, block, S0, BLOCK, FULL)
        s1 = load(s1_at, block, S1, BLOCK, FULL)
        step, s0, s1 = UPDATE(p, g, s0, s1, scalars, DECAY, OPTION)
    else:
        s0_at = operand(slots + 2, S0, FULL)
        s1_at = operand(slots + 3, S1, FULL)
        s2_at = operand(slots + 4, S2, FULL)
        s0 = load(s0_at, block, S0, BLOCK, FULL)
        s1 = load(s1_at, block, S1, BLOCK, FULL)
        s2 = load(s2_at, block, S2, BLOCK, FULL)
        step, s0, s1, s2 = UPDATE(p, g, s0, s1, s2, scalars, DECAY, OPTION)
    before = p
    if AVERAGE != "off":
        p, taken, update = parts.stepped(p, g, step, scalars, DECAY)
    else:
        p = decays.stepped(p, step, DECAY)
    if MEASURED == "only":
        seen = (g, before, update, before)
    else:
        if MEASURED == "statistics":
            seen = (g, before, taken, as_stored(p, draw_of(word, 0), P))
        else:
            seen = None
        if STATES >= 1:
            store(s0_at, block, s0, draw_of(word, 1), S0, BLOCK, FULL)
        if STATES >= 2:
            store(s1_at, block, s1, draw_of(word, 2), S1, BLOCK, FULL)
        if STATES >= 3:
            store(s2_at, block, s2, draw_of(word, 3), S2, BLOCK, FULL)
        store(p_at, block, p, draw_of(word, 0), P, BLOCK, FULL)
        if has_average(AVERAGE):
            ema_at = operand(slots + 2 + STATES, AVERAGE, FULL)
            ema = parts.averaged(p, load(ema_at, block, AVERAGE, BLOCK, FULL), scalars)
            store(ema_at, block, ema, draw_of(word, 1 + STATES), AVERAGE, BLOCK, FULL)
    return seen


@triton.constexpr_function
def has_average(name):
    return name not in NO_AVERAGE


@triton.constexpr_function
def part_of(block, *names):
    return block if all(name in NO_AVERAGE or is_plain(name) for name in names) else block // PARTS


@triton.jit
def update_kernel(
    chunks_ptr,
    tensors_ptr,
    scalars_ptr,
    control_ptr,
    clip_value,
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
):
    """Update one chunk. chunks_ptr: (tensor, first element); tensors_ptr: SLOTS numbers each; scalars_ptr and control_ptr: what
    the prologue left, the skip flag of the launch, then each tensor's gradient coefficient.
    """
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * chunk)
    begin = tl.multiple_of(tl.load(chunks_ptr + 2 * chunk + 1), BLOCK)
    slots = tensors_ptr + tensor * SLOTS
    scalars = scalars_ptr + tensor * SCALAR_FLOATS
    grad_coef = tl.load(control_ptr + 1 + tensor)
    # The skip flag leaves no elements, so that a skipped step neither reads nor writes.
    skip = tl.load(control_ptr) != 0.0
    numel = tl.where(skip, 0, tl.load(slots + NUMEL))
    aligned = tl.where(skip, 0, tl.load(slots + ALIGNED))
    PART: tl.constexpr = part_of(BLOCK, P, S0, S1, S2, AVERAGE)
    block = block_at(begin, numel, BLOCK)
    if begin + BLOCK <= aligned:
        update_block(
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
            "",
        )
    elif PART == BLOCK:
        update_block(
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
            False,
            "",
        )
    else:
        for part in range(BLOCK // PART):
            first = begin + part * PART
            if first < numel:
                part_block = block_at(first, numel, PART)
                update_block(
                    slots,
                    part_block,
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
                    PART,
                    False,
                    "",
                )
