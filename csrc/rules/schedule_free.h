// Schedule-free AdamW and SGD, for ScheduleFreeAdamW and ScheduleFreeSGD.
#pragma once

#include "base/series.h"
#include "rules/decays.h"
#include "rules/rule.h"

namespace precond {
inline namespace PRECOND_ISA {

// base^exponent for a normal base > 0 and 0 < exponent < 1, within 1e-14: exp(exponent log(base)), base = m 2^k with m
// in [sqrt(1/2), sqrt(2)), as series that end with errors below 1e-17.
PRECOND_INLINE double fraction_power(double base, double exponent) {
  constexpr double ln2 = 0x1.62e42fefa39efp-1, log2_e = 0x1.71547652b82fep0;
  int64_t bits;
  std::memcpy(&bits, &base, sizeof bits);
  const int64_t k = (bits - 0x3fe6a09e667f3bcd) >> 52;  // the bits of sqrt(1/2)
  bits -= k * (int64_t(1) << 52);
  double m;
  std::memcpy(&m, &bits, sizeof m);
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double log = 0.0;
  for (int i = 12; i >= 0; --i) log = log * z + 1.0 / double(2 * i + 1);
  const double y = exponent * (double(k) * ln2 + 2.0 * s * log), n = ::floor(y * log2_e + 0.5), x = y - n * ln2;
  double exp = 1.0;
  for (int i = 14; i >= 1; --i) exp = exp * x / double(i) + 1.0;
  bits = (int64_t(n) + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return exp * scale;
}

// base^exponent for base >= 0 and exponent >= 0; what is too small to be normal counts as 0 in a fraction of a power.
PRECOND_INLINE double power(double base, double exponent) {
  const double whole = ::floor(exponent), rest = exponent - whole;
  const double power_of_whole = integer_power(base, uint64_t(whole));
  if (!(rest > 0.0)) return power_of_whole;
  const bool normal = base >= 0x1p-1022 && base <= 0x1.fffffffffffffp1023;
  return power_of_whole * (normal ? fraction_power(base, rest) : (base < 0x1p-1022 ? 0.0 : base));
}

struct ScheduleFreeHyper {
  // beta1 is SGD's momentum; lr_max the largest lr so far.
  double lr, weight_decay, beta1, warmup_steps, r, weight_lr_power, lr_max;
  static constexpr const char* names[] = {"lr", "weight_decay",    "beta1", "warmup_steps",
                                          "r",  "weight_lr_power", "lr_max"};

  PRECOND_INLINE double warm(double step) const { return step < warmup_steps ? step / warmup_steps : 1.0; }
  // What z counts in the average x.
  PRECOND_INLINE double weight(double step) const {
    return power(step, r) * power(lr_max * warm(step), weight_lr_power);
  }
};

// Defazio et al. 2024, arXiv 2405.15682, algorithm 1, with x written by y, which p is, and z. The scalar state is the
// sum of all weights. z starts as p: a state that no step has made has no value yet.
struct ScheduleFreeSGD {
  using Hyper = ScheduleFreeHyper;
  static constexpr int kStates = 1, kSquares = 0, kScalarStates = 1;
  static constexpr bool kReadsStep = true;
  float lr, pull, rate, first;
  Coupled decay;

  PRECOND_INLINE static double advance(const ScheduleFreeHyper& h, double step, double weight_sum) {
    return weight_sum + h.weight(step);
  }
  // `direction` without decay. An infinite p stays what it is: inf - inf is NaN.
  PRECOND_INLINE Moved moved(float p, float direction, float& z) const {
    const float from = first != 0.0f ? p : z;
    const bool finite = is_finite(p);
    const float d = decay.gradient(finite ? p : 0.0f, direction);
    z = from - lr * d;
    const float added = fma(-rate, d, pull * (finite ? from - p : 0.0f));
    return {p + added, -added};
  }
  PRECOND_INLINE Moved operator()(float p, float g, float& z) const { return moved(p, g, z); }
};

struct ScheduleFreeAdamWHyper : ScheduleFreeHyper {
  double beta2, eps;
  static constexpr const char* names[] = {"lr",     "weight_decay", "beta1", "warmup_steps", "r", "weight_lr_power",
                                          "lr_max", "beta2",        "eps"};
};

// Algorithm 2 there: the gradient divided by the root of its second moment, with decay at y.
struct ScheduleFreeAdamW : ScheduleFreeSGD {
  using Hyper = ScheduleFreeAdamWHyper;
  static constexpr int kStates = 2, kSquares = 0b10;
  float beta2, one_minus_beta2, inv_sqrt_bias2, eps;

  PRECOND_INLINE Moved operator()(float p, float g, float& z, float& v) const {
    v = fma(one_minus_beta2 * g, g, beta2 * v);
    return moved(p, g / fma(sqrt(v), inv_sqrt_bias2, eps), z);
  }
};

PRECOND_INLINE void set_scalars(ScheduleFreeSGD& rule, const ScheduleFreeHyper& h, Carried now) {
  const double lr = h.lr * h.warm(now.step);
  const double pull = now.scalar > 0.0 ? h.weight(now.step) / now.scalar : 0.0;
  rule.lr = float(lr);
  rule.pull = float(pull);
  rule.rate = float(lr * (1.0 - h.beta1 * (1.0 - pull)));
  rule.first = now.fresh || now.step <= 1.0 ? 1.0f : 0.0f;
  set_scalars(rule.decay, h, lr);
}
PRECOND_INLINE void set_scalars(ScheduleFreeAdamW& rule, const ScheduleFreeAdamWHyper& h, Carried now) {
  set_scalars(static_cast<ScheduleFreeSGD&>(rule), h, now);
  rule.beta2 = float(h.beta2);
  rule.one_minus_beta2 = float(1.0 - h.beta2);
  rule.inv_sqrt_bias2 = float(1.0 / ::sqrt(1.0 - integer_power(h.beta2, uint64_t(now.step))));
  rule.eps = float(h.eps);
}

#define PRECOND_RULES_schedule_free(RULE)        \
  RULE("schedule_free_adamw", ScheduleFreeAdamW) \
  RULE("schedule_free_sgd", ScheduleFreeSGD)

}  // namespace PRECOND_ISA
}  // namespace precond
