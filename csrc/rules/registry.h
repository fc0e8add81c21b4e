// Every rule by its number in a plan, for code that knows no formula: what the rule needs, and functions that make its
// scalars on the host.
#pragma once

#include <string>
#include <vector>

#include "base/limits.h"

namespace precond {

struct RuleInfo {
  const char* name;
  const char* type;  // of the functor, as it is spelled
  int states, squares, scalar_states;
  bool reads_step;
  bool has_parts;  // parts.h: the last of its scalars is a factor on updates
  std::vector<std::string> hyper;
  int scalars;  // floats that fill() writes
  void (*fill)(const double* hyper, double step, bool fresh, double scalar, float* scalars);
  double (*advanced)(const double* hyper, double step, double scalar);
};

// Rules of one family have consecutive numbers; those with parts follow, parts.h.
struct Family {
  const char* name;
  int first, count;
};

const std::vector<Family>& families();
const std::vector<RuleInfo>& rules();

}  // namespace precond
