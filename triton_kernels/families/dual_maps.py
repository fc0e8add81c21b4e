"""The maps of csrc/rules/dual_maps.h, line for line, and their scalars.

MAP is "ratio", "smoothed", "clip", "asinh", "log" or "power". ``at`` points at the map's scalars: its scale, for "smoothed" its
square, for "power" followed by the exponent; for "ratio" offset and slope.
"""

import triton
import triton.language as tl

from ..arithmetic import clamped, magnitude_of, with_sign_of
from ..series import log1p_of, power_of
from .rule import given, put


@triton.constexpr_function
def map_floats(name):
    """How many scalars a map has."""
    return 2 if name in ("ratio", "power") else 1


@triton.jit
def set_map(hyper, HYPER: tl.constexpr, at, mask, MAP: tl.constexpr):
    if MAP == "ratio":
        put(at, given(hyper, HYPER, "offset", mask), mask)
        put(at + 1, given(hyper, HYPER, "slope", mask), mask)
    else:
        scale = given(hyper, HYPER, "scale", mask)
        if MAP == "smoothed":
            put(at, scale * scale, mask)
        else:
            put(at, scale, mask)
        if MAP == "power":
            put(at + 1, given(hyper, HYPER, "exponent", mask), mask)


@triton.jit
def mapped(x, at, MAP: tl.constexpr):
    first = tl.load(at)
    if MAP == "ratio":
        quotient = tl.div_rn(x, tl.fma(tl.load(at + 1), magnitude_of(x), first))
        result = tl.where(x == 0.0, x, quotient)
    elif MAP == "smoothed":
        r = magnitude_of(x)
        result = tl.div_rn(x, tl.where(r > 1152921504606846976.0, r, tl.sqrt_rn(tl.fma(x, x, first))))
    elif MAP == "clip":
        result = clamped(x, first)
    elif MAP == "asinh":
        r = tl.div_rn(magnitude_of(x), first)
        root = tl.where(r > 1073741824.0, r, tl.sqrt_rn(tl.fma(r, r, 1.0)))
        result = with_sign_of(first * log1p_of(tl.fma(r, tl.div_rn(r, 1.0 + root), r)), x)
    elif MAP == "log":
        result = with_sign_of(first * log1p_of(tl.div_rn(magnitude_of(x), first)), x)
    else:
        result = with_sign_of(first * power_of(tl.div_rn(magnitude_of(x), first), tl.load(at + 1)), x)
    return result
