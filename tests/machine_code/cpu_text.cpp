// What the CPU backend makes of a chunk: the bits that a kernel is held to. Scalars and formats are asked of csrc too,
// so that cpu_text.py knows neither.
#include <cstring>
#include <utility>

#include "cpu/kernel.h"
#include "cpu/statistics_isa.cpp"
#include "cpu/tile_isa.cpp"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/dual.h"
#include "rules/gauss_newton.h"
#include "rules/lion.h"
#include "rules/parts.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

using namespace precond;

namespace {

// Hyper-parameters of every rule; those not named are 0.
double hyper_parameter(const char* name) {
  constexpr std::pair<const char*, double> kValues[] = {
      {"lr", 1e-3},       {"weight_decay", 0.1},    {"l1_decay", 1e-3},     {"l1_cap", 1e-3},  {"beta1", 0.9},
      {"beta2", 0.99},    {"alpha", 0.99},          {"eps", 1e-8},          {"momentum", 0.9}, {"dampening", 0.1},
      {"lookahead", 0.5}, {"scale", 0.5},           {"exponent", 0.3},      {"clip", 1.0},     {"corrected", 1.0},
      {"ema_decay", 0.9}, {"cautious_update", 1.0}, {"cautious_decay", 1.0}};
  for (const auto& [key, value] : kValues)
    if (std::strcmp(key, name) == 0) return value;
  return 0.0;
}

template <class Hyper>
double* put(double* at) {
  for (const char* name : Hyper::names) *at++ = hyper_parameter(name);
  return at;
}
template <class Rule>
void fill(double step, float* scalars) {
  double hyper[kMaxHyper] = {};
  if constexpr (kHasParts<Rule>)
    put<PartsHyper>(put<decltype(Rule::Hyper::rule)>(hyper));
  else
    put<typename Rule::Hyper>(hyper);
  fill_scalars<Rule>(hyper, step, step == 1.0, 0.0f, scalars);
}

struct RuleFunctions {
  const char* name;
  void (*fill)(double step, float* scalars);
  void (*update)(const ChunkArgs&);
};
// Those that kernels.cu and listed.py ask for. All would take minutes to compile.
#define RULE(name, ...) {name, &fill<__VA_ARGS__>, &update_chunk<__VA_ARGS__>},
constexpr RuleFunctions kRules[] = {RULE("adamw", Adam<L2>)                                              //
                                    RULE("adamw_l1", Adam<L1Proximal<AdaptiveThreshold>>)                //
                                    RULE("adamw_amsgrad", AdamAmsgrad<L2>)                               //
                                    RULE("adamw+ema", WithParts<Adam<L2>, true>)                         //
                                    RULE("adamw+parts", WithParts<Adam<L2>, false>)                      //
                                    RULE("sgd_momentum", SGDMomentum<Coupled>)                           //
                                    RULE("lion", Lion<L2>)                                               //
                                    RULE("adagrad", Adagrad<Coupled>)                                    //
                                    RULE("rmsprop_centered_momentum", RMSpropCenteredMomentum<Coupled>)  //
                                    RULE("dual_power_momentum", DualMomentum<PowerMap, L2>)              //
                                    RULE("gauss_newton_own_root", GaussNewtonOwnRoot<L2>)};

const RuleFunctions* find(const char* name) {
  for (const RuleFunctions& rule : kRules)
    if (std::strcmp(rule.name, name) == 0) return &rule;
  return nullptr;
}

}  // namespace

extern "C" {

int scalar_floats() { return kScalarFloats; }

int format_number(const char* name) {
  for (int k = 0; k < kFormatCount; ++k)
    if (std::strcmp(kFormats[k].name, name) == 0) return k;
  return -1;
}
int bits_of_item(int format) { return item_bits(Format(format)); }
int bits_of_remainder(int format) { return remainder_bits(Format(format)); }
int has_scales(int format) { return is_coded(Format(format)); }

// The scalars of a step, with a seed behind them. False for a rule that is not listed.
bool fill_scalars(const char* rule, double step, const uint32_t* seed, float* scalars) {
  const RuleFunctions* found = find(rule);
  if (found == nullptr) return false;
  found->fill(step, scalars);
  put_seed({seed[0], seed[1]}, scalars);
  return true;
}

// data, beside, formats, strides: of p, g and the states; strides: kDense, or an index of `layouts`. place: begin, row,
// row_step. control: grad_coef, skip, clip_value.
void update(const char* rule, int operands, char* const* data, char* const* beside, const int32_t* formats,
            const int32_t* strides, const Strides* layouts, int64_t numel, int64_t begin, int64_t count,
            const int64_t* place, int draws, float sign, const float* control, const float* scalars) {
  Tensor t;
  Operand* const all[] = {&t.p, &t.g, &t.state[0], &t.state[1], &t.state[2], &t.state[3]};
  for (int k = 0; k < operands; ++k) *all[k] = {data[k], Format(formats[k]), strides[k], beside[k]};
  t.numel = numel;
  t.draws = draws != 0;
  t.place = {place[0], place[1], place[2]};
  const Control of_step{control[0], control[1], control[2]};
  find(rule)->update({&t, layouts, scalars, &of_step, sign, begin, count});
}

}  // extern "C"
