// Tiles: fp32 copies of a stretch of each operand, for formats and layouts that the rules' loops do not read
// themselves.
#pragma once

#include "plan/plan.h"

namespace precond {
inline namespace PRECOND_ISA {

// Elements of a tile: the fp32 copies of five operands then take 10 KB of L1. 256 and 1024 time alike where every
// element stands alone; with codes 256 takes 1.2 times as long.
constexpr int64_t kTile = 512;
constexpr int64_t kTileGroups = kTile / kGroup;

struct alignas(64) Tile {
  float value[kTile];
};
struct alignas(64) RandomTile {
  uint32_t word[kTile];
};

// Functions, not parts of each rule: five operands times formats times strides made 60 KB of code of every rule, and a
// call per tile costs nothing.

// The operand's values as dense fp32.
void load(const Operand& operand, const Strides* strides, int64_t begin, int64_t n, Tile& tile);
// `shift`: of this operand's bits in the element's word. `is_root`: the tile has square roots of a second moment.
void store(const Operand& operand, const Strides* strides, int64_t begin, int64_t n, Tile& tile, bool is_root,
           const RandomTile& random, int shift);
void fill_random(Seed seed, uint64_t index, int64_t n, RandomTile& random);
void clamp_tile(Incoming incoming, int64_t n, Tile& tile);

}  // namespace PRECOND_ISA
}  // namespace precond
