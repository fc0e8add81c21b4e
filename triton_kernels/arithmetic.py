"""fp32 arithmetic of the rules, csrc/base/arithmetic.h: the same operations in the same order, so the same bits."""

import triton
import triton.language as tl


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
def clamped(x, limit):
    """x between -limit and limit; a NaN stays a NaN."""
    x = tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def magnitude_of(x):
    return (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def with_sign_of(r, x):
    sign_bit = x.to(tl.uint32, bitcast=True) & 0x80000000
    return (r.to(tl.uint32, bitcast=True) | sign_bit).to(tl.float32, bitcast=True)
