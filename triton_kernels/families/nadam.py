"""NAdam, csrc/rules/nadam.h."""

import triton
import triton.language as tl

from ..series import integer_power
from .decays import gradient, set_decay
from .rule import Rule, given, positions, put, with_decays

HYPER = tl.constexpr(("lr", "weight_decay", "l1_decay", "l1_cap", "beta1", "beta2", "eps", "q"))

ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, INV_SQRT_BIAS2, EPS, LR, OF_GRADIENT, OF_MOMENT, DECAY_AT = positions(9)


@triton.jit
def momentum(hyper, t, mask):
    q = integer_power(given(hyper, HYPER, "q", mask), t)
    return given(hyper, HYPER, "beta1", mask) * (1.0 - 0.5 * q)


@triton.jit
def advance(hyper, step, product, mask):
    return product * momentum(hyper, step.to(tl.int64), mask).to(tl.float32).to(tl.float64)


@triton.jit
def nadam(p, g, m, v, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    one_minus_beta1 = tl.load(scalars + ONE_MINUS_BETA1)
    beta2 = tl.load(scalars + BETA2)
    one_minus_beta2 = tl.load(scalars + ONE_MINUS_BETA2)
    inv_sqrt_bias2 = tl.load(scalars + INV_SQRT_BIAS2)
    eps = tl.load(scalars + EPS)
    lr = tl.load(scalars + LR)
    of_gradient = tl.load(scalars + OF_GRADIENT)
    of_moment = tl.load(scalars + OF_MOMENT)
    d = gradient(p, g, scalars + DECAY_AT, DECAY)
    m = tl.fma(one_minus_beta1, d - m, m)
    v = tl.fma(one_minus_beta2 * d, d, beta2 * v)
    den = tl.fma(tl.sqrt_rn(v), inv_sqrt_bias2, eps)
    direction = tl.div_rn(tl.fma(of_moment, m, of_gradient * d), den)
    return (lr, direction, den, v, scalars + DECAY_AT), m, v


@triton.jit
def set_nadam(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    beta1 = given(hyper, HYPER, "beta1", mask)
    beta2 = given(hyper, HYPER, "beta2", mask)
    t = step.to(tl.int64)
    next = momentum(hyper, t + 1, mask)
    put(scalars + ONE_MINUS_BETA1, 1.0 - beta1, mask)
    put(scalars + BETA2, beta2, mask)
    put(scalars + ONE_MINUS_BETA2, 1.0 - beta2, mask)
    put(scalars + INV_SQRT_BIAS2, 1.0 / tl.sqrt(1.0 - integer_power(beta2, t)), mask)
    put(scalars + EPS, given(hyper, HYPER, "eps", mask), mask)
    put(scalars + LR, lr, mask)
    put(scalars + OF_GRADIENT, (1.0 - momentum(hyper, t, mask)) / (1.0 - scalar_state), mask)
    put(scalars + OF_MOMENT, next / (1.0 - scalar_state * next), mask)
    set_decay(hyper, HYPER, lr, scalars + DECAY_AT, mask, DECAY)


_NADAM = Rule(
    nadam,
    set_nadam,
    HYPER.value,
    states=("exp_avg", "exp_avg_sq"),
    second_moments=("exp_avg_sq",),
    reads_step=True,
    scalar_states=("mu_product",),
    advance=advance,
)

RULES = with_decays(_NADAM, "nadamw", coupled="nadam")
