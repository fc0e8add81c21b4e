// Sizes that more than one floor knows.
#pragma once

namespace precond {

// Elements that share a scale in formats of 8 or 4 bits.
constexpr int kGroup = 64;
// Per-element states of a rule, at most: three, and an average of the weights.
constexpr int kMaxStates = 4;
// Hyper-parameters of a rule, at most.
constexpr int kMaxHyper = 14;
// Floats that a plan keeps for the scalars of one step: those of a rule, and a seed behind them.
constexpr int kScalarFloats = 18;

}  // namespace precond
