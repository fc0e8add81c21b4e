// The hyper-parameters a rule reads: all doubles, in the order of `names`. Python passes a row of values by these
// names.
#pragma once

#include "base/arithmetic.h"

namespace precond {
inline namespace PRECOND_ISA {

struct SGDHyper {
  double lr, weight_decay, l1_decay, momentum, dampening;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "momentum", "dampening"};
};

struct AdamHyper {
  double lr, weight_decay, l1_decay, l1_cap, beta1, beta2, eps;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "l1_cap", "beta1", "beta2", "eps"};
};

struct AdagradHyper {
  double lr, weight_decay, l1_decay, l1_cap, lr_decay, eps;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "l1_cap", "lr_decay", "eps"};
};

struct RMSpropHyper {
  double lr, weight_decay, l1_decay, l1_cap, alpha, eps, momentum;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "l1_cap", "alpha", "eps", "momentum"};
};

struct LionHyper {
  double lr, weight_decay, l1_decay, beta1, beta2;
  static constexpr const char* names[] = {"lr", "weight_decay", "l1_decay", "beta1", "beta2"};
};

struct DualHyper {
  double lr, weight_decay, momentum, lookahead, scale, exponent, offset, slope;
  static constexpr const char* names[] = {"lr",    "weight_decay", "momentum", "lookahead",
                                          "scale", "exponent",     "offset",   "slope"};
};

struct AverageHyper {
  double momentum, lookahead;
  static constexpr const char* names[] = {"momentum", "lookahead"};
};

struct GaussNewtonHyper {
  double lr, weight_decay, l1_decay, l1_cap, beta1, beta2, eps, scale, clip, corrected;
  static constexpr const char* names[] = {"lr",    "weight_decay", "l1_decay", "l1_cap", "beta1",
                                          "beta2", "eps",          "scale",    "clip",   "corrected"};
};

struct PerturbHyper {
  double radius, scale, eps;
  static constexpr const char* names[] = {"radius", "scale", "eps"};
};

}  // namespace PRECOND_ISA
}  // namespace precond
