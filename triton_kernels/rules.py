"""The rules of csrc/rules/decays.h and csrc/rules/rules.h, line for line. ``row`` points at the scalars of one step (scalars.py).

DECAY is "coupled", "l2", "l1_proximal" or "l1_subgradient", for the structs of decays.h; a rule where den = 1 passes None
for den and v. OPTION is what tells rules of one text apart: a kernel of kernels.py, or "", "root", "own" and "own_root" for the
curvature of gauss_newton.
"""

import triton
import triton.language as tl

from . import kernels
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
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def threshold(den, v, row):
    t = tl.load(row + field.LR_L1)
    if den is not None:
        lr_l1_cap = tl.load(row + field.LR_L1_CAP)
        t = tl.div_rn(t, tl.sqrt_rn(den))
        t = tl.where(t > lr_l1_cap, lr_l1_cap, t)
        t = tl.where(v > 0.0, t, 0.0)
    return t


@triton.jit
def gradient(p, g, row, DECAY: tl.constexpr):
    if DECAY == "coupled":
        g = tl.fma(tl.load(row + field.WEIGHT_DECAY), p, g)
    return g


@triton.jit
def decayed(p, rate, direction, den, v, row, DECAY: tl.constexpr):
    if DECAY == "coupled":
        new_p = tl.fma(-rate, direction, p)
    else:
        lr_wd = tl.load(row + field.LR_WD)
        step = rate * direction
        if DECAY == "l2":
            new_p = p - tl.fma(lr_wd, p, step)
        elif DECAY == "l1_proximal":
            new_p = soft_threshold(p - tl.fma(lr_wd, p, step), threshold(den, v, row))
        else:
            t = threshold(den, v, row)
            t = tl.where(p > 0.0, t, tl.where(p < 0.0, -t, 0.0))
            new_p = p - tl.fma(lr_wd, p, step + t)
    return new_p


