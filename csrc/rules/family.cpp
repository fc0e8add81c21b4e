// Compiled once per family: its part of the registry.
#include "rules/family.h"

#include <iterator>

#include "rules/registry.h"

namespace precond {
namespace PRECOND_FAMILY {

template <class Hyper>
std::vector<std::string> names_of(Hyper*) {
  return {std::begin(Hyper::names), std::end(Hyper::names)};
}
template <class Rule, bool kAverages>
std::vector<std::string> names_of_parts(WithParts<Rule, kAverages>*) {
  std::vector<std::string> names = names_of(static_cast<typename Rule::Hyper*>(nullptr));
  names.insert(names.end(), std::begin(PartsHyper::names), std::end(PartsHyper::names));
  return names;
}
template <class Rule>
std::vector<std::string> hyper_names() {
  if constexpr (kHasParts<Rule>)
    return names_of_parts(static_cast<Rule*>(nullptr));
  else
    return names_of(static_cast<typename Rule::Hyper*>(nullptr));
}

template <class Rule>
RuleInfo info(const char* name, const char* type) {
  return {name,
          type,
          Rule::kStates,
          Rule::kSquares,
          Rule::kScalarStates,
          Rule::kReadsStep,
          kHasParts<Rule>,
          hyper_names<Rule>(),
          int(sizeof(Rule) / sizeof(float)),
          [](const double* hyper, double step, bool fresh, double scalar, float* scalars) {
            fill_scalars<Rule>(hyper, step, fresh, scalar, scalars);
          },
          [](const double* hyper, double step, double scalar) { return advanced<Rule>(hyper, step, scalar); }};
}

std::vector<RuleInfo> table() {
#define PRECOND_INFO(name, ...) info<__VA_ARGS__>(name, #__VA_ARGS__),
#define PRECOND_MASKS(name, ...) info<WithMasks<__VA_ARGS__>>(name "+parts", "WithParts<" #__VA_ARGS__ ", false>"),
#define PRECOND_AVERAGE(name, ...) info<WithAverage<__VA_ARGS__>>(name "+ema", "WithParts<" #__VA_ARGS__ ", true>"),
  return {PRECOND_RULES_AND_PARTS(PRECOND_INFO, PRECOND_MASKS, PRECOND_AVERAGE)};
#undef PRECOND_INFO
#undef PRECOND_MASKS
#undef PRECOND_AVERAGE
}

}  // namespace PRECOND_FAMILY
}  // namespace precond
