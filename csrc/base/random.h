// Random bits for stochastic rounding: a hash of (the parameter's key, step, element of the unsharded tensor), so that
// they depend on neither launch nor sharding and no two parameters share a stream.
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
PRECOND_INLINE uint32_t random_word(Seed seed, uint32_t index, uint32_t index_high) {
  uint32_t x = index + seed.a;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= seed.b + index_high * 0x9e3779b9u;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// An element's word serves all of its operands, p first: each has 16 bits, whose upper eight, which decide nearly
// always, no other has.
PRECOND_INLINE int draw_shift(int operand) { return operand == 0 ? 0 : operand == 1 ? 8 : operand == 2 ? 16 : 4; }
PRECOND_INLINE uint32_t draw_of(uint32_t word, int shift) { return word >> shift & 0xffffu; }

}  // namespace PRECOND_ISA
}  // namespace precond
