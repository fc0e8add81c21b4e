"""Schedule-free AdamW and SGD, csrc/rules/schedule_free.h."""

import triton
import triton.language as tl

from ..series import integer_power
from .decays import gradient, set_decay
from .rule import Rule, given, positions, put

# Those of SGD, and first among AdamW's.
HYPER = tl.constexpr(("lr", "weight_decay", "beta1", "warmup_steps", "r", "weight_lr_power", "lr_max"))
ADAMW_HYPER = tl.constexpr((*HYPER.value, "beta2", "eps"))

_LN2 = tl.constexpr(float.fromhex("0x1.62e42fefa39efp-1"))
_LOG2_E = tl.constexpr(float.fromhex("0x1.71547652b82fep0"))
_SMALLEST = tl.constexpr(float.fromhex("0x1p-1022"))
_LARGEST = tl.constexpr(float.fromhex("0x1.fffffffffffffp1023"))

LR, PULL, RATE, FIRST, DECAY_AT, BETA2, ONE_MINUS_BETA2, INV_SQRT_BIAS2, EPS = positions(9)


@triton.jit
def f64(x: tl.constexpr):
    return tl.full((), x, tl.float64)


@triton.jit
def fraction_power(base, exponent):
    bits = base.to(tl.int64, bitcast=True)
    k = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (k << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    log = z * 0.0
    for i in tl.static_range(12, -1, -1):
        log = log * z + f64(1.0) / f64(2.0 * i + 1.0)
    y = exponent * (k.to(tl.float64) * f64(_LN2) + 2.0 * s * log)
    n = tl.floor(y * f64(_LOG2_E) + 0.5)
    x = y - n * f64(_LN2)
    exp = x * 0.0 + 1.0
    for i in tl.static_range(14, 0, -1):
        exp = exp * x / f64(1.0 * i) + 1.0
    return exp * ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def power(base, exponent):
    """base^exponent for base >= 0 and exponent >= 0."""
    whole = tl.floor(exponent)
    rest = exponent - whole
    result = integer_power(base, whole.to(tl.int64))
    normal = (base >= f64(_SMALLEST)) & (base <= f64(_LARGEST))
    part = tl.where(normal, fraction_power(tl.where(normal, base, 1.0), rest), tl.where(base < 1.0, 0.0, base))
    return tl.where(rest > 0.0, result * part, result)


@triton.jit
def warm(hyper, step, mask):
    warmup_steps = tl.where(mask, given(hyper, HYPER, "warmup_steps", mask), 0.0)
    warms = step < warmup_steps
    return tl.where(warms, step / tl.where(warms, warmup_steps, 1.0), 1.0)


@triton.jit
def weight(hyper, step, mask):
    # What is masked may be anything.
    r = tl.where(mask, given(hyper, HYPER, "r", mask), 0.0)
    weight_lr_power = tl.where(mask, given(hyper, HYPER, "weight_lr_power", mask), 0.0)
    lr_max = given(hyper, HYPER, "lr_max", mask) * warm(hyper, step, mask)
    return power(step, r) * power(lr_max, weight_lr_power)


@triton.jit
def advance(hyper, step, weight_sum, mask):
    return weight_sum + weight(hyper, step, mask)


@triton.jit
def move(p, direction, z, scalars):
    lr = tl.load(scalars + LR)
    pull = tl.load(scalars + PULL)
    rate = tl.load(scalars + RATE)
    start = tl.where(tl.load(scalars + FIRST) != 0.0, p, z)
    finite = tl.abs(p) < float("inf")
    d = gradient(tl.where(finite, p, 0.0), direction, scalars + DECAY_AT, "coupled")
    added = tl.fma(-rate, d, pull * tl.where(finite, start - p, 0.0))
    return (p + added, -added), start - lr * d


@triton.jit
def schedule_free_sgd(p, g, z, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    return move(p, g, z, scalars)


@triton.jit
def schedule_free_adamw(p, g, z, v, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    beta2 = tl.load(scalars + BETA2)
    one_minus_beta2 = tl.load(scalars + ONE_MINUS_BETA2)
    inv_sqrt_bias2 = tl.load(scalars + INV_SQRT_BIAS2)
    eps = tl.load(scalars + EPS)
    v = tl.fma(one_minus_beta2 * g, g, beta2 * v)
    moved, z = move(p, tl.div_rn(g, tl.fma(tl.sqrt_rn(v), inv_sqrt_bias2, eps)), z, scalars)
    return moved, z, v


@triton.jit
def set_common(hyper, step, fresh, weight_sum, scalars, mask):
    lr = given(hyper, HYPER, "lr", mask) * warm(hyper, step, mask)
    counted = weight_sum > 0.0
    pull = weight(hyper, step, mask) / tl.where(counted, weight_sum, 1.0)
    pull = tl.where(counted, pull, 0.0)
    put(scalars + LR, lr, mask)
    put(scalars + PULL, pull, mask)
    put(scalars + RATE, lr * (1.0 - given(hyper, HYPER, "beta1", mask) * (1.0 - pull)), mask)
    put(scalars + FIRST, tl.where((fresh != 0) | (step <= 1.0), 1.0, 0.0), mask)
    set_decay(hyper, HYPER, lr, scalars + DECAY_AT, mask, "coupled")


@triton.jit
def set_sgd(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    set_common(hyper, step, fresh, scalar_state, scalars, mask)


@triton.jit
def set_adamw(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    set_common(hyper, step, fresh, scalar_state, scalars, mask)
    beta2 = given(hyper, ADAMW_HYPER, "beta2", mask)
    put(scalars + BETA2, beta2, mask)
    put(scalars + ONE_MINUS_BETA2, 1.0 - beta2, mask)
    put(scalars + INV_SQRT_BIAS2, 1.0 / tl.sqrt(1.0 - integer_power(beta2, step.to(tl.int64))), mask)
    put(scalars + EPS, given(hyper, ADAMW_HYPER, "eps", mask), mask)


_SGD = Rule(
    schedule_free_sgd,
    set_sgd,
    HYPER.value,
    states=("z",),
    reads_step=True,
    scalar_states=("weight_sum",),
    advance=advance,
    decay="given",
)
_ADAMW = _SGD._replace(
    update=schedule_free_adamw,
    set_scalars=set_adamw,
    hyper=ADAMW_HYPER.value,
    states=("z", "exp_avg_sq"),
    second_moments=("exp_avg_sq",),
)

RULES = {"schedule_free_adamw": _ADAMW, "schedule_free_sgd": _SGD}
