"""RAdam, csrc/rules/radam.h."""

import triton
import triton.language as tl

from ..series import integer_power
from .decays import gradient, set_decay
from .rule import Rule, given, positions, put, with_decays

HYPER = tl.constexpr(("lr", "weight_decay", "l1_decay", "l1_cap", "beta1", "beta2", "eps"))

ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, OF_ROOT, OF_ONE, STEP_SIZE, DECAY_AT = positions(7)


@triton.jit
def radam(p, g, m, v, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    one_minus_beta1 = tl.load(scalars + ONE_MINUS_BETA1)
    beta2 = tl.load(scalars + BETA2)
    one_minus_beta2 = tl.load(scalars + ONE_MINUS_BETA2)
    of_root = tl.load(scalars + OF_ROOT)
    of_one = tl.load(scalars + OF_ONE)
    step_size = tl.load(scalars + STEP_SIZE)
    d = gradient(p, g, scalars + DECAY_AT, DECAY)
    m = tl.fma(one_minus_beta1, d - m, m)
    v = tl.fma(one_minus_beta2 * d, d, beta2 * v)
    den = tl.where(of_root > 0.0, tl.fma(tl.sqrt_rn(v), of_root, of_one), 1.0)
    return (step_size, tl.div_rn(m, den), den, v, scalars + DECAY_AT), m, v


@triton.jit
def set_radam(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    beta1 = given(hyper, HYPER, "beta1", mask)
    beta2 = given(hyper, HYPER, "beta2", mask)
    t = step.to(tl.int64)
    power = integer_power(beta2, t)
    bias2 = 1.0 - power
    longest = 2.0 / (1.0 - beta2) - 1.0
    length = longest - 2.0 * step.to(tl.float64) * power / bias2
    rectified = length > 5.0
    longest = tl.where(rectified, longest, 6.0)
    length = tl.where(rectified, length, 6.0)
    variance = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
    of_root = 1.0 / tl.sqrt(variance * bias2)
    put(scalars + ONE_MINUS_BETA1, 1.0 - beta1, mask)
    put(scalars + BETA2, beta2, mask)
    put(scalars + ONE_MINUS_BETA2, 1.0 - beta2, mask)
    put(scalars + OF_ROOT, tl.where(rectified, of_root, 0.0), mask)
    put(scalars + OF_ONE, given(hyper, HYPER, "eps", mask) * of_root, mask)
    put(scalars + STEP_SIZE, lr / (1.0 - integer_power(beta1, t)), mask)
    set_decay(hyper, HYPER, lr, scalars + DECAY_AT, mask, DECAY)


_RADAM = Rule(
    radam,
    set_radam,
    HYPER.value,
    states=("exp_avg", "exp_avg_sq"),
    second_moments=("exp_avg_sq",),
    reads_step=True,
)

RULES = with_decays(_RADAM, "radamw", coupled="radam")
