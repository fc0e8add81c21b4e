// The hyper-parameters a rule reads: all doubles, in the order of `names`. Python passes a row of values by these
// names.
#pragma once

#include "math.h"

namespace precond {
inline namespace PRECOND_ISA {

struct SGDHyper {
  double lr, momentum, dampening, weight_decay;
  static constexpr const char* names[] = {"lr", "momentum", "dampening", "weight_decay"};
};

struct AdamWHyper {
  double lr, beta1, beta2, eps, weight_decay, l1_decay, l1_cap;
  static constexpr const char* names[] = {"lr", "beta1", "beta2", "eps", "weight_decay", "l1_decay", "l1_cap"};
};

}  // namespace PRECOND_ISA
}  // namespace precond
