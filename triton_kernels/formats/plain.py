"""fp32, bf16 and fp16, rounded to nearest, csrc/formats/plain.h."""

import triton
import triton.language as tl


@triton.constexpr_function
def plain_type(name):
    """What is stored."""
    return {"fp32": tl.float32, "bf16": tl.uint16, "fp16": tl.float16}[name]


@triton.constexpr_function
def is_upper(name):
    """True where what is stored is the upper half of an fp32."""
    return name == "bf16"


@triton.jit
def from_pairs(words, BLOCK: tl.constexpr):
    """Numbers whose upper halves lie two to a word, the first in its lower half."""
    return tl.reshape(tl.join(words << 16, words & 0xFFFF0000), (BLOCK,))


@triton.jit
def to_pairs(u, BLOCK: tl.constexpr):
    low, high = tl.split(tl.reshape(u, (BLOCK // 2, 2)))
    return (low >> 16) | (high & 0xFFFF0000)


@triton.jit
def plain_value(stored, FORMAT: tl.constexpr):
    """stored: of bf16, bits of an fp32."""
    if FORMAT == "bf16":
        # In integers: the interpreter's own conversion truncates.
        value = stored.to(tl.float32, bitcast=True)
    elif FORMAT == "fp16":
        value = stored.to(tl.float32)
    else:
        value = stored
    return value


@triton.jit
def plain_stored(x, FORMAT: tl.constexpr):
    """Of bf16, the number in the upper half of a word, above what is cut off."""
    if FORMAT == "bf16":
        u = x.to(tl.uint32, bitcast=True)
        stored = tl.where(x != x, 0x7FC00000, u + 0x7FFF + ((u >> 16) & 1)).to(tl.uint32)
    elif FORMAT == "fp16":
        stored = x.to(tl.float16)
    else:
        stored = x
    return stored
