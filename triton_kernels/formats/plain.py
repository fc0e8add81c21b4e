"""fp32, bf16 and fp16, rounded to nearest, csrc/formats/plain.h."""

import triton
import triton.language as tl


@triton.constexpr_function
def plain_type(name):
    """What is stored."""
    return {"fp32": tl.float32, "bf16": tl.uint16, "fp16": tl.float16}[name]


@triton.jit
def plain_value(stored, FORMAT: tl.constexpr):
    if FORMAT == "bf16":
        # In integers: the interpreter's own conversion truncates.
        value = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "fp16":
        value = stored.to(tl.float32)
    else:
        value = stored
    return value


@triton.jit
def plain_stored(x, FORMAT: tl.constexpr):
    if FORMAT == "bf16":
        u = x.to(tl.uint32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        stored = tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
    elif FORMAT == "fp16":
        stored = x.to(tl.float16)
    else:
        stored = x
    return stored
