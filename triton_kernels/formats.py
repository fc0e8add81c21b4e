"""Formats: how one logical fp32 value lives in memory. One function to decode and one to encode, for csrc/formats.h."""

import torch
import triton
import triton.language as tl

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def address(table_ptr, FORMAT: tl.constexpr, FULL: tl.constexpr):
    """The typed pointer at a slot of the address table."""
    if FORMAT == "bf16":
        ptr = tl.load(table_ptr).to(tl.pointer_type(tl.uint16))
    elif FORMAT == "fp16":
        ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float16))
    else:
        ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    if FULL:
        # On the typed pointer: on the integer the hint for 128-bit accesses is lost.
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def decode(ptr, offsets, mask, FORMAT: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        stored = tl.load(ptr + offsets)
    else:
        stored = tl.load(ptr + offsets, mask=mask, other=0)
    if FORMAT == "bf16":
        # In integers: the interpreter's own conversion truncates.
        value = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == "fp16":
        value = stored.to(tl.float32)
    else:
        value = stored
    return value


@triton.jit
def encode(ptr, offsets, mask, value, FORMAT: tl.constexpr, FULL: tl.constexpr):
    if FORMAT == "bf16":
        u = value.to(tl.uint32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        stored = tl.where(value != value, 0x7FC0, rounded).to(tl.uint16)
    elif FORMAT == "fp16":
        stored = value.to(tl.float16)
    else:
        stored = value
    if FULL:
        tl.store(ptr + offsets, stored)
    else:
        tl.store(ptr + offsets, stored, mask=mask)
