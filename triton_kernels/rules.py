"""The rules of csrc/decays.h and csrc/rules.h, line for line. ``row`` points at the scalars of one step (scalars.py)."""

import triton
import triton.language as tl

from . import scalars as field


@triton.jit
def maximum(a, b):
    # A NaN on either side wins.
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def soft_threshold(x, t):
    inside = tl.where(x > t, t, x)
    inside = tl.where(inside < -t, -t, inside)
    return x - inside


@triton.jit
def l2(p, step, den, v, row):
    lr_wd = tl.load(row + field.LR_WD)
    return p - tl.fma(lr_wd, p, step)


@triton.jit
def l1_threshold(den, v, row):
    lr_l1 = tl.load(row + field.LR_L1)
    lr_l1_cap = tl.load(row + field.LR_L1_CAP)
    t = tl.div_rn(lr_l1, tl.sqrt_rn(den))
    t = tl.where(t > lr_l1_cap, lr_l1_cap, t)
    return tl.where(v > 0.0, t, 0.0)


@triton.jit
def l1_proximal(p, step, den, v, row):
    lr_wd = tl.load(row + field.LR_WD)
    return soft_threshold(p - tl.fma(lr_wd, p, step), l1_threshold(den, v, row))


@triton.jit
def l1_subgradient(p, step, den, v, row):
    lr_wd = tl.load(row + field.LR_WD)
    t = l1_threshold(den, v, row)
    t = tl.where(p > 0.0, t, tl.where(p < 0.0, -t, 0.0))
    return p - tl.fma(lr_wd, p, step + t)


@triton.jit
def sgd(p, g, row):
    lr = tl.load(row + field.SGD_LR)
    weight_decay = tl.load(row + field.SGD_WEIGHT_DECAY)
    d = tl.fma(weight_decay, p, g)
    return tl.fma(-lr, d, p)


@triton.jit
def sgd_update_buffer(p, g, buf, row):
    weight_decay = tl.load(row + field.SGD_WEIGHT_DECAY)
    momentum = tl.load(row + field.SGD_MOMENTUM)
    one_minus_dampening = tl.load(row + field.SGD_ONE_MINUS_DAMPENING)
    d = tl.fma(weight_decay, p, g)
    buf = tl.fma(momentum, buf, one_minus_dampening * d)
    return d, buf


@triton.jit
def sgd_momentum(p, g, buf, row):
    lr = tl.load(row + field.SGD_LR)
    _, buf = sgd_update_buffer(p, g, buf, row)
    return tl.fma(-lr, buf, p), buf


@triton.jit
def sgd_nesterov(p, g, buf, row):
    lr = tl.load(row + field.SGD_LR)
    momentum = tl.load(row + field.SGD_MOMENTUM)
    d, buf = sgd_update_buffer(p, g, buf, row)
    return tl.fma(-lr, tl.fma(momentum, buf, d), p), buf


@triton.jit
def adamw_update_moments(g, m, v, row):
    one_minus_beta1 = tl.load(row + field.ONE_MINUS_BETA1)
    beta2 = tl.load(row + field.BETA2)
    one_minus_beta2 = tl.load(row + field.ONE_MINUS_BETA2)
    m = tl.fma(one_minus_beta1, g - m, m)
    v = tl.fma(one_minus_beta2 * g, g, beta2 * v)
    return m, v


@triton.jit
def adamw_stepped(p, m, v, row, DECAY: tl.constexpr):
    inv_sqrt_bias2 = tl.load(row + field.INV_SQRT_BIAS2)
    eps = tl.load(row + field.EPS)
    step_size = tl.load(row + field.STEP_SIZE)
    den = tl.fma(tl.sqrt_rn(v), inv_sqrt_bias2, eps)
    return DECAY(p, step_size * tl.div_rn(m, den), den, v, row)


@triton.jit
def adamw(p, g, m, v, row):
    m, v = adamw_update_moments(g, m, v, row)
    return adamw_stepped(p, m, v, row, l2), m, v


@triton.jit
def adamw_amsgrad(p, g, m, v, v_max, row):
    m, v = adamw_update_moments(g, m, v, row)
    v_max = maximum(v_max, v)
    return adamw_stepped(p, m, v_max, row, l2), m, v, v_max


@triton.jit
def adamw_l1(p, g, m, v, row):
    m, v = adamw_update_moments(g, m, v, row)
    return adamw_stepped(p, m, v, row, l1_proximal), m, v


@triton.jit
def adamw_l1_amsgrad(p, g, m, v, v_max, row):
    m, v = adamw_update_moments(g, m, v, row)
    v_max = maximum(v_max, v)
    return adamw_stepped(p, m, v_max, row, l1_proximal), m, v, v_max


@triton.jit
def adamw_l1_subgradient(p, g, m, v, row):
    m, v = adamw_update_moments(g, m, v, row)
    return adamw_stepped(p, m, v, row, l1_subgradient), m, v


@triton.jit
def adamw_l1_subgradient_amsgrad(p, g, m, v, v_max, row):
    m, v = adamw_update_moments(g, m, v, row)
    v_max = maximum(v_max, v)
    return adamw_stepped(p, m, v_max, row, l1_subgradient), m, v, v_max
