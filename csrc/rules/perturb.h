// The first half of a step that takes a second gradient elsewhere, for GradientRegularizer.
#pragma once

#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct PerturbHyper {
  double radius, scale, eps;
  static constexpr const char* names[] = {"radius", "scale", "eps"};
};

// The point where a two-gradient step takes the second one; the parameter waits in a state.
struct Perturb {
  using Hyper = PerturbHyper;
  static constexpr int kStates = 1, kSquares = 0, kScalarStates = 0;
  static constexpr bool kReadsStep = false;
  float radius;

  PRECOND_INLINE float operator()(float p, float g, float& backup) const {
    backup = p;
    return fma(radius, g, p);
  }
};

// The same along P P^T g = g / (sqrt(scale v) + eps). A coordinate that never had a gradient (v == 0) stays: eps alone
// would divide its first one.
struct PerturbAdaptive {
  using Hyper = PerturbHyper;
  static constexpr int kStates = 2, kSquares = 0b10, kScalarStates = 0;
  static constexpr bool kReadsStep = false;
  float radius, root_scale, eps;

  PRECOND_INLINE float operator()(float p, float g, float& backup, float& v) const {
    backup = p;
    const float moved = fma(radius, g / fma(sqrt(v), root_scale, eps), p);
    return v > 0.0f ? moved : p;
  }
};

PRECOND_INLINE void set_scalars(Perturb& rule, const PerturbHyper& h, Now) { rule.radius = float(h.radius); }
PRECOND_INLINE void set_scalars(PerturbAdaptive& rule, const PerturbHyper& h, Now) {
  rule.radius = float(h.radius);
  rule.root_scale = float(::sqrt(h.scale));
  rule.eps = float(h.eps);
}

#define PRECOND_RULES_perturb(RULE) \
  RULE("perturb", Perturb)          \
  RULE("perturb_adaptive", PerturbAdaptive)

}  // namespace PRECOND_ISA
}  // namespace precond
