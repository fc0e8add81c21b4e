"""SGD without and with momentum, csrc/rules/sgd.h."""

import triton
import triton.language as tl

from .decays import gradient, set_decay
from .rule import Rule, given, positions, put, with_decays

HYPER = tl.constexpr(("lr", "weight_decay", "l1_decay", "momentum", "dampening"))

LR, DECAY_AT = positions(2)
_, MOMENTUM, ONE_MINUS_DAMPENING, MOMENTUM_DECAY_AT = positions(4)


@triton.jit
def sgd(p, g, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    decay = scalars + DECAY_AT
    return lr, gradient(p, g, decay, DECAY), lr, lr, decay


@triton.jit
def update_buffer(p, g, buf, scalars, DECAY: tl.constexpr):
    """The decayed gradient and the buffer."""
    momentum = tl.load(scalars + MOMENTUM)
    one_minus_dampening = tl.load(scalars + ONE_MINUS_DAMPENING)
    d = gradient(p, g, scalars + MOMENTUM_DECAY_AT, DECAY)
    buf = tl.fma(momentum, buf, one_minus_dampening * d)
    return d, buf


@triton.jit
def sgd_momentum(p, g, buf, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    _, buf = update_buffer(p, g, buf, scalars, DECAY)
    return (lr, buf, lr, lr, scalars + MOMENTUM_DECAY_AT), buf


@triton.jit
def sgd_nesterov(p, g, buf, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    momentum = tl.load(scalars + MOMENTUM)
    d, buf = update_buffer(p, g, buf, scalars, DECAY)
    return (lr, tl.fma(momentum, buf, d), lr, lr, scalars + MOMENTUM_DECAY_AT), buf


@triton.jit
def set_sgd(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    put(scalars + LR, lr, mask)
    set_decay(hyper, HYPER, lr, scalars + DECAY_AT, mask, DECAY)


@triton.jit
def set_sgd_momentum(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    dampening = given(hyper, HYPER, "dampening", mask)
    put(scalars + LR, lr, mask)
    put(scalars + MOMENTUM, given(hyper, HYPER, "momentum", mask), mask)
    put(scalars + ONE_MINUS_DAMPENING, tl.where(fresh != 0, 1.0, 1.0 - dampening), mask)
    set_decay(hyper, HYPER, lr, scalars + MOMENTUM_DECAY_AT, mask, DECAY)


_SGD = Rule(sgd, set_sgd, HYPER.value)
_MOMENTUM = Rule(sgd_momentum, set_sgd_momentum, HYPER.value, states=("momentum_buffer",))

RULES = {
    **with_decays(_SGD, "sgdw", coupled="sgd"),
    **with_decays(_MOMENTUM, "sgdw", coupled="sgd", suffix="_momentum"),
    **with_decays(_MOMENTUM._replace(update=sgd_nesterov), "sgdw", coupled="sgd", suffix="_nesterov"),
}
