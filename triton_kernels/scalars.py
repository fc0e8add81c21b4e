"""The scalars of a step, csrc/rules/scalars.h: fp64, for a block of tensors at once, from the hyper-parameters of their groups.

The positions of a rule's fields in a row are named here, for the functions that write them and the rules that read them.
"""

import triton
import triton.language as tl

from .random import seed_of

ROW_FLOATS = tl.constexpr(16)

# Where a row keeps the seed of its tensor's random bits; rules have the floats before.
SEED = tl.constexpr(ROW_FLOATS.value - 2)

# A decay's, from where its rule puts it.
WEIGHT_DECAY = tl.constexpr(0)
LR_WD = tl.constexpr(0)
LR_L1 = tl.constexpr(1)
LR_L1_CAP = tl.constexpr(2)

SGD_LR = tl.constexpr(0)
SGD_DECAY = tl.constexpr(1)
SGD_MOMENTUM = tl.constexpr(1)
SGD_ONE_MINUS_DAMPENING = tl.constexpr(2)
SGD_MOMENTUM_DECAY = tl.constexpr(3)

ONE_MINUS_BETA1 = tl.constexpr(0)
BETA2 = tl.constexpr(1)
ONE_MINUS_BETA2 = tl.constexpr(2)
INV_SQRT_BIAS2 = tl.constexpr(3)
ADAM_EPS = tl.constexpr(4)
STEP_SIZE = tl.constexpr(5)
ADAM_DECAY = tl.constexpr(6)

ADAGRAD_LR = tl.constexpr(0)
ADAGRAD_EPS = tl.constexpr(1)
ADAGRAD_DECAY = tl.constexpr(2)

RMSPROP_LR = tl.constexpr(0)
ALPHA = tl.constexpr(1)
ONE_MINUS_ALPHA = tl.constexpr(2)
RMSPROP_EPS = tl.constexpr(3)
RMSPROP_MOMENTUM = tl.constexpr(4)
RMSPROP_DECAY = tl.constexpr(5)

LION_LR = tl.constexpr(0)
LION_ONE_MINUS_BETA1 = tl.constexpr(1)
LION_ONE_MINUS_BETA2 = tl.constexpr(2)
LION_DECAY = tl.constexpr(3)

DUAL_LR = tl.constexpr(0)
DUAL_KERNEL = tl.constexpr(1)
DUAL_AVERAGE = tl.constexpr(1)
DUAL_MOMENTUM_KERNEL = tl.constexpr(3)
ONE_MINUS_MOMENTUM = tl.constexpr(0)
LOOKAHEAD = tl.constexpr(1)

GN_ONE_MINUS_BETA1 = tl.constexpr(0)
GN_BETA2 = tl.constexpr(1)
GN_ONE_MINUS_BETA2 = tl.constexpr(2)
GN_SCALE = tl.constexpr(3)
GN_EPS = tl.constexpr(4)
GN_CLIP = tl.constexpr(5)
GN_STEP_SIZE = tl.constexpr(6)
GN_DECAY = tl.constexpr(7)

RADIUS = tl.constexpr(0)
ROOT_SCALE = tl.constexpr(1)
PERTURB_EPS = tl.constexpr(2)

# The order of a group's hyper-parameters, as csrc/rules/hyper.h.
SGD_HYPER = ("lr", "weight_decay", "l1_decay", "momentum", "dampening")
ADAM_HYPER = ("lr", "weight_decay", "l1_decay", "l1_cap", "beta1", "beta2", "eps")
ADAGRAD_HYPER = ("lr", "weight_decay", "l1_decay", "l1_cap", "lr_decay", "eps")
RMSPROP_HYPER = ("lr", "weight_decay", "l1_decay", "l1_cap", "alpha", "eps", "momentum")
LION_HYPER = ("lr", "weight_decay", "l1_decay", "beta1", "beta2")
DUAL_HYPER = ("lr", "weight_decay", "momentum", "lookahead", "scale", "exponent", "offset", "slope")
AVERAGE_HYPER = ("momentum", "lookahead")
GAUSS_NEWTON_HYPER = (
    "lr",
    "weight_decay",
    "l1_decay",
    "l1_cap",
    "beta1",
    "beta2",
    "eps",
    "scale",
    "clip",
    "corrected",
)
PERTURB_HYPER = ("radius", "scale", "eps")

