"""Lion, csrc/rules/lion.h."""

import triton
import triton.language as tl

from ..arithmetic import sign
from .decays import gradient, set_decay
from .rule import Rule, given, positions, put, with_decays

HYPER = tl.constexpr(("lr", "weight_decay", "l1_decay", "beta1", "beta2"))

LR, ONE_MINUS_BETA1, ONE_MINUS_BETA2, DECAY_AT = positions(4)


@triton.jit
def lion(p, g, m, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    one_minus_beta1 = tl.load(scalars + ONE_MINUS_BETA1)
    one_minus_beta2 = tl.load(scalars + ONE_MINUS_BETA2)
    decay = scalars + DECAY_AT
    d = gradient(p, g, decay, DECAY)
    c = tl.fma(one_minus_beta1, d - m, m)
    m = tl.fma(one_minus_beta2, d - m, m)
    return (lr, sign(c), lr, lr, decay), m


@triton.jit
def set_lion(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    put(scalars + LR, lr, mask)
    put(scalars + ONE_MINUS_BETA1, 1.0 - given(hyper, HYPER, "beta1", mask), mask)
    put(scalars + ONE_MINUS_BETA2, 1.0 - given(hyper, HYPER, "beta2", mask), mask)
    set_decay(hyper, HYPER, lr, scalars + DECAY_AT, mask, DECAY)


RULES = with_decays(Rule(lion, set_lion, HYPER.value, states=("exp_avg",)), "lion")
