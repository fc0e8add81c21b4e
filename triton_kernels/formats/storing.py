"""Loads and stores a block of elements of any format. What a stored value means is in the file of its kind."""

import triton
import triton.language as tl

from ..._core.formats.names import PLAIN
from .codes import GROUP, code_type, codes_per_byte, codes_stored, codes_value, is_coded
from .plain import plain_stored, plain_type, plain_value
from .split import has_remainder, remainder_type, split_stored, split_value
from .stochastic import is_stochastic, stochastic_stored

PLAIN_NAMES = tuple(PLAIN.values())

# From an operand's slot in the address table to that of what lies beside it: remainders or scales.
BESIDE = tl.constexpr(7)


@triton.constexpr_function
def plain(name):
    """The plain format that an operand's own memory has."""
    return name.split("_")[0]


@triton.constexpr_function
def is_plain(name):
    return name in PLAIN_NAMES


@triton.constexpr_function
def draws(*names):
    """True where something is rounded stochastically."""
    return not all(is_plain(name) or name == "bf16_split32" for name in names)


@triton.constexpr_function
def pointer_type(name):
    return tl.pointer_type(code_type(name) if is_coded(name) else plain_type(plain(name)))


@triton.constexpr_function
def beside_type(name):
    return tl.pointer_type(tl.uint16 if is_coded(name) else remainder_type(name))


@triton.jit
def pointer(table_ptr, TYPE: tl.constexpr, FULL: tl.constexpr):
    ptr = tl.load(table_ptr).to(TYPE)
    if FULL:
        # On the typed pointer: on the integer the hint for 128-bit accesses is lost.
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def address(table_ptr, FORMAT: tl.constexpr, FULL: tl.constexpr):
    """The typed pointer at a slot of the address table."""
    return pointer(table_ptr, pointer_type(FORMAT), FULL)


@triton.jit
def operand(table_ptr, FORMAT: tl.constexpr, FULL: tl.constexpr):
    """The typed pointers of the operand at a slot of the address table: to itself, and to what lies beside it."""
    ptr = address(table_ptr, FORMAT, FULL)
    if is_coded(FORMAT) or has_remainder(FORMAT):
        beside = pointer(table_ptr + BESIDE, beside_type(FORMAT), FULL)
    else:
        beside = ptr
    return ptr, beside


@triton.jit
def fetch(ptr, offsets, mask, FULL: tl.constexpr):
    if FULL:
        stored = tl.load(ptr + offsets)
    else:
        stored = tl.load(ptr + offsets, mask=mask, other=0)
    return stored


@triton.jit
def put(ptr, offsets, mask, stored, FULL: tl.constexpr):
    if FULL:
        tl.store(ptr + offsets, stored)
    else:
        tl.store(ptr + offsets, stored, mask=mask)


@triton.jit
def span(begin, numel, PER: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask of what serves PER elements each."""
    offsets = begin // PER + tl.arange(0, BLOCK // PER)
    return offsets, offsets * PER < numel


@triton.jit
def block_at(begin, numel, BLOCK: tl.constexpr):
    """What ``load`` and ``store`` take as a block: its first element, the number of the tensor's, its offsets, and a mask."""
    offsets = begin + tl.arange(0, BLOCK)
    return begin, numel, offsets, offsets < numel


@triton.jit
def decode(ptr, offsets, mask, FORMAT: tl.constexpr, FULL: tl.constexpr):
    """Values of elements that stand alone."""
    return plain_value(fetch(ptr, offsets, mask, FULL), plain(FORMAT))


@triton.jit
def load(at, block, FORMAT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Values of a block of an operand's elements, 0 behind the last. at: what ``operand`` returns."""
    ptr, beside = at
    begin, numel, offsets, mask = block
    if is_coded(FORMAT):
        bytes_, in_bytes = span(begin, numel, codes_per_byte(FORMAT), BLOCK)
        groups, in_groups = span(begin, numel, GROUP, BLOCK)
        scales = fetch(beside, groups, in_groups, FULL)
        value = codes_value(fetch(ptr, bytes_, in_bytes, FULL), scales, FORMAT, BLOCK)
    elif has_remainder(FORMAT):
        value = split_value(fetch(ptr, offsets, mask, FULL), fetch(beside, offsets, mask, FULL), FORMAT)
    else:
        value = decode(ptr, offsets, mask, FORMAT, FULL)
    return value


@triton.jit
def store(at, block, value, draw, FORMAT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Round values and write them. draw: 16 random bits of each, for formats that round stochastically."""
    ptr, beside = at
    begin, numel, offsets, mask = block
    if is_coded(FORMAT):
        bytes_, in_bytes = span(begin, numel, codes_per_byte(FORMAT), BLOCK)
        groups, in_groups = span(begin, numel, GROUP, BLOCK)
        if not FULL:
            value = tl.where(mask, value, 0.0)
        codes, scales = codes_stored(value, draw, FORMAT, BLOCK)
        put(beside, groups, in_groups, scales, FULL)
        put(ptr, bytes_, in_bytes, codes, FULL)
    elif has_remainder(FORMAT):
        stored, remainder = split_stored(value, draw, FORMAT)
        put(ptr, offsets, mask, stored, FULL)
        put(beside, offsets, mask, remainder, FULL)
    elif is_stochastic(FORMAT):
        put(ptr, offsets, mask, stochastic_stored(value, draw, FORMAT), FULL)
    else:
        put(ptr, offsets, mask, plain_stored(value, FORMAT), FULL)