# A float32 counter cannot pass 2^24.
_STEP_BITS = tl.constexpr(25)


@triton.jit
def integer_power(base, n):
    result = base * 0.0 + 1.0
    for _ in tl.static_range(_STEP_BITS):
        result = tl.where((n & 1) != 0, result * base, result)
        base = base * base
        n = n >> 1
    return result


@triton.jit
def decay_scalars(hyper, lr, row, mask, DECAY: tl.constexpr, CAPPED: tl.constexpr):
    weight_decay = tl.load(hyper + 1, mask=mask)
    if DECAY == "coupled":
        tl.store(row + WEIGHT_DECAY, weight_decay.to(tl.float32), mask=mask)
    else:
        tl.store(row + LR_WD, (lr * weight_decay).to(tl.float32), mask=mask)
        tl.store(row + LR_L1, (lr * tl.load(hyper + 2, mask=mask)).to(tl.float32), mask=mask)
        if CAPPED:
            tl.store(row + LR_L1_CAP, (lr * tl.load(hyper + 3, mask=mask)).to(tl.float32), mask=mask)


@triton.jit
def sgd_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(hyper + 0, mask=mask)
    tl.store(row + SGD_LR, lr.to(tl.float32), mask=mask)
    decay_scalars(hyper, lr, row + SGD_DECAY, mask, DECAY, False)


@triton.jit
def sgd_momentum_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(hyper + 0, mask=mask)
    momentum = tl.load(hyper + 3, mask=mask)
    dampening = tl.load(hyper + 4, mask=mask)
    tl.store(row + SGD_LR, lr.to(tl.float32), mask=mask)
    tl.store(row + SGD_MOMENTUM, momentum.to(tl.float32), mask=mask)
    one_minus_dampening = tl.where(fresh != 0, 1.0, (1.0 - dampening).to(tl.float32))
    tl.store(row + SGD_ONE_MINUS_DAMPENING, one_minus_dampening, mask=mask)
    decay_scalars(hyper, lr, row + SGD_MOMENTUM_DECAY, mask, DECAY, False)


