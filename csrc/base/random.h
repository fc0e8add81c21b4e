// Random bits for stochastic rounding: a hash of (the parameter's key, step, element of the unsharded tensor), so that
// they depend on neither launch nor sharding and no two parameters share a stream. One hash serves eight elements: ten
// operations each were a tenth of a GPU's step with codes.
#pragma once

#include "base/arithmetic.h"

namespace precond {
inline namespace PRECOND_ISA {

struct Seed {
  uint32_t a, b;
};

// The finaliser of splitmix64 (Steele, Lea and Flood 2014) over key and step.
PRECOND_INLINE Seed seed_of(uint64_t key, uint64_t step) {
  uint64_t z = key + (step + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return {uint32_t(z), uint32_t(z >> 32)};
}

// Two rounds of multiply and shift (Wellons, "hash prospector"), the seed on both sides of the first. `index` in
// halves: a loop over a tile has one high half.
PRECOND_INLINE uint32_t hashed(Seed seed, uint32_t index, uint32_t index_high) {
  uint32_t x = index + seed.a;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= seed.b + index_high * 0x9e3779b9u;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Elements that share a hash: a run, from a multiple of as many on in the unsharded tensor.
constexpr int kRun = 8;
// The word of an element: the hash of its run times an odd number of its own. Draws within a run correlate by at most
// 0.007, where independent ones of a million runs have 0.001; rounding by them has the mean and the variance of
// independent ones (bench/NOTES.md).
PRECOND_INLINE constexpr uint32_t odd(int k) {
  // Not an array: nvcc would put it on the stack.
  return k == 0   ? 0x9e3779b1u
         : k == 1 ? 0x85ebca77u
         : k == 2 ? 0xc2b2ae3du
         : k == 3 ? 0x27d4eb2fu
         : k == 4 ? 0x165667b1u
         : k == 5 ? 0xd3a2646du
         : k == 6 ? 0xfd7046c5u
                  : 0xb55a4f09u;
}

// An element's word serves all of its operands, p first: each has 16 bits, whose upper eight, which decide nearly
// always, no other has.
struct Draws {
  uint32_t factor;
  int shift;  // after which they are bits 8 to 23: where those of the first two states lie, and where codes add them
  PRECOND_INLINE uint32_t placed(uint32_t word) const { return word * factor >> shift & 0x00ffff00u; }
  PRECOND_INLINE uint32_t operator()(uint32_t word) const { return placed(word) >> 8; }
};
PRECOND_INLINE constexpr Draws draws_of(int operand) {
  return {operand < 2 ? 1u : operand < 4 ? 0x01000193u : 0x5bd1e995u, operand == 1 || operand == 2 ? 0 : 8};
}

}  // namespace PRECOND_ISA
}  // namespace precond
