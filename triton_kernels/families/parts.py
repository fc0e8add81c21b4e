"""Parts that ride along with a rule, csrc/rules/parts.h: masks on the update and on the decay, and an average of the weights. A
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
CAUTIOUS_UPDATE, CAUTIOUS_DECAY, EMA_WEIGHT = (tl.constexpr(k) for k in (11, 12, 13))


@triton.jit
def set_parts(hyper, HYPERS: tl.constexpr, step, scalars, mask):
    """hyper: where those of each tensor's group begin, HYPERS of them. Without an average the step may be any."""
    decay = tl.load(hyper + HYPERS + EMA_DECAY, mask=mask)
    averaged = step - tl.load(hyper + HYPERS + EMA_START, mask=mask)
    weight = tl.where(decay < 0.0, 1.0 / tl.where(averaged > 1.0, averaged, 1.0), 1.0 - decay)
    put(scalars + EMA_WEIGHT, tl.where(averaged > 1.0, weight, 1.0), mask)
    put(scalars + CAUTIOUS_UPDATE, tl.load(hyper + HYPERS + UPDATE, mask=mask), mask)
    put(scalars + CAUTIOUS_DECAY, tl.load(hyper + HYPERS + DECAY, mask=mask), mask)


@triton.jit
def averaged(p, ema, scalars):
    """The average with the new p."""
    weight = tl.load(scalars + EMA_WEIGHT)
    between = tl.fma(weight, p - ema, ema)
    return tl.where(weight == 1.0, p, between)


@triton.jit
def is_against(a, b):
    return ((a > 0.0) & (b < 0.0)) | ((a < 0.0) & (b > 0.0))


@triton.jit
def stepped(p, g, step, scalars, DECAY: tl.constexpr):
    """The new p, with the masks; of a rule without a decay what it has made."""
    if DECAY == "":
        new_p = step
    else:
        rate, direction, den, v, at = step
        d = decays.gradient(p, g, at, DECAY)
        idle = ((direction > 0.0) & (d <= 0.0)) | ((direction < 0.0) & (d >= 0.0))
        masked = tl.where(tl.load(scalars + CAUTIOUS_UPDATE) != 0.0, 0.0, direction)
        direction = tl.where(idle, masked, direction)
        decayed = decays.stepped(p, (rate, direction, den, v, at), DECAY)
        undecayed = tl.where(tl.load(scalars + CAUTIOUS_DECAY) != 0.0, p - rate * direction, decayed)
        new_p = tl.where(is_against(p, direction), undecayed, decayed)
    return new_p


def with_parts(rule: Rule) -> Rule:
    """A rule and its masks."""
    return rule._replace(hyper=(*rule.hyper, *HYPER), parts=True)


def with_average(rule: Rule) -> Rule:
    """The same, and an average of the weights."""
    return with_parts(rule)._replace(states=(*rule.states, "ema"), reads_step=True, averages=True)
