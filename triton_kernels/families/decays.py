"""The decays of csrc/rules/decays.h, line for line, and their scalars. No rule is here.

DECAY is "coupled", "l2", "l1_proximal" or "l1_subgradient", for the structs there, with "plain_" before the latter two where
den = 1; or "" for a rule without a decay, and "given" for one that returns the new p and what it lacks of the old one. ``at``
points at a decay's scalars, which a rule has behind its own. The Step of decays.h is a tuple here: (rate, direction, den, v, at).
Where den = 1 these two are any number: Triton 3.6 takes no None in a tuple that a function returns.
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


@triton.constexpr_function
def is_plain(name):
    """Where den = 1."""
    return name.startswith("plain_")


@triton.constexpr_function
def is_proximal(name):
    return name.endswith("l1_proximal")


@triton.jit
def threshold(den, v, at, DECAY: tl.constexpr):
    t = tl.load(at + LR_L1)
    if not is_plain(DECAY):
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
def with_l2(p, taken, at):
    """What the L2 decay and a step take from p. An infinite p stays what it is."""
    return tl.fma(tl.load(at + LR_WD), tl.where(tl.abs(p) < float("inf"), p, 0.0), taken)


@triton.jit
def with_subgradient(p, taken, den, v, at, DECAY: tl.constexpr):
    """The same of the L1 decay as a subgradient."""
    t = threshold(den, v, at, DECAY)
    return with_l2(p, taken + tl.where(p > 0.0, t, tl.where(p < 0.0, -t, 0.0)), at)


@triton.jit
def stepped(p, step, DECAY: tl.constexpr):
    """The new p, from the old one and the first thing that a rule returns: the one place where a decay is applied."""
    if DECAY == "":
        new_p = step
    elif DECAY == "given":
        new_p, _ = step
    elif DECAY == "coupled":
        rate, direction, _, _, _ = step
        new_p = tl.fma(-rate, direction, p)
    else:
        rate, direction, den, v, at = step
        if DECAY == "l2":
            new_p = p - with_l2(p, rate * direction, at)
        elif is_proximal(DECAY):
            new_p = soft_threshold(p - with_l2(p, rate * direction, at), threshold(den, v, at, DECAY))
        else:
            new_p = p - with_subgradient(p, rate * direction, den, v, at, DECAY)
    return new_p


@triton.jit
def taken(p, step, DECAY: tl.constexpr):
    """What ``stepped`` takes from p before the new p is rounded."""
    rate, direction, den, v, at = step
    if DECAY == "coupled":
        found = rate * direction
    elif DECAY == "l2":
        found = with_l2(p, rate * direction, at)
    elif is_proximal(DECAY):
        smooth = with_l2(p, rate * direction, at)
        left = p - smooth
        t = threshold(den, v, at, DECAY)
        found = smooth + tl.where(left > t, t, tl.where(left < -t, -t, left))
    else:
        found = with_subgradient(p, rate * direction, den, v, at, DECAY)
    return found