@triton.jit
def adam_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(hyper + 0, mask=mask)
    beta1 = tl.load(hyper + 4, mask=mask)
    beta2 = tl.load(hyper + 5, mask=mask)
    eps = tl.load(hyper + 6, mask=mask)
    t = step.to(tl.int64)
    tl.store(row + ONE_MINUS_BETA1, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(row + BETA2, beta2.to(tl.float32), mask=mask)
    tl.store(row + ONE_MINUS_BETA2, (1.0 - beta2).to(tl.float32), mask=mask)
    inv_sqrt_bias2 = 1.0 / tl.sqrt(1.0 - integer_power(beta2, t))
    tl.store(row + INV_SQRT_BIAS2, inv_sqrt_bias2.to(tl.float32), mask=mask)
    tl.store(row + ADAM_EPS, eps.to(tl.float32), mask=mask)
    tl.store(row + STEP_SIZE, (lr / (1.0 - integer_power(beta1, t))).to(tl.float32), mask=mask)
    decay_scalars(hyper, lr, row + ADAM_DECAY, mask, DECAY, True)


@triton.jit
def adagrad_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr_decay = tl.load(hyper + 4, mask=mask)
    eps = tl.load(hyper + 5, mask=mask)
    lr = tl.load(hyper + 0, mask=mask) / (1.0 + (step.to(tl.float64) - 1.0) * lr_decay)
    tl.store(row + ADAGRAD_LR, lr.to(tl.float32), mask=mask)
    tl.store(row + ADAGRAD_EPS, eps.to(tl.float32), mask=mask)
    decay_scalars(hyper, lr, row + ADAGRAD_DECAY, mask, DECAY, True)


@triton.jit
def rmsprop_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(hyper + 0, mask=mask)
    alpha = tl.load(hyper + 4, mask=mask)
    eps = tl.load(hyper + 5, mask=mask)
    momentum = tl.load(hyper + 6, mask=mask)
    tl.store(row + RMSPROP_LR, lr.to(tl.float32), mask=mask)
    tl.store(row + ALPHA, alpha.to(tl.float32), mask=mask)
    tl.store(row + ONE_MINUS_ALPHA, (1.0 - alpha).to(tl.float32), mask=mask)
    tl.store(row + RMSPROP_EPS, eps.to(tl.float32), mask=mask)
    tl.store(row + RMSPROP_MOMENTUM, momentum.to(tl.float32), mask=mask)
    decay_scalars(hyper, lr, row + RMSPROP_DECAY, mask, DECAY, True)


@triton.jit
def lion_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(hyper + 0, mask=mask)
    beta1 = tl.load(hyper + 3, mask=mask)
    beta2 = tl.load(hyper + 4, mask=mask)
    tl.store(row + LION_LR, lr.to(tl.float32), mask=mask)
    tl.store(row + LION_ONE_MINUS_BETA1, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(row + LION_ONE_MINUS_BETA2, (1.0 - beta2).to(tl.float32), mask=mask)
    decay_scalars(hyper, lr, row + LION_DECAY, mask, DECAY, False)


@triton.constexpr_function
def is_own(option):
    return option in ("own", "own_root")


@triton.constexpr_function
def is_root(option):
    return option in ("root", "own_root")


@triton.constexpr_function
def kernel_floats(kernel):
    """How many numbers of a row a kernel has."""
    return 2 if kernel in ("ratio", "power") else 1


@triton.jit
def kernel_scalars(hyper, at, mask, KERNEL: tl.constexpr):
    scale = tl.load(hyper + 4, mask=mask)
    if KERNEL == "ratio":
        tl.store(at, tl.load(hyper + 6, mask=mask).to(tl.float32), mask=mask)
        tl.store(at + 1, tl.load(hyper + 7, mask=mask).to(tl.float32), mask=mask)
    elif KERNEL == "smoothed":
        tl.store(at, (scale * scale).to(tl.float32), mask=mask)
    else:
        tl.store(at, scale.to(tl.float32), mask=mask)
        if KERNEL == "power":
            tl.store(at + 1, tl.load(hyper + 5, mask=mask).to(tl.float32), mask=mask)


@triton.jit
def dual_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(hyper + 0, mask=mask)
    tl.store(row + DUAL_LR, lr.to(tl.float32), mask=mask)
    kernel_scalars(hyper, row + DUAL_KERNEL, mask, OPTION)
    decay_scalars(hyper, lr, row + DUAL_KERNEL + kernel_floats(OPTION), mask, DECAY, False)


@triton.jit
def averaging_scalars(momentum, lookahead, at, mask):
    tl.store(at + ONE_MINUS_MOMENTUM, (1.0 - momentum).to(tl.float32), mask=mask)
    tl.store(at + LOOKAHEAD, lookahead.to(tl.float32), mask=mask)


@triton.jit
def dual_momentum_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(hyper + 0, mask=mask)
    tl.store(row + DUAL_LR, lr.to(tl.float32), mask=mask)
    averaging_scalars(tl.load(hyper + 2, mask=mask), tl.load(hyper + 3, mask=mask), row + DUAL_AVERAGE, mask)
    kernel_scalars(hyper, row + DUAL_MOMENTUM_KERNEL, mask, OPTION)
    decay_scalars(hyper, lr, row + DUAL_MOMENTUM_KERNEL + kernel_floats(OPTION), mask, DECAY, False)


@triton.jit
def average_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    averaging_scalars(tl.load(hyper, mask=mask), tl.load(hyper + 1, mask=mask), row, mask)


@triton.jit
def gauss_newton_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(hyper + 0, mask=mask)
    beta1 = tl.load(hyper + 4, mask=mask)
    beta2 = tl.load(hyper + 5, mask=mask)
    scale = tl.load(hyper + 7, mask=mask)
    t = step.to(tl.int64)
    bias1 = tl.where(tl.load(hyper + 9, mask=mask) != 0.0, 1.0 - integer_power(beta1, t), 1.0)
    if is_own(OPTION):
        scale = scale / (1.0 - integer_power(beta2, t))
    tl.store(row + GN_ONE_MINUS_BETA1, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(row + GN_BETA2, beta2.to(tl.float32), mask=mask)
    tl.store(row + GN_ONE_MINUS_BETA2, (1.0 - beta2).to(tl.float32), mask=mask)
    tl.store(row + GN_SCALE, scale.to(tl.float32), mask=mask)
    tl.store(row + GN_EPS, tl.load(hyper + 6, mask=mask).to(tl.float32), mask=mask)
    tl.store(row + GN_CLIP, (tl.load(hyper + 8, mask=mask) * bias1).to(tl.float32), mask=mask)
    tl.store(row + GN_STEP_SIZE, (lr / bias1).to(tl.float32), mask=mask)
    decay_scalars(hyper, lr, row + GN_DECAY, mask, DECAY, True)


@triton.jit
def perturb_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    tl.store(row + RADIUS, tl.load(hyper, mask=mask).to(tl.float32), mask=mask)


@triton.jit
def perturb_adaptive_scalars(hyper, step, fresh, row, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    perturb_scalars(hyper, step, fresh, row, mask, DECAY, OPTION)
    tl.store(row + ROOT_SCALE, tl.sqrt(tl.load(hyper + 1, mask=mask)).to(tl.float32), mask=mask)
    tl.store(row + PERTURB_EPS, tl.load(hyper + 2, mask=mask).to(tl.float32), mask=mask)


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
def seed_at(row):
    """Not as floats: a bit pattern may be a signalling NaN."""
    return (row + SEED).to(tl.pointer_type(tl.uint32), bitcast=True)


@triton.jit
def seed_in(row):
    seed = seed_at(row)
    return tl.load(seed), tl.load(seed + 1)


@triton.jit
def put_seed(key, step, row, mask):
    a, b = seed_of(key, step.to(tl.int64))
    seed = seed_at(row)
    tl.store(seed, a, mask=mask)
    tl.store(seed + 1, b, mask=mask)


@triton.jit
def prologue(
    hyper_ptr,
    jobs_ptr,
    rows_ptr,
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
    SCALARS: tl.constexpr,
    DECAY: tl.constexpr,
    OPTION: tl.constexpr,
    HYPERS: tl.constexpr,
    JOB: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fill one row per tensor and what update_kernel reads at control_ptr; count the steps that are counted on the device.

    hyper_ptr: float64 [groups, HYPERS]; jobs_ptr: int64 [tensors, JOB]: group, sign, fresh, the address of a counter or 0,
    and without one the number of this step, the key of random bits; the pointers of a loss scaler, of a norm and of its results
    may be None.
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
    group = tl.load(job, mask=mask, other=0)
    sign = tl.load(job + 1, mask=mask, other=1).to(tl.float32)
    fresh = tl.load(job + 2, mask=mask, other=0)
    counter = tl.load(job + 3, mask=mask, other=0)
    step = tl.load(job + 4, mask=mask, other=1).to(tl.float32)
    key = tl.load(job + 5, mask=mask, other=0)
    tl.store(control_ptr + 1 + tensor, sign * grad_coef, mask=mask)

    counter_ptr = counter.to(tl.pointer_type(tl.float32))
    counts = mask & (counter != 0)
    step = tl.where(counts, tl.load(counter_ptr, mask=counts, other=0.0) + 1.0, step)
    if (found_inf_ptr is not None) or (total_ptr is not None):
        counts = tl.where(skip == 0.0, counts, False)
    tl.store(counter_ptr, step, mask=counts)
    tl.store(control_ptr, skip)
    row = rows_ptr + tensor * ROW
    SCALARS(hyper_ptr + group * HYPERS, step, fresh, row, mask, DECAY, OPTION)
    put_seed(key, step, row, mask)
