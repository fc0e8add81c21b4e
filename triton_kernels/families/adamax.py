"""Adamax, csrc/rules/adamax.h."""

import triton
import triton.language as tl

from ..arithmetic import magnitude_of, maximum
from ..series import integer_power
from .decays import gradient, set_decay
from .rule import Rule, given, positions, put, with_decays

HYPER = tl.constexpr(("lr", "weight_decay", "l1_decay", "l1_cap", "beta1", "beta2", "eps"))

ONE_MINUS_BETA1, BETA2, EPS, STEP_SIZE, DECAY_AT = positions(5)


@triton.jit
def adamax(p, g, m, u, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    one_minus_beta1 = tl.load(scalars + ONE_MINUS_BETA1)
    beta2 = tl.load(scalars + BETA2)
    eps = tl.load(scalars + EPS)
    step_size = tl.load(scalars + STEP_SIZE)
    decay = scalars + DECAY_AT
    d = gradient(p, g, decay, DECAY)
    m = tl.fma(one_minus_beta1, d - m, m)
    if DECAY == "coupled":
        u = maximum(beta2 * u, magnitude_of(d) + eps)
        den = u
    else:
        u = maximum(beta2 * u, magnitude_of(d))
        den = u + eps
    return (step_size, tl.div_rn(m, den), den, u, decay), m, u


@triton.jit
def set_adamax(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    beta1 = given(hyper, HYPER, "beta1", mask)
    put(scalars + ONE_MINUS_BETA1, 1.0 - beta1, mask)
    put(scalars + BETA2, given(hyper, HYPER, "beta2", mask), mask)
    put(scalars + EPS, given(hyper, HYPER, "eps", mask), mask)
    put(scalars + STEP_SIZE, lr / (1.0 - integer_power(beta1, step.to(tl.int64))), mask)
    set_decay(hyper, HYPER, lr, scalars + DECAY_AT, mask, DECAY)


_ADAMAX = Rule(
    adamax, set_adamax, HYPER.value, states=("exp_avg", "exp_inf"), second_moments=("exp_inf",), reads_step=True
)

RULES = with_decays(_ADAMAX, "adamaxw", coupled="adamax")
