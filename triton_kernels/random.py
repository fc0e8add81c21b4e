"""Random bits for stochastic rounding, csrc/base/random.h: a hash of (parameter's key, step, run of elements of the unsharded
tensor), times an odd number for each element of the run.
"""

import triton
import triton.language as tl

# Elements that share a hash.
RUN = tl.constexpr(8)
ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09)


@triton.jit
def seed_of(key, step):
    """The halves of the finaliser of splitmix64 (Steele, Lea and Flood 2014) over key and step."""
    z = key.to(tl.uint64) + (step + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def hashed(a, b, run):
    """Two rounds of multiply and shift (Wellons, "hash prospector"), the seed on both sides of the first."""
    x = run.to(tl.uint32) + a
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ (b + (run >> 32).to(tl.uint32) * 0x9E3779B9)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.constexpr_function
def odd_number(k):
    return ODD[k]


@triton.jit
def odd(k):
    """That of an element, from its place in its run."""
    number = tl.full(k.shape, odd_number(0), tl.uint32)
    for other in tl.static_range(1, RUN):
        number = tl.where(k == other, odd_number(other), number)
    return number.to(tl.uint32)


@triton.constexpr_function
def factor_of(operand):
    return 1 if operand < 2 else 0x01000193 if operand < 4 else 0x5BD1E995


@triton.jit
def draw_of(word, OPERAND: tl.constexpr):
    """The 16 bits of an operand: p is 0, states follow."""
    bits = word * factor_of(OPERAND)
    return (bits >> 8) & 0xFFFF if OPERAND == 1 or OPERAND == 2 else bits >> 16


@triton.jit
def words_at(a, b, place_ptr, begin, loaded, BLOCK: tl.constexpr, IN_RUNS: tl.constexpr):
    """The words of a block's elements. a, b: the seed; place_ptr: where a tensor's elements are in the unsharded one, as
    csrc/plan/plan.h's Place; loaded: values of the same elements; IN_RUNS: ``in_runs`` of that place.
    """
    first, row, row_step = tl.load(place_ptr), tl.load(place_ptr + 1), tl.load(place_ptr + 2)
    # Triton would make words in a layout of its own, one element of a run to a thread, and move them through shared memory.
    # Tied to what was loaded they have the layout of that. The number is 0, which LLVM sees and Triton does not.
    nothing = (loaded.to(tl.uint32, bitcast=True) >> 31) >> 1
    i = tl.arange(0, BLOCK) + nothing.to(tl.int32)
    if IN_RUNS:
        # A thread has the elements of a run, for which the compiler leaves one hash.
        k = (i // RUN).to(tl.int64)
        if row == 0:
            run = ((first + begin) >> 3) + k
        else:
            at = begin % row
            run = ((first + begin // row * row_step + at) >> 3) + k
            run = tl.where(k < (row - at) >> 3, run, run + ((row_step - row) >> 3))
        word = hashed(a, b, run) * odd(i % RUN)
    else:
        i = i.to(tl.int64)
        if row == 0:
            index = first + begin + i
        else:
            i += begin % row
            # Divisions of 64 bits cost more than the rest of the hash; a block crosses at most one end of a long row.
            if row < BLOCK:
                rows = (i.to(tl.int32) // row.to(tl.int32)).to(tl.int64)
            else:
                rows = (i >= row).to(tl.int64)
            index = first + (begin // row + rows) * row_step + i - rows * row
        word = hashed(a, b, index >> 3) * odd(index.to(tl.int32) & 7)
    return word
