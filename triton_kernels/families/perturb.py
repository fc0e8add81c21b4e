"""The point where a two-gradient step takes the second one, csrc/rules/perturb.h. The parameter waits in a state."""

import triton
import triton.language as tl

from .rule import Rule, given, positions, put

HYPER = tl.constexpr(("radius", "scale", "eps"))

RADIUS, ROOT_SCALE, EPS = positions(3)


@triton.jit
def perturb(p, g, backup, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    return tl.fma(tl.load(scalars + RADIUS), g, p), p


@triton.jit
def perturb_adaptive(p, g, backup, v, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    den = tl.fma(tl.sqrt_rn(v), tl.load(scalars + ROOT_SCALE), tl.load(scalars + EPS))
    moved = tl.fma(tl.load(scalars + RADIUS), tl.div_rn(g, den), p)
    return tl.where(v > 0.0, moved, p), p, v


@triton.jit
def set_perturb(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    put(scalars + RADIUS, given(hyper, HYPER, "radius", mask), mask)


@triton.jit
def set_perturb_adaptive(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    put(scalars + RADIUS, given(hyper, HYPER, "radius", mask), mask)
    put(scalars + ROOT_SCALE, tl.sqrt(given(hyper, HYPER, "scale", mask)), mask)
    put(scalars + EPS, given(hyper, HYPER, "eps", mask), mask)


RULES = {
    "perturb": Rule(perturb, set_perturb, HYPER.value, states=("backup",)),
    "perturb_adaptive": Rule(
        perturb_adaptive,
        set_perturb_adaptive,
        HYPER.value,
        states=("backup", "exp_avg_sq"),
        second_moments=("exp_avg_sq",),
    ),
}
