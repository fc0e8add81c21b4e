// Prints hashes of what every rule computes, per mix of formats, instruction set and mode of denormals. All hashes of
// one rule and mix must be equal, on every machine: tests/test_arm64.py compares x86 with arm64. Inputs are made from
// integers, in statements whose order is fixed, since normal_distribution and libm differ between machines.
#include <cmath>

#include "problem.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace {

constexpr size_t kElements = 1543;  // three tiles, and a remainder for every vector length
constexpr unsigned kDraws = 4, kSteps = 3;
constexpr Format F = Format::fp32, B = Format::bf16, H = Format::fp16;
constexpr Format kMixes[][3] = {{F, F, F},
                                {B, B, B},
                                {H, H, H},
                                {F, F, B},
                                {B, F, F},
                                {F, B, F},
                                {B, B, F},
                                {H, H, F},
                                {F, H, H},
                                {Format::bf16_split24, B, Format::int8},
                                {Format::bf16_stochastic, B, Format::int4},
                                {Format::bf16_split32, F, Format::bf16_stochastic},
                                {Format::fp16_split32, H, Format::fp16_stochastic},
                                {Format::fp16_split24, H, Format::int8},
                                {Format::fp16_stochastic, H, Format::int4}};
constexpr size_t kSpecialFrom = 9;  // mixes from here on draw

// As torch.set_flush_denormal does.
void flush_denormals(bool on) {
#if defined(__SSE2__)
  _mm_setcsr(on ? _mm_getcsr() | 0x8040u : _mm_getcsr() & ~0x8040u);
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(uint64_t(on) << 24));
#endif
}

// One fp32, or two of 16 bits of which the first is any value at all.
// tame: without infinities, NaN and large numbers, which would make all codes of a group NaN.
std::vector<uint32_t> random_operand(std::mt19937& random, bool tame) {
  std::vector<uint32_t> words(kElements);
  for (uint32_t& word : words) {
    const uint32_t u = uint32_t(random()), sign = u & 0x80000000u, mantissa = u & 0x7fffffu;
    const uint32_t any = random() % 64, kind = tame && any > 0 ? 63 : any;
    const uint32_t exponent = kind == 0 ? 0 : kind < 3 ? 255 : kind < 8 ? u >> 23 & 255 : 117 + (u >> 23) % 15;
    word = sign | exponent << 23 | (kind == 2 ? 0 : mantissa);
  }
  return words;
}

// FNV-1a. In fp32 every NaN counts as one: sign and payload are the machine's.
void add_to_hash(uint64_t& hash, const std::vector<uint32_t>& words, Format format) {
  for (uint32_t word : words) {
    if (format == Format::fp32 && (word & 0x7fffffffu) > 0x7f800000u) word = 0x7fc00000u;
    hash = (hash ^ word) * 0x100000001b3u;
  }
}

// Second moments of a rule have codes of their own.
Format format_of(const RuleInfo& info, size_t state, Format format) {
  if ((info.squares >> state & 1) == 0) return format;
  return format == Format::int8 ? Format::uint8 : format == Format::int4 ? Format::uint4 : format;
}

uint64_t hash_of(size_t rule, Format p_format, Format g_format, Format state_format, bool special) {
  const RuleInfo& info = rules()[rule];
  std::mt19937 random(0);
  uint64_t hash = 0xcbf29ce484222325u;
  for (unsigned draw = 0; draw < kDraws; ++draw) {
    GroupRow group;
    group.rule = int32_t(rule);
    // Log-uniform, down to what is a denormal in fp32, or as near below 1: learning rates, epsilons and betas alike.
    for (size_t k = 0; k < info.hyper.size(); ++k) {
      const double mantissa = 1.0 + double(random() % 1024) / 1024.0;
      const double value = std::ldexp(mantissa, -2 - int(random() % 145));
      group.hyper[k] = random() % 2 == 0 ? value : 1.0 - value;
    }
    std::vector<uint32_t> p = random_operand(random, special), g;
    std::vector<uint32_t> remainder(kElements);
    std::vector<std::vector<uint32_t>> scales(size_t(info.states), std::vector<uint32_t>(kElements / kGroup + 1));
    std::vector<std::vector<uint32_t>> states(size_t(info.states), std::vector<uint32_t>(kElements));
    float step = 0.0f;
    Tensor t;
    t.rule = group.rule;
    t.numel = kElements;
    t.step = &step;
    t.active = t.fresh = true;
    t.p = {reinterpret_cast<char*>(p.data()), p_format};
    t.p.beside = reinterpret_cast<char*>(remainder.data());
    for (size_t k = 0; k < states.size(); ++k) {
      t.state[k] = {reinterpret_cast<char*>(states[k].data()), format_of(info, k, state_format)};
      t.state[k].beside = reinterpret_cast<char*>(scales[k].data());
    }
    t.draws = special;
    t.key = random();
    t.place = {int64_t(random()), 0, 0};
    Plan plan;
    plan.add(t);
    for (unsigned k = 0; k < kSteps; ++k) {
      g = random_operand(random, special);
      plan.tensor(0).g = {reinterpret_cast<char*>(g.data()), g_format};
      run_on_cpu(&plan, {group}, Control{}, 1);
    }
    add_to_hash(hash, p, p_format);
    add_to_hash(hash, remainder, Format::bf16);
    for (const auto& state : states) add_to_hash(hash, state, state_format);
    for (const auto& scale : scales) add_to_hash(hash, scale, Format::bf16);
  }
  return hash;
}

}  // namespace

int main() {
  for (size_t rule = 0; rule < rules().size(); ++rule) {
    int mix = -1;
    for (const auto& [p, g, state] : kMixes) {
      ++mix;
      for (const std::string& isa : available_isas()) {
        select_isa(isa);
        for (bool flush : {false, true}) {
          flush_denormals(flush);
          const uint64_t hash = hash_of(rule, p, g, state, size_t(mix) >= kSpecialFrom);
          flush_denormals(false);
          std::printf("%s mix%d %s%s %016llx\n", rules()[rule].name, mix, isa.c_str(), flush ? "+flush" : "",
                      static_cast<unsigned long long>(hash));
        }
      }
    }
  }
}
