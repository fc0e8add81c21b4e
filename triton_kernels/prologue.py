"""What runs before an update, on the device so that the host need not wait: the scalars of the step, its step counters, the loss
scale, and what a norm comes to.
"""

import triton
import triton.language as tl

from .random import seed_of

# Floats of a tensor in the table of scalars: a rule's, and a seed behind them; kScalarFloats in csrc.
SCALAR_FLOATS = tl.constexpr(16)

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
SCALAR_VALUE = tl.constexpr(6)  # the bits of a float32
KEY = tl.constexpr(7)  # of random bits
JOB = tl.constexpr(8)


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
    BLOCK: tl.constexpr,
):
    """Write the scalars of every tensor and what update_kernel reads at control_ptr; advance what is counted on the device.

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
    step = tl.load(job + STEP, mask=mask, other=1).to(tl.float32)
    key = tl.load(job + KEY, mask=mask, other=0)
    tl.store(control_ptr + 1 + tensor, sign * grad_coef, mask=mask)

    hyper = hyper_ptr + group * HYPERS
    counter_ptr = counter.to(tl.pointer_type(tl.float32))
    counts = mask & (counter != 0)
    step = tl.where(counts, tl.load(counter_ptr, mask=counts, other=0.0) + 1.0, step)
    written = counts
    if (found_inf_ptr is not None) or (total_ptr is not None):
        written = tl.where(skip == 0.0, counts, False)
    tl.store(counter_ptr, step, mask=written)
    scalar_state = None
    if ADVANCE is not None:
        state_ptr = tl.load(job + SCALAR_STATE, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        given = tl.load(job + SCALAR_VALUE, mask=mask, other=0).to(tl.int32).to(tl.float32, bitcast=True)
        before = tl.load(state_ptr, mask=counts, other=0.0).to(tl.float64)
        # Rounded before it is used: a checkpoint, which has the rounded one, goes on with the same bits.
        after = tl.where(counts, ADVANCE(hyper, step, before, mask).to(tl.float32), given)
        tl.store(state_ptr, after, mask=written)
        scalar_state = after.to(tl.float64)
    tl.store(control_ptr, skip)
    scalars = scalars_ptr + tensor * SCALAR_FLOATS
    # A rule that reads the step without saying so does not compile.
    SET_SCALARS(hyper, step if READS_STEP else None, fresh, scalar_state, scalars, mask, DECAY, OPTION)
    put_seed(key, step, scalars, mask)
