"""Diagonal Gauss-Newton, csrc/rules/gauss_newton.h.

OPTION is about the curvature: "", "root" where the mean of gradients is divided by its root, "own" where the rule makes it, a
mean of squared gradients, and "own_root".
"""

import triton
import triton.language as tl

from ..arithmetic import clamped
from ..series import integer_power
from .decays import set_decay
from .rule import Rule, given, positions, put, with_decays

HYPER = tl.constexpr(
    ("lr", "weight_decay", "l1_decay", "l1_cap", "beta1", "beta2", "eps", "scale", "clip", "corrected")
)

ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, SCALE, EPS, CLIP, STEP_SIZE, DECAY_AT = positions(8)


@triton.constexpr_function
def is_own(option):
    return option in ("own", "own_root")


@triton.constexpr_function
def is_root(option):
    return option in ("root", "own_root")


@triton.jit
def gauss_newton(p, g, m, h, scalars, DECAY: tl.constexpr, OPTION: tl.constexpr):
    one_minus_beta1 = tl.load(scalars + ONE_MINUS_BETA1)
    scale = tl.load(scalars + SCALE)
    eps = tl.load(scalars + EPS)
    clip = tl.load(scalars + CLIP)
    step_size = tl.load(scalars + STEP_SIZE)
    m = tl.fma(one_minus_beta1, g - m, m)
    if is_own(OPTION):
        one_minus_beta2 = tl.load(scalars + ONE_MINUS_BETA2)
        h = tl.fma(one_minus_beta2 * g, g, tl.load(scalars + BETA2) * h)
    den = tl.fma(scale, tl.where(h < 0.0, 0.0, h), eps)
    if is_root(OPTION):
        den = tl.sqrt_rn(den)
    u = clamped(tl.div_rn(m, den), clip)
    return (step_size, u, den, h, scalars + DECAY_AT), m, h


@triton.jit
def set_gauss_newton(hyper, step, fresh, scalar_state, scalars, mask, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = given(hyper, HYPER, "lr", mask)
    beta1 = given(hyper, HYPER, "beta1", mask)
    beta2 = given(hyper, HYPER, "beta2", mask)
    scale = given(hyper, HYPER, "scale", mask)
    t = step.to(tl.int64)
    corrected = given(hyper, HYPER, "corrected", mask) != 0.0
    bias1 = tl.where(corrected, 1.0 - integer_power(beta1, t), 1.0)
    if is_own(OPTION):
        scale = scale / (1.0 - integer_power(beta2, t))
    put(scalars + ONE_MINUS_BETA1, 1.0 - beta1, mask)
    put(scalars + BETA2, beta2, mask)
    put(scalars + ONE_MINUS_BETA2, 1.0 - beta2, mask)
    put(scalars + SCALE, scale, mask)
    put(scalars + EPS, given(hyper, HYPER, "eps", mask), mask)
    put(scalars + CLIP, given(hyper, HYPER, "clip", mask) * bias1, mask)
    put(scalars + STEP_SIZE, lr / bias1, mask)
    set_decay(hyper, HYPER, lr, scalars + DECAY_AT, mask, DECAY)


_GAUSS_NEWTON = Rule(
    gauss_newton,
    set_gauss_newton,
    HYPER.value,
    states=("exp_avg", "curvature"),
    second_moments=("curvature",),
    reads_step=True,
)

RULES = {
    **with_decays(_GAUSS_NEWTON, "gauss_newton"),
    **with_decays(_GAUSS_NEWTON._replace(option="root"), "gauss_newton", suffix="_root"),
    **with_decays(_GAUSS_NEWTON._replace(option="own"), "gauss_newton", suffix="_own"),
    **with_decays(_GAUSS_NEWTON._replace(option="own_root"), "gauss_newton", suffix="_own_root"),
}
