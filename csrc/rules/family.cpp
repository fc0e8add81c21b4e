// Compiled once per family: its part of the registry.
#include "rules/family.h"

#include <iterator>

#include "rules/registry.h"

namespace precond {
namespace PRECOND_FAMILY {

template <class Rule>
RuleInfo info(const char* name, const char* type) {
  using Hyper = typename Rule::Hyper;
  return {name,
          type,
          Rule::kStates,
          Rule::kSquares,
          Rule::kScalarStates,
          Rule::kReadsStep,
          {std::begin(Hyper::names), std::end(Hyper::names)},
          int(sizeof(Rule) / sizeof(float)),
          [](const double* hyper, double step, bool fresh, double scalar, float* scalars) {
            fill_scalars<Rule>(hyper, step, fresh, scalar, scalars);
          },
          [](const double* hyper, double step, double scalar) { return advanced<Rule>(hyper, step, scalar); }};
}

std::vector<RuleInfo> table() {
#define PRECOND_INFO(name, ...) info<__VA_ARGS__>(name, #__VA_ARGS__),
  return {PRECOND_RULES(PRECOND_INFO)};
#undef PRECOND_INFO
}

}  // namespace PRECOND_FAMILY
}  // namespace precond
