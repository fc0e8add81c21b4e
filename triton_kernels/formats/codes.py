"""States in 8 or 4 bits, csrc/formats/codes.h: a code per element, a bf16 scale per group."""

import triton
import triton.language as tl

from ..._core.formats import names

# Elements that share a scale.
GROUP = tl.constexpr(names.GROUP)
LEVELS = names.LEVELS


@triton.constexpr_function
def is_coded(name):
    return name in LEVELS


@triton.constexpr_function
def is_root(name):
    """True where square roots of second moments are stored."""
    return name.startswith("u")


@triton.constexpr_function
def code_type(name):
    return tl.int8 if name == "int8" else tl.uint8


@triton.constexpr_function
def codes_per_byte(name):
    return 1 if name.endswith("8") else 2


@triton.constexpr_function
def levels_of(name):
    return LEVELS[name]


@triton.jit
def codes_value(codes, scales, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """Values of a block, from its bytes and scales."""
    INVERSE: tl.constexpr = 1.0 / levels_of(FORMAT)
    code = codes.to(tl.int32)
    if codes_per_byte(FORMAT) == 2:
        # The even element is in the lower half.
        code = tl.join(code & 15, code >> 4)
        if not is_root(FORMAT):
            code = (code ^ 8) - 8
    code = tl.reshape(code, (BLOCK // GROUP, GROUP)).to(tl.float32)
    unit = (scales.to(tl.uint32) << 16).to(tl.float32, bitcast=True)[:, None]
    if is_root(FORMAT):
        root = code * (unit * INVERSE)
        value = root * root
    else:
        y = code * INVERSE
        u = y.to(tl.uint32, bitcast=True)
        t = (u & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        magnitude = tl.div_rn(t, 2.0 - t) * unit
        value = (magnitude.to(tl.uint32, bitcast=True) | (u & 0x80000000)).to(tl.float32, bitcast=True)
    return tl.reshape(value, (BLOCK,))


@triton.jit
def group_of(top, FORMAT: tl.constexpr):
    """A group's scale, what takes magnitudes to what is encoded, and a mask of their bits, from the largest bits of one. For the
    range of a scale see csrc/formats/codes.h.
    """
    LEVELS: tl.constexpr = levels_of(FORMAT)
    scale = (top + 0xFFEF) >> 16
    scale = tl.where(scale < 0x0380, 0x0380, scale)
    finite = scale < 0x7F80
    as_float = (scale << 16).to(tl.float32, bitcast=True)
    per_scale = tl.div_rn(tl.full(as_float.shape, LEVELS if is_root(FORMAT) else 1.0, tl.float32), as_float)
    mask = tl.where(finite, 0x7FFFFFFF, 0).to(tl.uint32)
    return tl.where(finite, scale, 0x7FC0).to(tl.uint16), tl.where(finite, per_scale, 0.0), mask


@triton.jit
def code_of(x, per_scale, mask, draw, FORMAT: tl.constexpr):
    """x: the value, or the root of a second moment. Zero is 0. Up or down so that the mean of what is decoded is exact: of the
    companded value, and of the second moment itself. A second moment that is not zero has a code of at least 1.
    """
    LEVELS: tl.constexpr = levels_of(FORMAT)
    magnitude = x.to(tl.uint32, bitcast=True) & mask
    y = magnitude.to(tl.float32, bitcast=True) * per_scale
    part = draw.to(tl.int32).to(tl.float32) * 2.0**-16
    if is_root(FORMAT):
        below = y.to(tl.int32)
        whole = below.to(tl.float32)
        above = y - whole
        twice = whole + whole
        # y^2 lies (y^2 - whole^2) / ((whole + 1)^2 - whole^2) of the way.
        code = below + tl.where(part * (twice + 1.0) < above * (twice + above), 1, 0)
        least = tl.where(magnitude < 1, 0, 1)
        most = tl.where(code > LEVELS, LEVELS, code)
        code = tl.where(most > least, most, least)
    else:
        levels = tl.full(y.shape, LEVELS, tl.float32)
        code = tl.fma(tl.div_rn(y + y, 1.0 + y), levels, part).to(tl.int32)
        most = tl.where(code > LEVELS, LEVELS, code)
        negative = x.to(tl.int32, bitcast=True) >> 31
        code = (most ^ negative) - negative
    return code


@triton.jit
def codes_stored(x, draw, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """The bytes and the scales of a block's values, which are 0 behind the last element."""
    if is_root(FORMAT):
        x = tl.sqrt_rn(x)
    x = tl.reshape(x, (BLOCK // GROUP, GROUP))
    draw = tl.reshape(draw, (BLOCK // GROUP, GROUP))
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.uint32)
    scales, per_scale, mask = group_of(top, FORMAT)
    code = code_of(x, per_scale[:, None], mask[:, None], draw, FORMAT)
    if codes_per_byte(FORMAT) == 2:
        low, high = tl.split(tl.reshape(code, (BLOCK // 2, 2)))
        code = (low & 15) | (high << 4)
    else:
        code = tl.reshape(code, (BLOCK,))
    return code.to(code_type(FORMAT)), scales
