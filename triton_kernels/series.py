"""Logarithm and powers, csrc/base/series.h, line for line: those of libraries differ in their last bits."""

import triton
import triton.language as tl

_LN2 = tl.constexpr(float.fromhex("0x1.62e430p-1"))
_LOG2_E = tl.constexpr(float.fromhex("0x1.715476p0"))
_LARGEST = tl.constexpr(float.fromhex("0x1.fffffep127"))


@triton.jit
def constant(numerator: tl.constexpr, denominator: tl.constexpr):
    """A quotient rounded to float32."""
    return tl.div_rn(tl.full((), numerator, tl.float32), tl.full((), denominator, tl.float32))


@triton.jit
def log_of_mantissa(m):
    f = m - 1.0
    s = tl.div_rn(f, 2.0 + f)
    z = s * s
    series = tl.fma(z, constant(1.0, 9.0), constant(1.0, 7.0))
    series = tl.fma(z, series, constant(1.0, 5.0))
    series = z * tl.fma(z, series, constant(1.0, 3.0))
    return tl.fma(s + s, series, s + s)


@triton.jit
def split_exponent(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    return (bits - (exponent << 23)).to(tl.float32, bitcast=True), exponent.to(tl.float32)


@triton.jit
def log1p_of(x):
    u = 1.0 + x
    m, k = split_exponent(u)
    lost = tl.div_rn(x - (u - 1.0), u)
    ln2 = tl.full((), _LN2, tl.float32)
    return tl.where(x <= _LARGEST, tl.fma(k, ln2, log_of_mantissa(m) + lost), x)


@triton.jit
def nearest_integer(x):
    return (x + 12582912.0) - 12582912.0


@triton.jit
def power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_of(r, exponent):
    tiny = r < float.fromhex("0x1p-126")
    m, k = split_exponent(tl.where(tiny, r * 16777216.0, r))
    k = tl.where(tiny, k - 24.0, k)
    whole = nearest_integer(exponent * k)
    log2_e = tl.full((), _LOG2_E, tl.float32)
    y = tl.fma(exponent, log_of_mantissa(m) * log2_e, tl.fma(exponent, k, -whole))
    rounded = nearest_integer(y)
    x = (y - rounded) * tl.full((), _LN2, tl.float32)
    series = tl.fma(x, constant(1.0, 5040.0), constant(1.0, 720.0))
    series = tl.fma(x, series, constant(1.0, 120.0))
    series = tl.fma(x, series, constant(1.0, 24.0))
    series = tl.fma(x, series, constant(1.0, 6.0))
    series = tl.fma(x, series, 0.5)
    series = tl.fma(x, series, 1.0)
    series = tl.fma(x, series, 1.0)
    scale = whole + rounded
    scale = tl.where(scale > 250.0, 250.0, scale)
    scale = tl.where(scale < -250.0, -250.0, scale)
    scale = tl.where(scale == scale, scale, 0.0)
    all_of_it = scale.to(tl.int32)
    half = all_of_it >> 1
    result = series * power_of_two(half) * power_of_two(all_of_it - half)
    return tl.where((r > 0.0) & (r <= _LARGEST), result, r)


@triton.jit
def integer_power(base, n):
    """base^n in fp64, by repeated squaring."""
    result = base * 0.0 + 1.0
    while tl.max(n) != 0:
        result = tl.where((n & 1) != 0, result * base, result)
        base = base * base
        n = n >> 1
    return result
