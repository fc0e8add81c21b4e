"""bf16 and fp16, rounded up or down with probabilities that make the mean exact, csrc/formats/stochastic.h."""

import triton
import triton.language as tl


@triton.constexpr_function
def is_stochastic(name):
    return name.endswith("_stochastic")


@triton.jit
def fp16_step(u):
    """The distance of fp16 numbers around one of these bits, as fp32 bits; that of the largest denormal below 2^-14."""
    exponent = u & 0x7F800000
    return tl.where(exponent < 0x38800000, 0x38800000, exponent) - 0x05000000


@triton.jit
def inverse_power(u):
    """1 / x for the bits of a power of two."""
    return (0x7F000000 - u).to(tl.float32, bitcast=True)


@triton.jit
def stochastic_stored(x, draw, FORMAT: tl.constexpr):
    u = x.to(tl.uint32, bitcast=True)
    if FORMAT == "bf16_stochastic":
        # On bits, which are the magnitude: what is cut off is the probability of a carry.
        stored = tl.where(x != x, 0x7FC00000, u + draw).to(tl.uint32)
    else:
        magnitude = u & 0x7FFFFFFF
        finite = magnitude < 0x7F800000
        step = fp16_step(magnitude)
        # In steps: at most 11 bits before the point, so 13 behind it leave the sum exact where the format has x.
        steps = tl.where(finite, magnitude, 0).to(tl.float32, bitcast=True) * inverse_power(step)
        part = (draw >> 3).to(tl.int32).to(tl.float32) * 2.0**-13
        whole = (steps + part).to(tl.int32).to(tl.float32) * step.to(tl.float32, bitcast=True)
        rounded = tl.where(finite, whole.to(tl.uint32, bitcast=True), magnitude)
        stored = (rounded | (u & 0x80000000)).to(tl.float32, bitcast=True).to(tl.float16)
    return stored
