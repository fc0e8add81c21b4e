"""Adam and AMSGrad, csrc/rules/adam.h."""

import triton
import triton.language as tl

from ..arithmetic import maximum
from ..series import integer_power
from .decays import gradient, set_decay
from .rule import Rule, given, positions, put, with_decays

HYPER = tl.constexpr(("lr", "weight_decay", "l1_decay", "l1_cap", "beta1", "beta2", "eps"))

ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, INV_SQRT_BIAS2, EPS, STEP_SIZE, DECAY_AT = positions(7)


@triton.jit
def update_moments(p, g, m, v, scalars, DECAY: tl.constexpr):
    one_minus_beta1 = tl.load(scalars + ONE_MINUS_BETA1)
    beta2 = tl.load(scalars + BETA2)
    one_minus_beta2 = tl.load(scalars + ONE_MINUS_BETA2)
    d = gradient(p, g, scalars + DECAY_AT, DECAY)
    m = tl.fma(one_minus_beta1, d - m, m)
    v = tl.fma(one_minus_beta2 * d, d, beta2 * v)
    return m, v


@triton.jit
def step_of(m, v, scalars):
    inv_sqrt_bias2 = tl.load(scalars + INV_SQRT_BIAS2)
    eps = tl.load(scalars + EPS)
    step_size = tl.load(scalars + STEP_SIZE)
    den = tl.fma(tl.sqrt_rn(v), inv_sqrt_bias2, eps)
    return step_size, tl.div_rn(m, den), den, v, scalars + DECAY_AT


@triton.jit
def adam(p, g, m, v, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    m, v = update_moments(p, g, m, v, scalars, DECAY)
    return step_of(m, v, scalars), m, v


@triton.jit
def adam_amsgrad(p, g, m, v, v_max, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    m, v = update_moments(p, g, m, v, scalars, DECAY)
    v_max = maximum(v_max, v)
    return step_of(m, v_max, scalars), m, v, v_max


@triton.jit
def set_adam(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    beta1 = given(hyper, HYPER, "beta1", mask)
    beta2 = given(hyper, HYPER, "beta2", mask)
    t = step.to(tl.int64)
    put(scalars + ONE_MINUS_BETA1, 1.0 - beta1, mask)
    put(scalars + BETA2, beta2, mask)
    put(scalars + ONE_MINUS_BETA2, 1.0 - beta2, mask)
    put(scalars + INV_SQRT_BIAS2, 1.0 / tl.sqrt(1.0 - integer_power(beta2, t)), mask)
    put(scalars + EPS, given(hyper, HYPER, "eps", mask), mask)
    put(scalars + STEP_SIZE, lr / (1.0 - integer_power(beta1, t)), mask)
    set_decay(hyper, HYPER, lr, scalars + DECAY_AT, mask, DECAY)


_ADAM = Rule(
    adam,
    set_adam,
    HYPER.value,
    states=("exp_avg", "exp_avg_sq"),
    second_moments=("exp_avg_sq",),
    reads_step=True,
)
_AMSGRAD = _ADAM._replace(
    update=adam_amsgrad,
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    second_moments=("exp_avg_sq", "max_exp_avg_sq"),
)

RULES = {
    **with_decays(_ADAM, "adamw", coupled="adam"),
    **with_decays(_AMSGRAD, "adamw", coupled="adam", suffix="_amsgrad"),
}
