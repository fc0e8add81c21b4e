"""What runs before an update, on the device so that the host need not wait: the scalars of the step, its step counters, the loss
scale, and what a norm comes to.
"""

import torch
import triton
import triton.language as tl

from .families.parts import set_parts
from .random import seed_of

# Floats of a tensor in the table of scalars: a rule's, and a seed behind them; kScalarFloats in csrc.
SCALAR_FLOATS = tl.constexpr(18)

SEED = tl.constexpr(SCALAR_FLOATS.value - 2)

# Tensors of a program, which has one warp: a counter is then read before any thread writes it.
BLOCK = 32

# The numbers of a tensor in the table of jobs. A step counter and a scalar state either lie on the device, where the prologue
# advances them, or their values for this step are given.
GROUP = tl.constexpr(0)
SIGN = tl.constexpr(1)
FRESH = tl.constexpr(2)
COUNTER = tl.constexpr(3)  # its address, or 0
STEP = tl.constexpr(4)
SCALAR_STATE = tl.constexpr(5)  # its address where the counter has one
SCALAR_VALUE = tl.constexpr(6)  # the bits of a float64
KEY = tl.constexpr(7)  # of random bits
COUNTER_TYPE = tl.constexpr(8)  # NUMBER_TYPES has what the addresses point at
SCALAR_TYPE = tl.constexpr(9)
JOB = tl.constexpr(10)

FP32, FP64, INT32, INT64 = (tl.constexpr(i) for i in range(4))
NUMBER_TYPES = {torch.float32: 0, torch.float64: 1, torch.int32: 2, torch.int64: 3}


@triton.jit
def read_number(address, kind, mask):
    """Numbers of any type, in fp64, csrc/plan/number.h."""
    x = tl.load(address.to(tl.pointer_type(tl.float32)), mask=mask & (kind == FP32), other=0.0).to(tl.float64)
    wide = tl.load(address.to(tl.pointer_type(tl.float64)), mask=mask & (kind == FP64), other=0.0)
    short = tl.load(address.to(tl.pointer_type(tl.int32)), mask=mask & (kind == INT32), other=0).to(tl.float64)
    whole = tl.load(address.to(tl.pointer_type(tl.int64)), mask=mask & (kind == INT64), other=0).to(tl.float64)
    return tl.where(kind == FP32, x, tl.where(kind == FP64, wide, tl.where(kind == INT32, short, whole)))


@triton.jit
def write_number(address, kind, x, mask):
    tl.store(address.to(tl.pointer_type(tl.float32)), x.to(tl.float32), mask=mask & (kind == FP32))
    tl.store(address.to(tl.pointer_type(tl.float64)), x, mask=mask & (kind == FP64))
    whole = tl.where(kind >= INT32, x, 0.0).to(tl.int64)
    tl.store(address.to(tl.pointer_type(tl.int32)), whole.to(tl.int32), mask=mask & (kind == INT32))
    tl.store(address.to(tl.pointer_type(tl.int64)), whole, mask=mask & (kind == INT64))


@triton.jit
def rounded_number(kind, x):
    return tl.where(kind == FP32, x.to(tl.float32).to(tl.float64), x)


