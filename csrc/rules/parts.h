// Parts that ride along with a rule: what needs just p, g and the states, and so no pass of its own. They are masks on
// the update and on the decay, an average of the weights, and statistics of the step (plan/statistics.h), which loops
// take. A rule with parts is a rule. It applies the decay itself and returns what has become of p. What is on is known
// at run time; where nothing is, the rule itself runs.
#pragma once

#include <type_traits>

#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

struct PartsHyper {
  double ema_decay, ema_start, cautious_update, cautious_decay;  // ema_decay below 0: equal weights; masks: 0 or 1
  static constexpr const char* names[] = {"ema_decay", "ema_start", "cautious_update", "cautious_decay"};
};

// The weight of the new p in the average. The average is p itself up to step ema_start + 1, then it is exponential, or
// the mean of all p since.
PRECOND_INLINE double weight_in_average(const PartsHyper& h, double step) {
  const double averaged = step - h.ema_start;
  if (!(averaged > 1.0)) return 1.0;
  return h.ema_decay < 0.0 ? 1.0 / averaged : 1.0 - h.ema_decay;
}

// x with its sign turned where `by` has one: below 0 where their signs differ.
PRECOND_INLINE float turned(float x, float by) { return float_of(bits_of(x) ^ (bits_of(by) & 0x80000000u)); }

// Scalars that follow those of the rule. `factor`, which updates are multiplied with, is the last: executors put it
// there (plan/statistics.h). A limit is 0 where its mask is on, and a NaN, which nothing is below, where it is off.
// Signs are compared in few operations: a CPU divides while it does the rest, if that is not more.
struct Parts {
  float ema_weight, update_limit, decay_limit, factor;

  // With a weight of 1 it is a copy: the difference would be rounded, and infinite p have none.
  PRECOND_INLINE float averaged(float p, float ema) const {
    const float between = fma(ema_weight, p - ema, ema);
    return ema_weight == 1.0f ? p : between;
  }
  // Liang et al. 2024, arXiv 2411.16085: no update where it does not go down the gradient, which a coupled decay is a
  // part of. A NaN stays.
  PRECOND_INLINE float masked(float direction, float g) const {
    const float none = direction == direction ? 0.0f : direction;
    return turned(g, direction) <= update_limit ? none : direction;
  }
  // Chen et al. 2025, arXiv 2510.12402: no decay where the update goes the other way.
  template <class Decay>
  PRECOND_INLINE Moved stepped(const Decay& decay, float p, float g, Step step) const {
    step.direction = factor * masked(step.direction, decay.gradient(p, g));
    const float plain = step.rate * step.direction;
    // Below 0 where p is on the other side than a direction that is not 0.
    const float side = turned(p, step.direction), size = -magnitude_of(step.direction);
    const float apart = side > size ? side : size;
    const float decayed = decay(p, step), taken = decay.taken(p, step);
    return {apart < decay_limit ? p - plain : decayed, apart < decay_limit ? plain : taken};
  }
};

template <class Rule, class = void>
constexpr bool kDecays = false;
template <class Rule>
constexpr bool kDecays<Rule, std::void_t<decltype(Rule::decay)>> = true;

// kAverages: the last of the states is the average of the weights.
template <class Rule, bool kAverages>
struct WithParts {
  struct Hyper {
    typename Rule::Hyper rule;
    PartsHyper parts;
  };
  static constexpr int kStates = Rule::kStates + int(kAverages), kSquares = Rule::kSquares;
  static constexpr int kScalarStates = Rule::kScalarStates;
  static constexpr bool kMasksOnly = !kAverages;
  static constexpr bool kReadsStep = kAverages || Rule::kReadsStep;
  Rule rule;
  Parts parts;

  PRECOND_INLINE static double advance(const Hyper& h, double step, double scalar) {
    return Rule::advance(h.rule, step, scalar);
  }
  // For a pass over updates alone.
  PRECOND_INLINE void leave_out_decay() {
    if constexpr (kDecays<Rule>) rule.decay.leave_out();
  }
  template <class... S>
  PRECOND_INLINE Moved moved(float p, float g, S&... s) const {
    const auto made = rule(p, g, s...);
    if constexpr (std::is_same_v<decltype(made), const Step>)
      return parts.stepped(rule.decay, p, g, made);
    else if constexpr (std::is_same_v<decltype(made), const Moved>)
      return made;
    else
      return {made, p - made};
  }
  template <class... S>
  PRECOND_INLINE Moved averaged(float p, float g, float& average, S&... s) const {
    const Moved made = moved(p, g, s...);
    average = parts.averaged(made.p, average);
    return made;
  }
  // One for each number of states: loops over an array of them stay scalar.
  PRECOND_INLINE Moved operator()(float p, float g) const { return moved(p, g); }
  PRECOND_INLINE Moved operator()(float p, float g, float& a) const {
    if constexpr (kAverages)
      return averaged(p, g, a);
    else
      return moved(p, g, a);
  }
  PRECOND_INLINE Moved operator()(float p, float g, float& a, float& b) const {
    if constexpr (kAverages)
      return averaged(p, g, b, a);
    else
      return moved(p, g, a, b);
  }
  PRECOND_INLINE Moved operator()(float p, float g, float& a, float& b, float& c) const {
    if constexpr (kAverages)
      return averaged(p, g, c, a, b);
    else
      return moved(p, g, a, b, c);
  }
  PRECOND_INLINE Moved operator()(float p, float g, float& a, float& b, float& c, float& d) const {
    return averaged(p, g, d, a, b, c);
  }
};
template <class Rule, bool kAverages>
constexpr bool kHasParts<WithParts<Rule, kAverages>> = true;
template <class Rule, bool kAverages>
constexpr bool kOftenWithParts<WithParts<Rule, kAverages>> = kOften<Rule>;
template <class Rule>
using WithAverage = WithParts<Rule, true>;
template <class Rule>
using WithMasks = WithParts<Rule, false>;

template <class Rule, bool kAverages, class OfStep>
PRECOND_INLINE void set_scalars(WithParts<Rule, kAverages>& with, const typename WithParts<Rule, kAverages>::Hyper& h,
                                OfStep now) {
  set_scalars(with.rule, h.rule, now);
  if constexpr (kAverages)
    with.parts.ema_weight = float(weight_in_average(h.parts, now.step));
  else
    with.parts.ema_weight = 1.0f;
  with.parts.update_limit = h.parts.cautious_update != 0.0 ? 0.0f : float_of(0x7fc00000u);
  with.parts.decay_limit = h.parts.cautious_decay != 0.0 ? 0.0f : float_of(0x7fc00000u);
  with.parts.factor = 1.0f;
}

}  // namespace PRECOND_ISA
}  // namespace precond
