"""States in 8 or 4 bits, csrc/formats/codes.h: a code per element, a bf16 scale per group."""

import triton
import triton.language as tl

from ..._core.formats import names

# Elements that share a scale.
GROUP = tl.constexpr(names.GROUP)
LAWS = names.LAWS
# The bits of 2: a code is the upper bits of the float 2 + K y, y a magnitude over its group's scale.
TWO = tl.constexpr(0x40000000)


@triton.constexpr_function
def is_coded(name):
    return name in LAWS


@triton.constexpr_function
def is_signed(name):
    return not name.startswith("u")


@triton.constexpr_function
def code_bits(name):
    return int(name[-1])


@triton.constexpr_function
def codes_per(name, bits):
    """Codes in so many bits."""
    return bits // int(name[-1])


@triton.constexpr_function
def below(name):
    """Bits of the float below a code."""
    return LAWS[name].below


@triton.constexpr_function
def below_upper(name):
    """From the upper bits of a word, behind a sign, to those of the float."""
    return 32 - int(name[-1]) - LAWS[name].below


@triton.constexpr_function
def most(name):
    """The largest code, without its sign."""
    return LAWS[name].largest


@triton.constexpr_function
def code_range(name):
    return LAWS[name].span


@triton.constexpr_function
def inverse_range(name):
    """Below 0, as scales are."""
    return -LAWS[name].inverse


@triton.jit
def unpacked(packed, FORMAT: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr):
    """Codes of a block, each in the upper bits of a word, from integers that have PER each, the first in the lower bits."""
    shift = (32 - code_bits(FORMAT)) - code_bits(FORMAT) * tl.arange(0, PER)
    return tl.reshape(packed.to(tl.uint32)[:, None] << shift.to(tl.uint32)[None, :], (BLOCK // GROUP, GROUP))


@triton.jit
def packed(codes, mask, FORMAT: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr):
    """The opposite. mask: of a group's bits."""
    bits = tl.reshape(codes >> (32 - code_bits(FORMAT)), (BLOCK // PER, PER))
    together = tl.sum(bits << (code_bits(FORMAT) * tl.arange(0, PER)).to(tl.uint32)[None, :], axis=1)
    together = tl.reshape(together, (BLOCK // GROUP, GROUP // PER)) & mask[:, None]
    return tl.reshape(together, (BLOCK // PER,))


@triton.jit
def codes_value(codes, scales, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """Values of a block, from its codes and scales."""
    scale = (scales.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    # Of a new state 0, not -0.
    unit = tl.fma(scale, tl.full(scale.shape, inverse_range(FORMAT), tl.float32), tl.full(scale.shape, 0.0, tl.float32))
    unit = unit[:, None]
    magnitude = (codes >> below_upper(FORMAT)) & (most(FORMAT) << below(FORMAT))
    # (z - 2) unit, which this way too is rounded once.
    value = tl.fma((magnitude + TWO).to(tl.float32, bitcast=True), unit, -2.0 * unit)
    if is_signed(FORMAT):
        value = (value.to(tl.uint32, bitcast=True) | (codes & 0x80000000)).to(tl.float32, bitcast=True)
    return tl.reshape(value, (BLOCK,))


@triton.constexpr_function
def halvings(block):
    """Of the elements of one of 128 threads, to one."""
    return max(block // 128, 1).bit_length() - 1


@triton.jit
def top_of(x, BLOCK: tl.constexpr):
    """The largest bits of a magnitude of each group, or some NaN's."""
    # Of a thread's elements as floats, whose magnitude takes no instruction; that of integers takes one for each.
    for level in tl.static_range(halvings(BLOCK)):
        a, b = tl.split(tl.reshape(x, (BLOCK >> (level + 1), 2)))
        x = tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.reshape(bits, (BLOCK // GROUP, GROUP >> halvings(BLOCK))), axis=1).to(tl.uint32)


@triton.jit
def group_of(top, FORMAT: tl.constexpr):
    """A group's scale, what takes magnitudes to K y, and a mask of its elements' bits, from the largest bits of a magnitude. For
    the range of a scale see csrc/formats/codes.h.
    """
    scale = (top + 0xFFFF) >> 16
    scale = tl.where(scale < 0x0480, 0x0480, scale)
    finite = scale < 0x7F80
    as_float = (scale << 16).to(tl.float32, bitcast=True)
    per_scale = tl.div_rn(tl.full(as_float.shape, code_range(FORMAT), tl.float32), as_float)
    mask = tl.where(finite, 0xFFFFFFFF, 0).to(tl.uint32)
    return tl.where(finite, scale | 0x8000, 0xFFC0).to(tl.uint16), tl.where(finite, per_scale, 0.0), mask


@triton.jit
def code_of(x, per_scale, draw, FORMAT: tl.constexpr):
    """In the upper bits of a word; of a group that is not finite, anything. Zero is 0. Up or down so that the mean of what is
    decoded is exact. A second moment that is not zero has a code of at least 1.
    """
    BELOW: tl.constexpr = below(FORMAT)
    LEAST: tl.constexpr = TWO + (1 << below(FORMAT))
    u = x.to(tl.uint32, bitcast=True)
    magnitude = u & 0x7FFFFFFF
    z = tl.fma(magnitude.to(tl.float32, bitcast=True), per_scale, 2.0).to(tl.uint32, bitcast=True)
    z += draw << (BELOW - 16)
    if is_signed(FORMAT):
        code = (z << below_upper(FORMAT)) | (u & 0x80000000)
    else:
        least = tl.where(magnitude == 0, TWO, LEAST).to(tl.uint32)
        code = tl.where(z > least, z, least) << below_upper(FORMAT)
    return code


@triton.jit
def codes_stored(x, draw, FORMAT: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr):
    """Integers of PER codes and the scales of a block's values, which are 0 behind the last element."""
    top = top_of(x, BLOCK)
    x = tl.reshape(x, (BLOCK // GROUP, GROUP))
    draw = tl.reshape(draw, (BLOCK // GROUP, GROUP))
    scales, per_scale, mask = group_of(top, FORMAT)
    return packed(code_of(x, per_scale[:, None], draw, FORMAT), mask, FORMAT, PER, BLOCK), scales