@triton.jit
def sgd(p, g, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(row + field.SGD_LR)
    decay = row + field.SGD_DECAY
    return decayed(p, lr, gradient(p, g, decay, DECAY), None, None, decay, DECAY)


@triton.jit
def sgd_update_buffer(p, g, buf, row, DECAY: tl.constexpr):
    momentum = tl.load(row + field.SGD_MOMENTUM)
    one_minus_dampening = tl.load(row + field.SGD_ONE_MINUS_DAMPENING)
    d = gradient(p, g, row + field.SGD_MOMENTUM_DECAY, DECAY)
    buf = tl.fma(momentum, buf, one_minus_dampening * d)
    return d, buf


@triton.jit
def sgd_momentum(p, g, buf, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(row + field.SGD_LR)
    _, buf = sgd_update_buffer(p, g, buf, row, DECAY)
    return decayed(p, lr, buf, None, None, row + field.SGD_MOMENTUM_DECAY, DECAY), buf


@triton.jit
def sgd_nesterov(p, g, buf, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(row + field.SGD_LR)
    momentum = tl.load(row + field.SGD_MOMENTUM)
    d, buf = sgd_update_buffer(p, g, buf, row, DECAY)
    return decayed(p, lr, tl.fma(momentum, buf, d), None, None, row + field.SGD_MOMENTUM_DECAY, DECAY), buf


@triton.jit
def adam_update_moments(p, g, m, v, row, DECAY: tl.constexpr):
    one_minus_beta1 = tl.load(row + field.ONE_MINUS_BETA1)
    beta2 = tl.load(row + field.BETA2)
    one_minus_beta2 = tl.load(row + field.ONE_MINUS_BETA2)
    d = gradient(p, g, row + field.ADAM_DECAY, DECAY)
    m = tl.fma(one_minus_beta1, d - m, m)
    v = tl.fma(one_minus_beta2 * d, d, beta2 * v)
    return m, v


@triton.jit
def adam_stepped(p, m, v, row, DECAY: tl.constexpr):
    inv_sqrt_bias2 = tl.load(row + field.INV_SQRT_BIAS2)
    eps = tl.load(row + field.ADAM_EPS)
    step_size = tl.load(row + field.STEP_SIZE)
    den = tl.fma(tl.sqrt_rn(v), inv_sqrt_bias2, eps)
    return decayed(p, step_size, tl.div_rn(m, den), den, v, row + field.ADAM_DECAY, DECAY)


@triton.jit
def adam(p, g, m, v, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    m, v = adam_update_moments(p, g, m, v, row, DECAY)
    return adam_stepped(p, m, v, row, DECAY), m, v


@triton.jit
def adam_amsgrad(p, g, m, v, v_max, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    m, v = adam_update_moments(p, g, m, v, row, DECAY)
    v_max = maximum(v_max, v)
    return adam_stepped(p, m, v_max, row, DECAY), m, v, v_max


@triton.jit
def adagrad(p, g, s, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(row + field.ADAGRAD_LR)
    eps = tl.load(row + field.ADAGRAD_EPS)
    decay = row + field.ADAGRAD_DECAY
    d = gradient(p, g, decay, DECAY)
    s = tl.fma(d, d, s)
    den = tl.sqrt_rn(s) + eps
    return decayed(p, lr, tl.div_rn(d, den), den, s, decay, DECAY), s


@triton.jit
def rmsprop_update_square(d, v, row):
    alpha = tl.load(row + field.ALPHA)
    one_minus_alpha = tl.load(row + field.ONE_MINUS_ALPHA)
    return tl.fma(one_minus_alpha * d, d, alpha * v)


@triton.jit
def rmsprop_den(v, row):
    return tl.sqrt_rn(v) + tl.load(row + field.RMSPROP_EPS)


@triton.jit
def rmsprop_centered_den(d, v, mean, row):
    one_minus_alpha = tl.load(row + field.ONE_MINUS_ALPHA)
    mean = tl.fma(one_minus_alpha, d - mean, mean)
    variance = tl.fma(-mean, mean, v)
    return rmsprop_den(tl.where(variance < 0.0, 0.0, variance), row), mean


@triton.jit
def rmsprop(p, g, v, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(row + field.RMSPROP_LR)
    decay = row + field.RMSPROP_DECAY
    d = gradient(p, g, decay, DECAY)
    v = rmsprop_update_square(d, v, row)
    den = rmsprop_den(v, row)
    return decayed(p, lr, tl.div_rn(d, den), den, v, decay, DECAY), v


@triton.jit
def rmsprop_centered(p, g, v, mean, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(row + field.RMSPROP_LR)
    decay = row + field.RMSPROP_DECAY
    d = gradient(p, g, decay, DECAY)
    v = rmsprop_update_square(d, v, row)
    den, mean = rmsprop_centered_den(d, v, mean, row)
    return decayed(p, lr, tl.div_rn(d, den), den, v, decay, DECAY), v, mean


@triton.jit
def rmsprop_momentum(p, g, v, buf, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(row + field.RMSPROP_LR)
    momentum = tl.load(row + field.RMSPROP_MOMENTUM)
    decay = row + field.RMSPROP_DECAY
    d = gradient(p, g, decay, DECAY)
    v = rmsprop_update_square(d, v, row)
    den = rmsprop_den(v, row)
    buf = tl.fma(momentum, buf, tl.div_rn(d, den))
    return decayed(p, lr, buf, den, v, decay, DECAY), v, buf


@triton.jit
def rmsprop_centered_momentum(p, g, v, buf, mean, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(row + field.RMSPROP_LR)
    momentum = tl.load(row + field.RMSPROP_MOMENTUM)
    decay = row + field.RMSPROP_DECAY
    d = gradient(p, g, decay, DECAY)
    v = rmsprop_update_square(d, v, row)
    den, mean = rmsprop_centered_den(d, v, mean, row)
    buf = tl.fma(momentum, buf, tl.div_rn(d, den))
    return decayed(p, lr, buf, den, v, decay, DECAY), v, buf, mean


@triton.jit
def lion(p, g, m, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(row + field.LION_LR)
    one_minus_beta1 = tl.load(row + field.LION_ONE_MINUS_BETA1)
    one_minus_beta2 = tl.load(row + field.LION_ONE_MINUS_BETA2)
    decay = row + field.LION_DECAY
    d = gradient(p, g, decay, DECAY)
    c = tl.fma(one_minus_beta1, d - m, m)
    m = tl.fma(one_minus_beta2, d - m, m)
    return decayed(p, lr, sign(c), None, None, decay, DECAY), m


@triton.jit
def dual(p, g, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(row + field.DUAL_LR)
    kernel = row + field.DUAL_KERNEL
    decay = kernel + field.kernel_floats(OPTION)
    return decayed(p, lr, kernels.mapped(g, kernel, OPTION), None, None, decay, DECAY)


@triton.jit
def averaging(g, m, row):
    one_minus_momentum = tl.load(row + field.ONE_MINUS_MOMENTUM)
    lookahead = tl.load(row + field.LOOKAHEAD)
    m = tl.fma(one_minus_momentum, g - m, m)
    return tl.fma(lookahead, g - m, m), m


@triton.jit
def dual_momentum(p, g, m, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    lr = tl.load(row + field.DUAL_LR)
    kernel = row + field.DUAL_MOMENTUM_KERNEL
    decay = kernel + field.kernel_floats(OPTION)
    u, m = averaging(g, m, row + field.DUAL_AVERAGE)
    return decayed(p, lr, kernels.mapped(u, kernel, OPTION), None, None, decay, DECAY), m


@triton.jit
def average(p, g, m, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    return averaging(g, m, row)


@triton.jit
def gauss_newton(p, g, m, h, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    one_minus_beta1 = tl.load(row + field.GN_ONE_MINUS_BETA1)
    scale = tl.load(row + field.GN_SCALE)
    eps = tl.load(row + field.GN_EPS)
    clip = tl.load(row + field.GN_CLIP)
    step_size = tl.load(row + field.GN_STEP_SIZE)
    m = tl.fma(one_minus_beta1, g - m, m)
    if field.is_own(OPTION):
        one_minus_beta2 = tl.load(row + field.GN_ONE_MINUS_BETA2)
        h = tl.fma(one_minus_beta2 * g, g, tl.load(row + field.GN_BETA2) * h)
    den = tl.fma(scale, tl.where(h < 0.0, 0.0, h), eps)
    if field.is_root(OPTION):
        den = tl.sqrt_rn(den)
    u = kernels.clamped(tl.div_rn(m, den), clip)
    return decayed(p, step_size, u, den, h, row + field.GN_DECAY, DECAY), m, h


@triton.jit
def perturb(p, g, backup, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    return tl.fma(tl.load(row + field.RADIUS), g, p), p


@triton.jit
def perturb_adaptive(p, g, backup, v, row, DECAY: tl.constexpr, OPTION: tl.constexpr):
    den = tl.fma(tl.sqrt_rn(v), tl.load(row + field.ROOT_SCALE), tl.load(row + field.PERTURB_EPS))
    moved = tl.fma(tl.load(row + field.RADIUS), tl.div_rn(g, den), p)
    return tl.where(v > 0.0, moved, p), p, v
