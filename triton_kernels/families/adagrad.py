"""Adagrad, csrc/rules/adagrad.h."""

import triton
import triton.language as tl

from .decays import gradient, set_decay
from .rule import Rule, given, positions, put, with_decays

HYPER = tl.constexpr(("lr", "weight_decay", "l1_decay", "l1_cap", "lr_decay", "eps"))

LR, EPS, DECAY_AT = positions(3)


@triton.jit
def adagrad(p, g, s, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    eps = tl.load(scalars + EPS)
    decay = scalars + DECAY_AT
    d = gradient(p, g, decay, DECAY)
    s = tl.fma(d, d, s)
    den = tl.sqrt_rn(s) + eps
    return (lr, tl.div_rn(d, den), den, s, decay), s


@triton.jit
def set_adagrad(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr_decay = given(hyper, HYPER, "lr_decay", mask)
    lr = given(hyper, HYPER, "lr", mask) / (1.0 + (step.to(tl.float64) - 1.0) * lr_decay)
    put(scalars + LR, lr, mask)
    put(scalars + EPS, given(hyper, HYPER, "eps", mask), mask)
    set_decay(hyper, HYPER, lr, scalars + DECAY_AT, mask, DECAY)


_ADAGRAD = Rule(adagrad, set_adagrad, HYPER.value, states=("sum",), second_moments=("sum",), reads_step=True)

RULES = with_decays(_ADAGRAD, "adagradw", coupled="adagrad")
