"""Random bits for stochastic rounding, csrc/base/random.h: a hash of (parameter's key, step, element of the unsharded tensor)."""

import triton
import triton.language as tl


@triton.jit
def seed_of(key, step):
    """The halves of the finaliser of splitmix64 (Steele, Lea and Flood 2014) over key and step."""
    z = key.to(tl.uint64) + (step + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def random_word(a, b, index):
    """Two rounds of multiply and shift (Wellons, "hash prospector"), the seed on both sides of the first."""
    x = index.to(tl.uint32) + a
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ (b + (index >> 32).to(tl.uint32) * 0x9E3779B9)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.constexpr_function
def _shift(operand):
    return (0, 8, 16, 4)[operand]


@triton.jit
def draw_of(word, OPERAND: tl.constexpr):
    """The 16 bits of an operand: p is 0, states follow."""
    return (word >> _shift(OPERAND)) & 0xFFFF


@triton.jit
def words_at(a, b, place_ptr, begin, BLOCK: tl.constexpr):
    """The words of a block's elements. a, b: the seed; place_ptr: where a tensor's elements are in the unsharded one, as
    csrc/plan/plan.h's Place.
    """
    first, row, row_step = tl.load(place_ptr), tl.load(place_ptr + 1), tl.load(place_ptr + 2)
    i = tl.arange(0, BLOCK).to(tl.int64)
    if row == 0:
        word = random_word(a, b, first + begin + i)
    else:
        i += begin % row
        # Divisions of 64 bits cost more than the rest of the hash; a block crosses at most one end of a long row.
        if row < BLOCK:
            rows = (i.to(tl.int32) // row.to(tl.int32)).to(tl.int64)
        else:
            rows = (i >= row).to(tl.int64)
        word = random_word(a, b, first + (begin // row + rows) * row_step + i - rows * row)
    return word
