"""A rule that no optimizer has, with a scalar state: p -= lr / (1 - product) g. Imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl

from precond.triton_kernels.families.rule import Rule, given, put
from precond.triton_kernels.series import integer_power

HYPER = tl.constexpr(("lr", "momentum", "q"))


@triton.jit
def update(p, g, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    return p - tl.load(scalars) * g


@triton.jit
def set_scalars(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    put(scalars, given(hyper, HYPER, "lr", mask) / (1.0 - scalar_state), mask)


@triton.jit
def advance(hyper, step, scalar_state, mask):
    q = integer_power(given(hyper, HYPER, "q", mask), step.to(tl.int64))
    return scalar_state * (given(hyper, HYPER, "momentum", mask) * (1.0 - 0.5 * q))


RULE = Rule(update, set_scalars, HYPER.value, reads_step=True, scalar_states=("product",), advance=advance)


def product_after(hyper: dict[str, float], step: int, before: float) -> float:
    """What ``advance`` returns, by Python; the power as the kernels have it, by repeated squaring."""
    power, base, n = 1.0, hyper["q"], step
    while n:
        power, base, n = power * base if n & 1 else power, base * base, n >> 1
    return before * (hyper["momentum"] * (1.0 - 0.5 * power))
