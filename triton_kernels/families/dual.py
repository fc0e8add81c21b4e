"""Dual space preconditioning, entry by entry, and two passes of methods that map whole matrices, csrc/rules/dual.h: the
average of gradients before that, and the step along the result.

OPTION is a map of dual_maps.py.
"""

import triton
import triton.language as tl

from .decays import set_decay
from .dual_maps import map_floats, mapped, set_map
from .rule import Rule, given, positions, put

HYPER = tl.constexpr(("lr", "weight_decay", "momentum", "lookahead", "scale", "exponent", "offset", "slope"))
AVERAGE_HYPER = tl.constexpr(("momentum", "lookahead"))
DIRECTED_HYPER = tl.constexpr(("lr", "weight_decay"))

# A rule's map is followed by its decay.
LR, MAP_AT = positions(2)
_, AVERAGE_AT, _, MOMENTUM_MAP_AT = positions(4)
_, DIRECTED_DECAY_AT = positions(2)
# From where an average's scalars are.
ONE_MINUS_MOMENTUM, LOOKAHEAD = positions(2)


@triton.jit
def averaged(g, m, at):
    """A point between the average and g, and the average."""
    one_minus_momentum = tl.load(at + ONE_MINUS_MOMENTUM)
    lookahead = tl.load(at + LOOKAHEAD)
    m = tl.fma(one_minus_momentum, g - m, m)
    return tl.fma(lookahead, g - m, m), m


@triton.jit
def dual(p, g, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    at = scalars + MAP_AT
    decay = at + map_floats(OPTION)
    return lr, mapped(g, at, OPTION), lr, lr, decay


@triton.jit
def dual_momentum(p, g, m, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    at = scalars + MOMENTUM_MAP_AT
    decay = at + map_floats(OPTION)
    u, m = averaged(g, m, scalars + AVERAGE_AT)
    return (lr, mapped(u, at, OPTION), lr, lr, decay), m


@triton.jit
def average(p, g, m, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    return averaged(g, m, scalars)


@triton.jit
def directed(p, g, direction, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(scalars + LR)
    return (lr, direction, lr, lr, scalars + DIRECTED_DECAY_AT), direction


@triton.jit
def set_averaged(hyper, NAMES: tl.constexpr, at, mask):
    put(at + ONE_MINUS_MOMENTUM, 1.0 - given(hyper, NAMES, "momentum", mask), mask)
    put(at + LOOKAHEAD, given(hyper, NAMES, "lookahead", mask), mask)


@triton.jit
def set_mapped(hyper, lr, at, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    set_map(hyper, HYPER, at, mask, OPTION)
    set_decay(hyper, HYPER, lr, at + map_floats(OPTION), mask, DECAY)


@triton.jit
def set_dual(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    put(scalars + LR, lr, mask)
    set_mapped(hyper, lr, scalars + MAP_AT, mask, DECAY, OPTION)


@triton.jit
def set_dual_momentum(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    put(scalars + LR, lr, mask)
    set_averaged(hyper, HYPER, scalars + AVERAGE_AT, mask)
    set_mapped(hyper, lr, scalars + MOMENTUM_MAP_AT, mask, DECAY, OPTION)


@triton.jit
def set_average(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    set_averaged(hyper, AVERAGE_HYPER, scalars, mask)


@triton.jit
def set_directed(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, DIRECTED_HYPER, "lr", mask)
    put(scalars + LR, lr, mask)
    set_decay(hyper, DIRECTED_HYPER, lr, scalars + DIRECTED_DECAY_AT, mask, DECAY)


_DUAL = Rule(dual, set_dual, HYPER.value, decay="l2")
_MOMENTUM = Rule(dual_momentum, set_dual_momentum, HYPER.value, states=("momentum_buffer",), decay="l2")
_MAPS = ("ratio", "smoothed", "clip", "asinh", "log", "power")

RULES = {
    **{f"dual_{name}": _DUAL._replace(option=name) for name in _MAPS},
    **{f"dual_{name}_momentum": _MOMENTUM._replace(option=name) for name in _MAPS},
    "average": Rule(average, set_average, AVERAGE_HYPER.value, states=("momentum_buffer",)),
    "directed": Rule(directed, set_directed, DIRECTED_HYPER.value, states=("direction",), decay="l2"),
}
