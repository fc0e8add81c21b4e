"""Parts that ride along with a rule, csrc/rules/parts.h: masks on the update and on the decay, a factor, an average of weights. A
rule with an average has its states and, last, the average.

Their scalars lie behind any rule's, whatever its own number.
"""

import triton
import triton.language as tl

from . import decays
from .rule import Rule, put

HYPER = ("ema_decay", "ema_start", "cautious_update", "cautious_decay")
# Among the hyper-parameters, from the end.
EMA_DECAY, EMA_START, UPDATE, DECAY = (tl.constexpr(k - len(HYPER)) for k in range(len(HYPER)))
# Among the scalars, before the seed.
UPDATE_LIMIT, DECAY_LIMIT, EMA_WEIGHT, FACTOR = (tl.constexpr(k) for k in (11, 12, 13, 14))


@triton.jit
def limit(masks):
    """0 where a mask is on, and what nothing is below where it is off."""
    return tl.where(masks != 0.0, 0.0, float("nan"))


@triton.jit
def set_parts(hyper, HYPERS: tl.constexpr, step, scalars, mask):
    """hyper: where those of each tensor's group begin, HYPERS of them. Without an average the step may be any."""
    decay = tl.load(hyper + HYPERS + EMA_DECAY, mask=mask)
    averaged = step - tl.load(hyper + HYPERS + EMA_START, mask=mask)
    weight = tl.where(decay < 0.0, 1.0 / tl.where(averaged > 1.0, averaged, 1.0), 1.0 - decay)
    put(scalars + EMA_WEIGHT, tl.where(averaged > 1.0, weight, 1.0), mask)
    put(scalars + UPDATE_LIMIT, limit(tl.load(hyper + HYPERS + UPDATE, mask=mask)), mask)
    put(scalars + DECAY_LIMIT, limit(tl.load(hyper + HYPERS + DECAY, mask=mask)), mask)
    put(scalars + FACTOR, tl.zeros_like(weight) + 1.0, mask)


@triton.jit
def averaged(p, ema, scalars):
    """The average with the new p."""
    weight = tl.load(scalars + EMA_WEIGHT)
    between = tl.fma(weight, p - ema, ema)
    return tl.where(weight == 1.0, p, between)


@triton.jit
def turned(x, by):
    """x with its sign turned where ``by`` has one: below 0 where their signs differ."""
    sign = by.to(tl.uint32, bitcast=True) & 0x80000000
    return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def stepped(p, g, step, scalars, DECAY: tl.constexpr):
    """The new p, with the masks; what it lacks of the old one before it is rounded; and what of that is not a decay."""
    if DECAY == "":
        new_p = step
        taken = p - step
        update = taken
    elif DECAY == "given":
        new_p, taken = step
        update = taken
    else:
        rate, direction, den, v, at = step
        none = tl.where(direction == direction, 0.0, direction)
        along = turned(decays.gradient(p, g, at, DECAY), direction)
        direction = tl.load(scalars + FACTOR) * tl.where(along <= tl.load(scalars + UPDATE_LIMIT), none, direction)
        update = rate * direction
        step = (rate, direction, den, v, at)
        side = turned(p, direction)
        size = -tl.abs(direction)
        undecayed = tl.where(side > size, side, size) < tl.load(scalars + DECAY_LIMIT)
        new_p = tl.where(undecayed, p - update, decays.stepped(p, step, DECAY))
        taken = tl.where(undecayed, update, decays.taken(p, step, DECAY))
    return new_p, taken, update


def with_parts(rule: Rule) -> Rule:
    """A rule and its masks."""
    return rule._replace(hyper=(*rule.hyper, *HYPER), parts=True)


def with_average(rule: Rule) -> Rule:
    """The same, and an average of the weights."""
    return with_parts(rule)._replace(states=(*rule.states, "ema"), reads_step=True, averages=True)
