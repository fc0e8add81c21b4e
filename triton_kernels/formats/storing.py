"""Loads and stores a block of elements of any format. What a stored value means is in the file of its kind."""

import triton
import triton.language as tl

from ..._core.formats.names import PLAIN
from ..random import RUN
from .codes import GROUP, codes_per, codes_stored, codes_value, is_coded, unpacked
from .plain import from_pairs, is_upper, plain_stored, plain_type, plain_value, to_pairs
from .split import has_remainder, remainder_type, split_stored, split_value
from .stochastic import is_stochastic, stochastic_stored

PLAIN_NAMES = tuple(PLAIN.values())

# In place of the format of an average of the weights, where there is none.
NO_AVERAGE = ("", "off")

# From an operand's slot in the address table to that of what lies beside it: remainders or scales.
BESIDE = tl.constexpr(8)


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
    return not all(name in (*NO_AVERAGE, "bf16_split32") or is_plain(name) for name in names)


@triton.constexpr_function
def pointer_type(name):
    return tl.pointer_type(tl.uint8 if is_coded(name) else plain_type(plain(name)))


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
    # Without a sign, for which a division would be four instructions.
    offsets = (begin.to(tl.uint64) // PER).to(tl.int64) + tl.arange(0, BLOCK // PER)
    return offsets, offsets * PER < numel


@triton.jit
def block_at(begin, numel, BLOCK: tl.constexpr):
    """What ``load`` and ``store`` take as a block: its first element, the number of the tensor's, its offsets, and a mask."""
    offsets = begin + tl.arange(0, BLOCK)
    return begin, numel, offsets, offsets < numel


@triton.jit
def decode(ptr, offsets, mask, FORMAT: tl.constexpr, FULL: tl.constexpr):
    """Values of elements that stand alone."""
    stored = fetch(ptr, offsets, mask, FULL)
    if is_upper(plain(FORMAT)):
        stored = stored.to(tl.uint32) << 16
    return plain_value(stored, plain(FORMAT))


@triton.jit
def as_words(ptr, begin, PER: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to a full block's words of 32 bits, which have PER elements each."""
    words = tl.multiple_of(ptr.to(tl.pointer_type(tl.uint32)), 16)
    return words + tl.multiple_of(begin.to(tl.uint64) // PER, BLOCK // PER) + tl.arange(0, BLOCK // PER)


@triton.jit
def get_number(ptr, block, FORMAT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """What plain.py takes as stored."""
    begin, _, offsets, mask = block
    if is_upper(plain(FORMAT)) and FULL:
        # A half of a register is two instructions away from where an fp32 number has it, a shift or a mask of a word one.
        stored = from_pairs(tl.load(as_words(ptr, begin, 2, BLOCK)), BLOCK)
    else:
        stored = fetch(ptr, offsets, mask, FULL)
        if is_upper(plain(FORMAT)):
            stored = stored.to(tl.uint32) << 16
    return stored


@triton.jit
def put_number(ptr, block, stored, FORMAT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """stored: as plain.py returns it."""
    begin, _, offsets, mask = block
    if is_upper(plain(FORMAT)) and FULL:
        tl.store(as_words(ptr, begin, 2, BLOCK), to_pairs(stored, BLOCK))
    elif is_upper(plain(FORMAT)):
        put(ptr, offsets, mask, (stored >> 16).to(tl.uint16), FULL)
    else:
        put(ptr, offsets, mask, stored, FULL)


@triton.jit
def load(at, block, FORMAT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Values of a block of an operand's elements, 0 behind the last. at: what ``operand`` returns."""
    ptr, beside = at
    begin, numel, offsets, mask = block
    if is_coded(FORMAT):
        if FULL:
            WORD: tl.constexpr = codes_per(FORMAT, 32)
            codes = unpacked(tl.load(as_words(ptr, begin, WORD, BLOCK)), FORMAT, WORD, BLOCK)
        else:
            BYTE: tl.constexpr = codes_per(FORMAT, 8)
            bytes_, in_bytes = span(begin, numel, BYTE, BLOCK)
            codes = unpacked(fetch(ptr, bytes_, in_bytes, FULL), FORMAT, BYTE, BLOCK)
        groups, in_groups = span(begin, numel, GROUP, BLOCK)
        value = codes_value(codes, fetch(beside, groups, in_groups, FULL), FORMAT, BLOCK)
    elif has_remainder(FORMAT):
        value = split_value(get_number(ptr, block, FORMAT, BLOCK, FULL), fetch(beside, offsets, mask, FULL), FORMAT)
    else:
        value = plain_value(get_number(ptr, block, FORMAT, BLOCK, FULL), plain(FORMAT))
    return value


@triton.jit
def as_stored(value, draw, FORMAT: tl.constexpr):
    """Values as they are read after ``store``, of formats without codes."""
    if has_remainder(FORMAT):
        stored, remainder = split_stored(value, draw, FORMAT)
    elif is_stochastic(FORMAT):
        stored = stochastic_stored(value, draw, FORMAT)
    else:
        stored = plain_stored(value, FORMAT)
    if is_upper(plain(FORMAT)):
        stored = stored & 0xFFFF0000
    if has_remainder(FORMAT):
        rounded = split_value(stored, remainder, FORMAT)
    else:
        rounded = plain_value(stored, plain(FORMAT))
    return rounded


@triton.jit
def store(at, block, value, draw, FORMAT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Round values and write them. draw: 16 random bits of each, for formats that round stochastically."""
    ptr, beside = at
    begin, numel, offsets, mask = block
    if is_coded(FORMAT):
        if FULL:
            WORD: tl.constexpr = codes_per(FORMAT, 32)
            codes, scales = codes_stored(value, draw, FORMAT, WORD, BLOCK)
            tl.store(as_words(ptr, begin, WORD, BLOCK), codes)
            # From the threads that have a group's elements, of which the first writes. A store of nothing but scales would
            # take them through shared memory.
            k = tl.arange(0, BLOCK // RUN)
            spread = tl.reshape(tl.broadcast_to(scales[:, None], (BLOCK // GROUP, GROUP // RUN)), (BLOCK // RUN,))
            tl.store(beside + begin.to(tl.uint64) // GROUP + k // (GROUP // RUN), spread, mask=k % (GROUP // RUN) == 0)
        else:
            BYTE: tl.constexpr = codes_per(FORMAT, 8)
            codes, scales = codes_stored(tl.where(mask, value, 0.0), draw, FORMAT, BYTE, BLOCK)
            bytes_, in_bytes = span(begin, numel, BYTE, BLOCK)
            put(ptr, bytes_, in_bytes, codes.to(tl.uint8), FULL)
            groups, in_groups = span(begin, numel, GROUP, BLOCK)
            put(beside, groups, in_groups, scales, FULL)
    elif has_remainder(FORMAT):
        stored, remainder = split_stored(value, draw, FORMAT)
        put_number(ptr, block, stored, FORMAT, BLOCK, FULL)
        put(beside, offsets, mask, remainder, FULL)
    elif is_stochastic(FORMAT):
        put_number(ptr, block, stochastic_stored(value, draw, FORMAT), FORMAT, BLOCK, FULL)
    else:
        put_number(ptr, block, plain_stored(value, FORMAT), FORMAT, BLOCK, FULL)
