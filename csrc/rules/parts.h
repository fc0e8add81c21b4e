// Parts that ride along with a rule: what needs just p, g and the states, and so no pass of its own. They are masks on
// the update and on the decay, and an average of the weights. A rule with parts is a rule. It applies the decay itself
// and returns the new p. What is on is known at run time; where nothing is, the rule itself runs.
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

// Scalars that follow those of the rule. Their masks are selects of numbers: logic of conditions keeps loops scalar.
struct Parts {
  float ema_weight, cautious_update, cautious_decay;

  // With a weight of 1 it is a copy: the difference would be rounded, and infinite p have none.
  PRECOND_INLINE float averaged(float p, float ema) const {
    const float between = fma(ema_weight, p - ema, ema);
    return ema_weight == 1.0f ? p : between;
  }
  // Liang et al. 2024, arXiv 2411.16085, without rescaling: no update where it does not go down the gradient, which a
  // coupled decay is a part of.
  PRECOND_INLINE float masked(float direction, float g) const {
    const float up = g <= 0.0f ? 0.0f : direction, down = g >= 0.0f ? 0.0f : direction;
    const float kept = direction > 0.0f ? up : (direction < 0.0f ? down : direction);
    return cautious_update != 0.0f ? kept : direction;
  }
  // Chen et al. 2025, arXiv 2510.12402: no decay where the update goes the other way.
  template <class Decay>
  PRECOND_INLINE float stepped(const Decay& decay, float p, float g, Step step) const {
    const float direction = masked(step.direction, decay.gradient(p, g)), plain = p - step.rate * direction;
    const float decayed = decay(p, {step.rate, direction, step.den, step.v});
    const float masked_decay = cautious_decay != 0.0f ? plain : decayed;
    const float up = direction < 0.0f ? masked_decay : decayed, down = direction > 0.0f ? masked_decay : decayed;
    return p > 0.0f ? up : (p < 0.0f ? down : decayed);
  }
};

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
  template <class... S>
  PRECOND_INLINE float new_p(float p, float g, S&... s) const {
    const auto made = rule(p, g, s...);
    if constexpr (std::is_same_v<decltype(made), const Step>)
      return parts.stepped(rule.decay, p, g, made);
    else
      return made;
  }
  // One for each number of states: loops over an array of them stay scalar.
  PRECOND_INLINE float operator()(float p, float g) const { return new_p(p, g); }
  PRECOND_INLINE float operator()(float p, float g, float& a) const {
    if constexpr (!kAverages) {
      return new_p(p, g, a);
    } else {
      p = new_p(p, g);
      a = parts.averaged(p, a);
      return p;
    }
  }
  PRECOND_INLINE float operator()(float p, float g, float& a, float& b) const {
    if constexpr (!kAverages) {
      return new_p(p, g, a, b);
    } else {
      p = new_p(p, g, a);
      b = parts.averaged(p, b);
      return p;
    }
  }
  PRECOND_INLINE float operator()(float p, float g, float& a, float& b, float& c) const {
    if constexpr (!kAverages) {
      return new_p(p, g, a, b, c);
    } else {
      p = new_p(p, g, a, b);
      c = parts.averaged(p, c);
      return p;
    }
  }
  PRECOND_INLINE float operator()(float p, float g, float& a, float& b, float& c, float& d) const {
    p = new_p(p, g, a, b, c);
    d = parts.averaged(p, d);
    return p;
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
  with.parts.cautious_update = float(h.parts.cautious_update);
  with.parts.cautious_decay = float(h.parts.cautious_decay);
}

}  // namespace PRECOND_ISA
}  // namespace precond
