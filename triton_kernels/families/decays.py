"""The decays of csrc/rules/decays.h, line for line, and their scalars. No rule is here.

DECAY is "coupled", "l2", "l1_proximal" or "l1_subgradient", for the structs there, or "" for a rule without a decay. ``at``
points at a decay's scalars, which a rule has behind its own. The Step of decays.h is a tuple here: (rate, direction, den, v, at),
with None for den and v where den = 1.
"""

import triton
import triton.language as tl

from ..arithmetic import soft_threshold
from .rule import given, positions, put

(WEIGHT_DECAY,) = positions(1)  # of "coupled"
LR_WD, LR_L1, LR_L1_CAP = positions(3)  # of the others


@triton.constexpr_function
def has(names, name):
    return name in names


@triton.jit
def set_decay(hyper, HYPER: tl.constexpr, lr, at, mask, DECAY: tl.constexpr):
    """lr: of this step, which Adagrad makes smaller with every step; its decays shrink with it."""
    weight_decay = given(hyper, HYPER, "weight_decay", mask)
    if DECAY == "coupled":
        put(at + WEIGHT_DECAY, weight_decay, mask)
    else:
        put(at + LR_WD, lr * weight_decay, mask)
        if DECAY != "l2":
            put(at + LR_L1, lr * given(hyper, HYPER, "l1_decay", mask), mask)
            if has(HYPER, "l1_cap"):
                put(at + LR_L1_CAP, lr * given(hyper, HYPER, "l1_cap", mask), mask)


@triton.jit
def threshold(den, v, at):
    t = tl.load(at + LR_L1)
    if den is not None:
        lr_l1_cap = tl.load(at + LR_L1_CAP)
        t = tl.div_rn(t, tl.sqrt_rn(den))
        t = tl.where(t > lr_l1_cap, lr_l1_cap, t)
        t = tl.where(v > 0.0, t, 0.0)
    return t


@triton.jit
def gradient(p, g, at, DECAY: tl.constexpr):
    """What the statistics see."""
    if DECAY == "coupled":
        weight_decay = tl.load(at + WEIGHT_DECAY)
        g = tl.where(weight_decay != 0.0, tl.fma(weight_decay, p, g), g)
    return g


@triton.jit
def stepped(p, step, DECAY: tl.constexpr):
    """The new p, from the old one and the first thing that a rule returns: the one place where a decay is applied."""
    if DECAY == "":
        new_p = step
    elif DECAY == "coupled":
        rate, direction, _, _, _ = step
        new_p = tl.fma(-rate, direction, p)
    else:
        rate, direction, den, v, at = step
        lr_wd = tl.load(at + LR_WD)
        taken = rate * direction
        finite = tl.where(tl.abs(p) < float("inf"), p, 0.0)
        if DECAY == "l2":
            new_p = p - tl.fma(lr_wd, finite, taken)
        elif DECAY == "l1_proximal":
            new_p = soft_threshold(p - tl.fma(lr_wd, finite, taken), threshold(den, v, at))
        else:
            t = threshold(den, v, at)
            t = tl.where(p > 0.0, t, tl.where(p < 0.0, -t, 0.0))
            new_p = p - tl.fma(lr_wd, finite, taken + t)
    return new_p
