"""RMSprop, centered or not, without and with momentum, csrc/rules/rmsprop.h."""

import triton
import triton.language as tl

from .decays import gradient, set_decay
from .rule import Rule, given, positions, put, with_decays

HYPER = tl.constexpr(("lr", "weight_decay", "l1_decay", "l1_cap", "alpha", "eps", "momentum"))

LR, ALPHA, ONE_MINUS_ALPHA, EPS, MOMENTUM, DECAY_AT = positions(6)


@triton.jit
def update_square(d, v, scalars):
    alpha = tl.load(scalars + ALPHA)
    one_minus_alpha = tl.load(scalars + ONE_MINUS_ALPHA)
    return tl.fma(one_minus_alpha * d, d, alpha * v)


@triton.jit
def den_of(v, scalars):
    return tl.sqrt_rn(v) + tl.load(scalars + EPS)


@triton.jit
def centered_den(d, v, mean, scalars):
    """From the variance, which rounding can make negative; and the mean."""
    one_minus_alpha = tl.load(scalars + ONE_MINUS_ALPHA)
    mean = tl.fma(one_minus_alpha, d - mean, mean)
    variance = tl.fma(-mean, mean, v)
    return den_of(tl.where(variance < 0.0, 0.0, variance), scalars), mean


@triton.jit
def rmsprop(p, g, v, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    decay = scalars + DECAY_AT
    d = gradient(p, g, decay, DECAY)
    v = update_square(d, v, scalars)
    den = den_of(v, scalars)
    return (lr, tl.div_rn(d, den), den, v, decay), v


@triton.jit
def rmsprop_centered(p, g, v, mean, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    decay = scalars + DECAY_AT
    d = gradient(p, g, decay, DECAY)
    v = update_square(d, v, scalars)
    den, mean = centered_den(d, v, mean, scalars)
    return (lr, tl.div_rn(d, den), den, v, decay), v, mean


@triton.jit
def rmsprop_momentum(p, g, v, buf, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    momentum = tl.load(scalars + MOMENTUM)
    decay = scalars + DECAY_AT
    d = gradient(p, g, decay, DECAY)
    v = update_square(d, v, scalars)
    den = den_of(v, scalars)
    buf = tl.fma(momentum, buf, tl.div_rn(d, den))
    return (lr, buf, den, v, decay), v, buf


@triton.jit
def rmsprop_centered_momentum(p, g, v, buf, mean, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    momentum = tl.load(scalars + MOMENTUM)
    decay = scalars + DECAY_AT
    d = gradient(p, g, decay, DECAY)
    v = update_square(d, v, scalars)
    den, mean = centered_den(d, v, mean, scalars)
    buf = tl.fma(momentum, buf, tl.div_rn(d, den))
    return (lr, buf, den, v, decay), v, buf, mean


@triton.jit
def set_rmsprop(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    alpha = given(hyper, HYPER, "alpha", mask)
    put(scalars + LR, lr, mask)
    put(scalars + ALPHA, alpha, mask)
    put(scalars + ONE_MINUS_ALPHA, 1.0 - alpha, mask)
    put(scalars + EPS, given(hyper, HYPER, "eps", mask), mask)
    put(scalars + MOMENTUM, given(hyper, HYPER, "momentum", mask), mask)
    set_decay(hyper, HYPER, lr, scalars + DECAY_AT, mask, DECAY)


_RMSPROP = Rule(rmsprop, set_rmsprop, HYPER.value, states=("square_avg",), second_moments=("square_avg",))
_CENTERED = _RMSPROP._replace(update=rmsprop_centered, states=("square_avg", "grad_avg"))
_MOMENTUM = _RMSPROP._replace(update=rmsprop_momentum, states=("square_avg", "momentum_buffer"))
_BOTH = _RMSPROP._replace(update=rmsprop_centered_momentum, states=("square_avg", "momentum_buffer", "grad_avg"))

RULES = {
    **with_decays(_RMSPROP, "rmspropw", coupled="rmsprop"),
    **with_decays(_CENTERED, "rmspropw", coupled="rmsprop", suffix="_centered"),
    **with_decays(_MOMENTUM, "rmspropw", coupled="rmsprop", suffix="_momentum"),
    **with_decays(_BOTH, "rmspropw", coupled="rmsprop", suffix="_centered_momentum"),
}
