"""Split weights, csrc/formats/split.h: a 16-bit parameter and beside it what that lacks of a 24- or 32-bit master."""

import triton
import triton.language as tl

from .plain import plain_stored, plain_value
from .stochastic import fp16_step, inverse_power


@triton.constexpr_function
def has_remainder(name):
    return name.endswith(("_split24", "_split32"))


@triton.constexpr_function
def remainder_type(name):
    return tl.int8 if name.endswith("24") else tl.int16


@triton.constexpr_function
def parts_of(name):
    """Parts of the distance between fp16 numbers that a remainder counts."""
    return 2**8 if name.endswith("24") else 2**14


@triton.constexpr_function
def kept_of(name):
    """Bits of a draw that leave the sum of parts exact."""
    return 15 if name.endswith("24") else 10


@triton.constexpr_function
def largest_of(name):
    return 127 if name.endswith("24") else 32767


@triton.jit
def master_of(u, remainder):
    """From the bits of the parameter as fp32. A remainder that is not the parameter's leaves an infinite one infinite, and does
    not take a 0 below 0.
    """
    plain = u.to(tl.float32, bitcast=True)
    master = (u + remainder).to(tl.float32, bitcast=True)
    # A NaN where either is, or where the parameter is infinite.
    master = tl.fma(plain, 0.0, master)
    return tl.where(master == master, master, plain)


@triton.jit
def split_value(stored, remainder, FORMAT: tl.constexpr):
    if FORMAT == "bf16_split32":
        value = master_of(stored, remainder.to(tl.uint32))
    elif FORMAT == "bf16_split24":
        value = master_of(stored, remainder.to(tl.uint32) << 8)
    else:
        PARTS: tl.constexpr = parts_of(FORMAT)
        h = plain_value(stored, "fp16")
        step = fp16_step(h.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
        value = h + remainder.to(tl.float32) * (step * (1.0 / PARTS))
    return value


@triton.jit
def split_stored(x, draw, FORMAT: tl.constexpr):
    """The parameter and its remainder."""
    u = tl.where(x != x, 0x7FC00000, x.to(tl.uint32, bitcast=True))
    if FORMAT == "bf16_split32":
        stored = u + 0x8000
        remainder = u.to(tl.int16)
    elif FORMAT == "bf16_split24":
        master = u + (draw >> 8)
        stored = master + 0x8000
        remainder = (master >> 8).to(tl.int8)
    else:
        PARTS: tl.constexpr = parts_of(FORMAT)
        KEPT: tl.constexpr = kept_of(FORMAT)
        LARGEST: tl.constexpr = largest_of(FORMAT)
        stored = plain_stored(x, "fp16")
        h = plain_value(stored, "fp16")
        magnitude = h.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
        lacking = tl.where(magnitude < 0x7F800000, x - h, 0.0)
        parts = lacking * inverse_power(fp16_step(magnitude)) * PARTS + PARTS / 2
        least = (draw >> (16 - KEPT)).to(tl.int32).to(tl.float32) * (2.0**-KEPT)
        whole = (parts + least).to(tl.int32) - PARTS // 2
        remainder = tl.where(whole > LARGEST, LARGEST, whole).to(remainder_type(FORMAT))
    return stored, remainder
