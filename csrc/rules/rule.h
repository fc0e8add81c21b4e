// What a rule is, and how its scalars are made. A rule is a functor of one element. It updates the states and returns a
// Step (decays.h), what it takes from p. It leaves p alone: `update` below applies the step and the rule's field
// `decay`, for the CPU loop and the CUDA kernels. A rule without a decay returns the new p itself, a float. No rule
// knows an address or how a value is stored; its fields are the scalars of one step. It says beside its formula what it
// needs:
//
//   Hyper          the hyper-parameters that its scalars are made of: doubles, in the order of Hyper::names
//   kStates        how many states an element has
//   kSquares       a bit for each of them that is a second moment: codes without a sign keep it
//   kReadsStep     whether its scalars depend on the step counter
//   kScalarStates  1 if it keeps one number per parameter besides, else 0; if so,
//                  `static double advance(const Hyper&, double step, double scalar)` returns it after this step
//
// set_scalars(rule, hyper, now) fills the fields: in fp64, with operations that give the same bits everywhere. A family
// is a header of rules and PRECOND_RULES_<family>, the list of their names; CMakeLists.txt lists the families.
#pragma once

#include <cmath>
#include <type_traits>

#include "base/arithmetic.h"
#include "base/limits.h"
#include "rules/decays.h"

namespace precond {
inline namespace PRECOND_ISA {

// Whether training takes a rule so often that it has kernels of its own for the formats that are used most.
template <class Rule>
constexpr bool kOften = false;
// The format of its state K, of those for means and for second moments.
template <class Rule, int K, class Mean, class Square>
using state_format = std::conditional_t<(Rule::kSquares >> K & 1) != 0, Square, Mean>;

// Whether methods of several passes take it with a bf16 p or g beside fp32 operands: it has loops of its own for those.
template <class Rule>
constexpr bool kOftenMixed = false;
// Whether it writes p and does not read it.
template <class Rule>
constexpr bool kOverwrites = false;

// Whether it is another rule with its parts, parts.h, and of those whether that is taken often.
template <class Rule>
constexpr bool kHasParts = false;
template <class Rule>
constexpr bool kOftenWithParts = false;

// The new p, from the old one and what a rule returns: the one place where a decay is applied.
template <class Rule>
PRECOND_INLINE float stepped(const Rule& rule, float p, Step step) {
  return rule.decay(p, step);
}
template <class Rule>
PRECOND_INLINE float stepped(const Rule&, float, float new_p) {
  return new_p;
}
// What a rule with parts returns, and one without a decay may: the new p, and what it lacks of the old one before it is
// rounded.
struct Moved {
  float p, taken;
};
template <class Rule>
PRECOND_INLINE float stepped(const Rule&, float, Moved moved) {
  return moved.p;
}
// What a rule makes of one element: every loop calls this.
template <class Rule, class... S>
PRECOND_INLINE void update(const Rule& rule, float& p, float g, S&... s) {
  p = stepped(rule, p, rule(p, g, s...));
}

// What scalars are made of besides hyper-parameters. A rule gets what it says it needs: one that reads the step without
// saying so does not compile.
struct Now {
  bool fresh;  // the parameter's state was made for this step
};
struct Counted : Now {
  double step;  // from 1
};
struct Carried : Counted {
  double scalar;  // the scalar state after this step
};

// The fields of a rule, as floats.
template <class Rule>
PRECOND_INLINE void fill_scalars(const double* hyper, double step, bool fresh, double scalar, float* scalars) {
  static_assert(sizeof(Rule) <= (kScalarFloats - 2) * sizeof(float), "raise kScalarFloats: a seed lies behind a rule");
  static_assert(Rule::kStates <= kMaxStates, "raise kMaxStates");
  static_assert(sizeof(typename Rule::Hyper) <= kMaxHyper * sizeof(double), "raise kMaxHyper");
  static_assert(Rule::kScalarStates == 0 || (Rule::kScalarStates == 1 && Rule::kReadsStep));
  typename Rule::Hyper h;
  std::memcpy(&h, hyper, sizeof h);
  Rule rule;
  step = countable(step);
  if constexpr (Rule::kScalarStates != 0)
    set_scalars(rule, h, Carried{{{fresh}, step}, scalar});
  else if constexpr (Rule::kReadsStep)
    set_scalars(rule, h, Counted{{fresh}, step});
  else
    set_scalars(rule, h, Now{fresh});
  std::memcpy(scalars, &rule, sizeof rule);
}

// The scalar state after a step. The caller rounds it to what is stored: the scalars of the step are made of that, so
// that a checkpoint continues with the same bits.
template <class Rule>
PRECOND_INLINE double advanced([[maybe_unused]] const double* hyper, [[maybe_unused]] double step, double scalar) {
  if constexpr (Rule::kScalarStates != 0) {
    typename Rule::Hyper h;
    std::memcpy(&h, hyper, sizeof h);
    return Rule::advance(h, countable(step), scalar);
  } else {
    return scalar;
  }
}

}  // namespace PRECOND_ISA
}  // namespace precond