@triton.jit
def next_step(kind, step):
    """A counter after one more step; a float that 1 no longer moves goes to the next one that there is."""
    stays = (step > 0.0) & (step < float("inf"))
    x = step.to(tl.float32)
    after = x + 1.0
    above = (x.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    short = tl.where(stays & (after == x), above, after).to(tl.float64)
    after = step + 1.0
    above = (step.to(tl.int64, bitcast=True) + 1).to(tl.float64, bitcast=True)
    wide = tl.where(stays & (after == step), above, after)
    wide = tl.where((kind == INT32) & (after > 2147483647.0), step, wide)
    return tl.where(kind == FP32, short, wide)


@triton.jit
def countable(step):
    """The number of a step, so that it can be made an integer."""
    step = tl.where(step < 2.0**62, step, 2.0**62)
    return tl.where(step > 0.0, step, 0.0)


@triton.jit
def finish(
    total_ptr,
    grad_norm_ptr,
    clip_coef_ptr,
    max_norm,
    grad_coef,
    skip,
    INF: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
):
    """The last step of a norm: the gradient coefficient and the skip flag that it leaves."""
    # In the interpreter an argument is Python's float.
    max_norm = tl.full((), max_norm, tl.float32)
    grad_coef = tl.full((), grad_coef, tl.float32)
    root = tl.load(total_ptr)
    if not INF:
        root = tl.sqrt(root)
    norm = (root * grad_coef.to(tl.float64)).to(tl.float32)
    coef = tl.div_rn(max_norm, norm + 1e-6)
    coef = tl.where((coef > 1.0) | (max_norm == float("inf")), 1.0, coef)
    if SKIP_NONFINITE:
        skip = tl.where(norm - norm == 0.0, skip, 1.0)
    if grad_norm_ptr is not None:
        tl.store(grad_norm_ptr, norm)
    if clip_coef_ptr is not None:
        tl.store(clip_coef_ptr, coef)
    return grad_coef * coef, skip


@triton.jit
def seed_at(scalars):
    """Not as floats: a bit pattern may be a signalling NaN."""
    return (scalars + SEED).to(tl.pointer_type(tl.uint32), bitcast=True)


@triton.jit
def seed_in(scalars):
    seed = seed_at(scalars)
    return tl.load(seed), tl.load(seed + 1)


@triton.jit
def put_seed(key, step, scalars, mask):
    a, b = seed_of(key, step.to(tl.int64))
    seed = seed_at(scalars)
    tl.store(seed, a, mask=mask)
    tl.store(seed + 1, b, mask=mask)


@triton.jit
def prologue(
    hyper_ptr,
    jobs_ptr,
    scalars_ptr,
    control_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    grad_coef,
    tensors,
    total_ptr,
    grad_norm_ptr,
    clip_coef_ptr,
    skipped_ptr,
    max_norm,
    INF: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    SET_SCALARS: tl.constexpr,
    READS_STEP: tl.constexpr,
    ADVANCE: tl.constexpr,
    DECAY: tl.constexpr,
    OPTION: tl.constexpr,
    HYPERS: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the scalars of every tensor and what update_kernel reads at control_ptr; advance what is counted on the device, if
    COUNTS.

    hyper_ptr: float64 [groups, HYPERS]; jobs_ptr: int64 [tensors, JOB]; scalars_ptr: float32 [tensors, SCALAR_FLOATS]; ADVANCE:
    of the rule's scalar state, None without one. The pointers of a loss scaler, of a norm and of its results may be None.
    """
    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = tensor < tensors
    if grad_scale_ptr is not None:
        grad_coef = (1.0 / tl.load(grad_scale_ptr).to(tl.float64)).to(tl.float32) * grad_coef
    skip = 0.0
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr)
    if total_ptr is not None:
        grad_coef, skip = finish(
            total_ptr, grad_norm_ptr, clip_coef_ptr, max_norm, grad_coef, skip, INF, SKIP_NONFINITE
        )
    if skipped_ptr is not None:
        first = tl.program_id(0) == 0
        tl.store(skipped_ptr, tl.load(skipped_ptr) + 1, mask=first & (skip != 0.0))
    job = jobs_ptr + tensor * JOB
    group = tl.load(job + GROUP, mask=mask, other=0)
    sign = tl.load(job + SIGN, mask=mask, other=1).to(tl.float32)
    fresh = tl.load(job + FRESH, mask=mask, other=0)
    counter = tl.load(job + COUNTER, mask=mask, other=0)
    counter_type = tl.load(job + COUNTER_TYPE, mask=mask, other=0)
    step = tl.load(job + STEP, mask=mask, other=1).to(tl.float64)
    key = tl.load(job + KEY, mask=mask, other=0)
    tl.store(control_ptr + 1 + tensor, sign * grad_coef, mask=mask)

    hyper = hyper_ptr + group * HYPERS
    counts = mask & (counter != 0)
    step = tl.where(counts, next_step(counter_type, read_number(counter, counter_type, counts)), step)
    written = counts & COUNTS
    if (found_inf_ptr is not None) or (total_ptr is not None):
        written = tl.where(skip == 0.0, written, False)
    write_number(counter, counter_type, step, written)
    step = countable(step)
    scalar_state = None
    if ADVANCE is not None:
        state = tl.load(job + SCALAR_STATE, mask=mask, other=0)
        state_type = tl.load(job + SCALAR_TYPE, mask=mask, other=0)
        given = tl.load(job + SCALAR_VALUE, mask=mask, other=0).to(tl.float64, bitcast=True)
        before = read_number(state, state_type, counts)
        # Rounded before it is used: a checkpoint, which has the rounded one, goes on with the same bits.
        scalar_state = tl.where(counts, rounded_number(state_type, ADVANCE(hyper, step, before, mask)), given)
        write_number(state, state_type, scalar_state, written)
    tl.store(control_ptr, skip)
    scalars = scalars_ptr + tensor * SCALAR_FLOATS
    # A rule that reads the step without saying so does not compile.
    SET_SCALARS(hyper, step if READS_STEP else None, fresh, scalar_state, scalars, mask, DECAY, OPTION)
    if HAS_PARTS:
        set_parts(hyper, HYPERS, step, scalars, mask)
    put_seed(key, step, scalars, mask)
