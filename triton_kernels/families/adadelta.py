"""Adadelta, csrc/rules/adadelta.h."""

import triton
import triton.language as tl

from .decays import gradient, set_decay
from .rule import Rule, given, positions, put, with_decays

HYPER = tl.constexpr(("lr", "weight_decay", "l1_decay", "l1_cap", "rho", "eps"))

LR, RHO, ONE_MINUS_RHO, EPS, DECAY_AT = positions(5)


@triton.jit
def adadelta(p, g, v, acc, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    rho = tl.load(scalars + RHO)
    one_minus_rho = tl.load(scalars + ONE_MINUS_RHO)
    eps = tl.load(scalars + EPS)
    decay = scalars + DECAY_AT
    d = gradient(p, g, decay, DECAY)
    v = tl.fma(one_minus_rho * d, d, rho * v)
    inv_den = tl.sqrt_rn(tl.div_rn(acc + eps, v + eps))
    u = inv_den * d
    acc = tl.fma(one_minus_rho * u, u, rho * acc)
    return (lr, u, tl.div_rn(1.0, inv_den), v, decay), v, acc


@triton.jit
def set_adadelta(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    rho = given(hyper, HYPER, "rho", mask)
    put(scalars + LR, lr, mask)
    put(scalars + RHO, rho, mask)
    put(scalars + ONE_MINUS_RHO, 1.0 - rho, mask)
    put(scalars + EPS, given(hyper, HYPER, "eps", mask), mask)
    set_decay(hyper, HYPER, lr, scalars + DECAY_AT, mask, DECAY)


_STATES = ("square_avg", "acc_delta")

RULES = with_decays(
    Rule(adadelta, set_adadelta, HYPER.value, states=_STATES, second_moments=_STATES), "adadeltaw", coupled="adadelta"
)
