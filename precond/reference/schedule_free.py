"""Schedule-free AdamW and SGD."""

from __future__ import annotations

import functools
import math
import sys

import torch
from torch import Tensor

from .decays import decayed_gradient
from .rule import Needs, Rule
from .step import Hyper, Moved, States


def power(base: float, exponent: float) -> float:
    """base^exponent as csrc/rules/schedule_free.h has it, bit for bit: hosts advance sums for kernels."""
    whole = math.floor(exponent)
    rest, result, square = exponent - whole, 1.0, base
    while whole:
        result, square, whole = result * square if whole & 1 else result, square * square, whole >> 1
    if rest == 0.0:
        return result
    if not sys.float_info.min <= base < math.inf:
        return result * (0.0 if base < 1.0 else base)
    m, k = math.frexp(base)
    m, k = (2.0 * m, k - 1) if m < math.sqrt(0.5) else (m, k)
    s = (m - 1.0) / (m + 1.0)
    log = functools.reduce(lambda log, i: log * (s * s) + 1.0 / (2 * i + 1), range(12, -1, -1), 0.0)
    y = rest * (k * math.log(2) + 2.0 * s * log)
    n = math.floor(y * math.log2(math.e) + 0.5)
    x = y - n * math.log(2)
    exp = functools.reduce(lambda exp, i: exp * x / i + 1.0, range(14, 0, -1), 1.0)
    return result * math.ldexp(exp, n)


def warm(hyper: Hyper, step: int) -> float:
    """The part of lr that a step takes: step / warmup_steps, up to 1."""
    return float(step / hyper["warmup_steps"]) if step < hyper["warmup_steps"] else 1.0


def weight_of(hyper: Hyper, step: int) -> float:
    """What z counts in the average x: t^r (the largest lr so far)^weight_lr_power."""
    lr_max = float(hyper["lr_max"]) * warm(hyper, step)
    return power(float(step), float(hyper["r"])) * power(lr_max, float(hyper["weight_lr_power"]))


def sum_after(hyper: Hyper, step: int, weight_sum: float) -> float:
    """The sum of the weights of all steps."""
    return weight_sum + weight_of(hyper, step)


def schedule_free(
    p: Tensor, g: Tensor, states: States, hyper: Hyper, step: int, fresh: bool, *, adam: bool
) -> tuple[Moved, States]:
    """Defazio et al., algorithms 1 and 2, at y = (1 - beta1) z + beta1 x, which p is: z -= lr d, x += c (z - x)."""
    y, z = p, (p if fresh or step <= 1 else states[0])
    lr, beta1 = hyper["lr"] * warm(hyper, step), hyper["beta1"]
    moments: States = ()
    if adam:
        v = hyper["beta2"] * states[1] + (1 - hyper["beta2"]) * g * g
        g, moments = g / ((v / (1 - hyper["beta2"] ** step)).sqrt() + hyper["eps"]), (v,)
    # An infinite y stays what it is: inf - inf is NaN.
    d = decayed_gradient(torch.where(y.isinf(), 0.0, y), g, hyper, "coupled")
    apart = torch.where(y.isinf(), 0.0, z - y)
    c = weight_of(hyper, step) / hyper["weight_sum"] if hyper["weight_sum"] > 0 else 0.0
    taken = lr * (1 - beta1 * (1 - c)) * d - c * apart
    return Moved(y - taken, taken), (z - lr * d, *moments)


_SGD: Needs = dict(states=("z",), reads_step=True, scalars={"weight_sum": 0.0}, wide_scalars=True, advance=sum_after)
_ADAMW: Needs = _SGD | dict(states=("z", "exp_avg_sq"), second_moments=("exp_avg_sq",), keeps="beta2")
RULES: dict[str, Rule] = {
    "schedule_free_adamw": Rule(functools.partial(schedule_free, adam=True), **_ADAMW),
    "schedule_free_sgd": Rule(functools.partial(schedule_free, adam=False), **_SGD),
}
