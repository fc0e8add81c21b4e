// Descent in dual space, for DualDescent; and two passes of methods that map whole matrices: the average of gradients
// before that, and the step along the result.
#pragma once

#include "rules/decays.h"
#include "rules/dual_maps.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct DualHyper {
  double lr, weight_decay, momentum, lookahead, scale, exponent, offset, slope;
  static constexpr const char* names[] = {"lr",    "weight_decay", "momentum", "lookahead",
                                          "scale", "exponent",     "offset",   "slope"};
};

struct DirectedHyper {
  double lr, weight_decay;
  static constexpr const char* names[] = {"lr", "weight_decay"};
};

struct AverageHyper {
  double momentum, lookahead;
  static constexpr const char* names[] = {"momentum", "lookahead"};
};

// An average of gradients, and a point between it and the last one: 1 - momentum from it, or none.
struct Averaging {
  float one_minus_momentum, lookahead;
  PRECOND_INLINE float operator()(float g, float& m) const {
    m = fma(one_minus_momentum, g - m, m);
    return fma(lookahead, g - m, m);
  }
};

// Maddison et al., arXiv 1902.02257: the gradient of a convex function, per entry. Maps: dual_maps.h.
template <class Map, class Decay>
struct Dual {
  using Hyper = DualHyper;
  static constexpr int kStates = 0, kSquares = 0, kScalarStates = 0;
  static constexpr bool kReadsStep = false;
  float lr;
  Map map;
  Decay decay;

  PRECOND_INLINE Step operator()(float, float g) const { return {lr, map(g)}; }
};

template <class Map, class Decay>
struct DualMomentum {
  using Hyper = DualHyper;
  static constexpr int kStates = 1, kSquares = 0, kScalarStates = 0;
  static constexpr bool kReadsStep = false;
  float lr;
  Averaging average;
  Map map;
  Decay decay;

  PRECOND_INLINE Step operator()(float, float g, float& m) const { return {lr, map(average(g, m))}; }
};

// What a later pass maps as a whole: p is overwritten with it.
struct Average {
  using Hyper = AverageHyper;
  static constexpr int kStates = 1, kSquares = 0, kScalarStates = 0;
  static constexpr bool kReadsStep = false;
  Averaging average;

  PRECOND_INLINE float operator()(float, float g, float& m) const { return average(g, m); }
};

// SGDW along what an earlier pass has left in a state. Of the gradient itself masks and statistics know.
struct Directed {
  using Hyper = DirectedHyper;
  static constexpr int kStates = 1, kSquares = 0, kScalarStates = 0;
  static constexpr bool kReadsStep = false;
  float lr;
  L2 decay;

  PRECOND_INLINE Step operator()(float, float, float& direction) const { return {lr, direction}; }
};

template <>
constexpr bool kOftenMixed<Average> = true;
template <>
constexpr bool kOverwrites<Average> = true;

PRECOND_INLINE void set_map(RatioMap& map, const DualHyper& h) {
  map.offset = float(h.offset);
  map.slope = float(h.slope);
}
PRECOND_INLINE void set_map(SmoothedMap& map, const DualHyper& h) { map.scale_squared = float(h.scale * h.scale); }
PRECOND_INLINE void set_map(PowerMap& map, const DualHyper& h) {
  map.scale = float(h.scale);
  map.exponent = float(h.exponent);
}
template <class Map>
PRECOND_INLINE void set_map(Map& map, const DualHyper& h) {
  map.scale = float(h.scale);
}
template <class Hyper>
PRECOND_INLINE void set_average(Averaging& average, const Hyper& h) {
  average.one_minus_momentum = float(1.0 - h.momentum);
  average.lookahead = float(h.lookahead);
}
template <class Map, class Decay>
PRECOND_INLINE void set_scalars(Dual<Map, Decay>& rule, const DualHyper& h, Now) {
  rule.lr = float(h.lr);
  set_map(rule.map, h);
  set_scalars(rule.decay, h, h.lr);
}
template <class Map, class Decay>
PRECOND_INLINE void set_scalars(DualMomentum<Map, Decay>& rule, const DualHyper& h, Now) {
  rule.lr = float(h.lr);
  set_average(rule.average, h);
  set_map(rule.map, h);
  set_scalars(rule.decay, h, h.lr);
}
PRECOND_INLINE void set_scalars(Average& rule, const AverageHyper& h, Now) { set_average(rule.average, h); }
PRECOND_INLINE void set_scalars(Directed& rule, const DirectedHyper& h, Now) {
  rule.lr = float(h.lr);
  set_scalars(rule.decay, h, h.lr);
}

// A map without a momentum and with one.
#define PRECOND_DUAL(RULE, name, Map) \
  RULE(name, Dual<Map, L2>)           \
  RULE(name "_momentum", DualMomentum<Map, L2>)

#define PRECOND_RULES_dual(RULE)                   \
  PRECOND_DUAL(RULE, "dual_ratio", RatioMap)       \
  PRECOND_DUAL(RULE, "dual_smoothed", SmoothedMap) \
  PRECOND_DUAL(RULE, "dual_clip", ClipMap)         \
  PRECOND_DUAL(RULE, "dual_asinh", AsinhMap)       \
  PRECOND_DUAL(RULE, "dual_log", LogMap)           \
  PRECOND_DUAL(RULE, "dual_power", PowerMap)       \
  RULE("average", Average)                         \
  RULE("directed", Directed)

}  // namespace PRECOND_ISA
}  // namespace precond
