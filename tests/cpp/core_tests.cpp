// The compiled core without Python: layouts, formats, chunks, the control word and the parallel run. Built with
// sanitizers by tests/test_cpp.py and by `make sanitize`. Prints one line per test; exits non-zero on the first
// failure. Over 400 lines: one program, since each sanitizer and arm64 link and run it.
#include <cmath>
#include <stdexcept>

#include "base/series.h"
#include "problem.h"

namespace {

void chunks_are_aligned_and_cover_every_element() {
  for (int64_t chunk : {0, 1, 256, 300, 1 << 15}) {
    Plan plan(chunk);
    std::vector<int64_t> sizes = {0, 1, 255, 256, 257, 5000, 0, 70001};
    for (int64_t n : sizes) {
      Tensor t;
      t.numel = n;
      plan.add(t);
    }
    for (const bool all : {true, false, true}) {
      for (int64_t i = 0; i < plan.size(); ++i) plan.tensor(i).active = all || i % 3 == 2;
      std::vector<int64_t> covered(sizes.size(), 0);
      for (const Chunk& c : plan.chunks(2)) {
        CHECK(c.begin % kChunkAlign == 0);
        CHECK(c.begin == covered[size_t(c.tensor)]);
        CHECK(c.count > 0);
        covered[size_t(c.tensor)] += c.count;
      }
      for (size_t i = 0; i < sizes.size(); ++i) CHECK(covered[i] == (plan.tensor(int64_t(i)).active ? sizes[i] : 0));
    }
  }
}

void runs_agree_for_any_chunk_threads_and_isa() {
  const std::vector<int64_t> sizes = {1, 17, 256, 1000, 40000};
  std::vector<float> expected;
  for (const std::string& isa : available_isas()) {
    select_isa(isa);
    for (int64_t chunk : {256, 1024, 1 << 20}) {
      for (int threads : {1, 2, 5}) {
        std::vector<std::unique_ptr<Problem>> problems;
        Plan plan(chunk);
        for (size_t i = 0; i < sizes.size(); ++i) {
          problems.push_back(std::make_unique<Problem>(sizes[i], unsigned(i)));
          plan.add(problems.back()->tensor());
        }
        for (int k = 0; k < 3; ++k) run_on_cpu(&plan, adamw_group(), Control{}, threads);
        std::vector<float> result;
        for (const auto& problem : problems) {
          CHECK(problem->step == 3.0f);
          result.insert(result.end(), problem->p.data.get(), problem->p.data.get() + problem->p.size);
        }
        if (expected.empty()) expected = result;
        CHECK(std::memcmp(expected.data(), result.data(), result.size() * sizeof(float)) == 0);
      }
    }
  }
  select_isa("");
}

void the_skip_flag_changes_nothing() {
  Problem problem(3000, 1), untouched(3000, 1);
  Plan plan;
  plan.add(problem.tensor());
  plan.tensor(0).fresh = true;
  Control control;
  control.skip = 1.0f;
  run_on_cpu(&plan, adamw_group(), control, 2);
  CHECK(problem.step == 0.0f);
  CHECK(plan.tensor(0).fresh);
  CHECK(std::memcmp(problem.p.data.get(), untouched.p.data.get(), 3000 * sizeof(float)) == 0);
  CHECK(std::memcmp(problem.m.data.get(), untouched.m.data.get(), 3000 * sizeof(float)) == 0);
  run_on_cpu(&plan, adamw_group(), Control{}, 2);
  CHECK(problem.step == 1.0f);
  CHECK(!plan.tensor(0).fresh);
  CHECK(std::memcmp(problem.p.data.get(), untouched.p.data.get(), 3000 * sizeof(float)) != 0);
}

void the_gradient_coefficient_scales_the_gradient() {
  Problem scaled(3000, 1), plain(3000, 1);
  for (int64_t i = 0; i < 3000; ++i) plain.g.data[i] *= -0.25f;
  Plan a, b;
  a.add(scaled.tensor());
  b.add(plain.tensor());
  Control control;
  control.grad_coef = 0.25f;
  auto group = adamw_group();
  group[0].sign = -1.0f;
  run_on_cpu(&a, group, control, 1);
  run_on_cpu(&b, adamw_group(), Control{}, 1);
  CHECK(std::memcmp(scaled.p.data.get(), plain.p.data.get(), 3000 * sizeof(float)) == 0);
  CHECK(std::memcmp(scaled.v.data.get(), plain.v.data.get(), 3000 * sizeof(float)) == 0);
}

void inactive_and_empty_tensors_are_left_alone() {
  Problem idle(500, 2), empty(0, 3), busy(500, 2), untouched(500, 2);
  Plan plan;
  plan.add(idle.tensor());
  plan.add(empty.tensor());
  plan.add(busy.tensor());
  plan.tensor(0).active = false;
  run_on_cpu(&plan, adamw_group(), Control{}, 2);
  CHECK(idle.step == 0.0f && empty.step == 1.0f && busy.step == 1.0f);
  CHECK(std::memcmp(idle.p.data.get(), untouched.p.data.get(), 500 * sizeof(float)) == 0);
  CHECK(std::memcmp(busy.p.data.get(), untouched.p.data.get(), 500 * sizeof(float)) != 0);
}

void strided_operands_match_dense_ones() {
  // p is a transposed 7 x 300 view with a gap of 3 elements; everything else dense in p's storage order.
  const int64_t rows = 7, cols = 300, n = rows * cols;
  Problem dense(n, 4);
  Buffer<float> wide(3 * n);
  for (int64_t i = 0; i < 3 * n; ++i) wide.data[i] = -7.0f;
  const int64_t shape[] = {rows, cols}, strides[] = {3, 3 * rows};
  const Order order = storage_order(shape, strides, 2);
  CHECK(order.ndim == 2 && order.dim[0] == 1 && order.dim[1] == 0);
  CHECK(!is_dense(order, shape, strides));
  Strides merged;
  CHECK(make_strides(order, shape, strides, &merged));
  CHECK(merged.ndim == 1 && merged.size[0] == n && merged.stride[0] == 3);
  for (int64_t i = 0; i < n; ++i) wide.data[3 * i] = dense.p.data[i];

  Problem other(n, 4);
  Plan a(256), b(256);
  a.add(dense.tensor());
  Tensor t = other.tensor();
  t.p.data = wide.address();
  t.p.strides = b.add_strides(merged);
  b.add(t);
  run_on_cpu(&a, adamw_group(), Control{}, 2);
  run_on_cpu(&b, adamw_group(), Control{}, 2);
  for (int64_t i = 0; i < n; ++i) {
    CHECK(wide.data[3 * i] == dense.p.data[i]);
    CHECK(wide.data[3 * i + 1] == -7.0f && wide.data[3 * i + 2] == -7.0f);
  }
}

void strides_gather_and_scatter_any_range() {
  const int64_t shape[] = {3, 1, 4, 5}, strides[] = {1, 77, 40, 7};
  const Order order = storage_order(shape, strides, 4);
  Strides s;
  CHECK(make_strides(order, shape, strides, &s));
  Buffer<uint16_t> memory(3 * 40 + 4 * 7 + 3);
  for (int64_t i = 0; i < memory.size; ++i) memory.data[i] = uint16_t(i);
  for (int64_t begin : {0, 1, 13, 59}) {
    const int64_t n = 60 - begin;
    Buffer<uint16_t> flat(n);
    copy_strided<true>(s, memory.data.get(), begin, n, flat.data.get());
    for (int64_t i = 0; i < n; ++i) {
      // Order: dimension 2 (stride 40), 3 (stride 7), 0 (stride 1).
      const int64_t e = begin + i;
      CHECK(flat.data[i] == e / 15 * 40 + e / 3 % 5 * 7 + e % 3);
    }
    for (int64_t i = 0; i < n; ++i) flat.data[i] = uint16_t(flat.data[i] + 1000);
    copy_strided<false>(s, memory.data.get(), begin, n, flat.data.get());
    for (int64_t i = 0; i < n; ++i) flat.data[i] = uint16_t(flat.data[i] - 1000);
    copy_strided<false>(s, memory.data.get(), begin, n, flat.data.get());
  }
  for (int64_t i = 0; i < memory.size; ++i) CHECK(memory.data[i] == uint16_t(i));
}

void every_bf16_value_survives_decode_and_encode() {
  for (uint32_t u = 0; u < 1 << 16; ++u) {
    const float x = Bf16::value(uint16_t(u));
    CHECK(Bf16::stored(x) == (std::isnan(x) ? 0x7fc0 : u));
  }
}

void bf16_rounds_to_nearest_even() {
  for (uint32_t u = 0; u < 0xff800000u; u += 9973) {
    const float x = float_of(u);
    if (std::isnan(x)) continue;
    const uint16_t stored = Bf16::stored(x);
    const float low = float_of(u & 0xffff0000u), high = float_of((u & 0xffff0000u) + 0x10000u);
    const float got = float_of(uint32_t(stored) << 16);
    const double below = std::fabs(double(x) - double(low)), above = std::fabs(double(high) - double(x));
    if (std::isinf(high) && !std::isinf(x)) continue;  // the distance to infinity has no meaning
    CHECK(below < above ? got == low : above < below ? got == high : (stored & 1) == 0);
  }
}

bool thorough = false;

// Of every exponent and both signs: each upper half of a float with what a remainder begins and ends with, ties among
// them; and mantissas a prime step apart, more of the first exponents, the last and some in between, or all of those.
template <class F>
void for_many_floats(F&& f) {
  const uint32_t few = 4093, many = thorough ? 1 : 61;
  for (uint32_t exponent = 0; exponent < 256; ++exponent) {
    const uint32_t step = exponent == 0 || exponent == 1 || exponent % 50 == 13 || exponent >= 254 ? many : few;
    for (uint32_t sign : {0u, 0x80000000u}) {
      for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += step) f(float_of(sign | exponent << 23 | mantissa));
      for (uint32_t upper = 0; upper < 1u << 23; upper += 1u << 16)
        for (uint32_t lower : {0x1u, 0x7fu, 0x80u, 0x81u, 0xffu, 0x100u, 0x7f80u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu})
          f(float_of(sign | exponent << 23 | upper | lower));
    }
  }
}

void split32_is_fp32() {
  for_many_floats([](float x) {
    const auto [p, p_remainder] = Bf16Split32::split(x, 0);
    const float back = Bf16Split32::value(p, p_remainder);
    // What rounds to an infinite bf16 is infinite, whatever the remainder.
    const float expected = std::isfinite(x) && std::isinf(Bf16::value(p)) ? std::copysign(HUGE_VALF, x) : x;
    CHECK(std::isnan(x) ? std::isnan(back) : bits_of(back) == bits_of(expected));
    // The parameter alone is the nearest bf16; a tie may go away from zero.
    const double error = std::fabs(double(Bf16::value(p)) - x),
                 least = std::fabs(double(Bf16::value(Bf16::stored(x))) - x);
    CHECK(!std::isfinite(x) || std::isinf(Bf16::value(p)) || error == least);
    const auto [h, h_remainder] = Fp16Split32::split(x, 0xffff);
    const float half = Fp16Split32::value(h, h_remainder);
    CHECK(h == Fp16::stored(x));
    const float size = std::fabs(x);
    if (size >= 0x1p-14f && size < 65504.0f) CHECK(bits_of(half) == bits_of(x));
    // 2^-38, and 2^-49 more just below 2^-25, which rounds to 0.
    if (size < 0x1p-14f) CHECK(std::fabs(half - x) <= 0x1.002p-38f);
    if (size >= 65520.0f) CHECK(std::isinf(half) && (half > 0) == (x > 0));
    if (std::isnan(x)) CHECK(std::isnan(half));
  });
}

void split24_is_within_its_bound() {
  for (const uint32_t draw : {0u, 0x7fffu, 0xffffu}) {
    for_many_floats([draw](float x) {
      const auto [p, p_remainder] = Bf16Split24::split(x, draw);
      const float back = Bf16Split24::value(p, p_remainder);
      if (!std::isfinite(x)) CHECK(std::isnan(x) ? std::isnan(back) : back == x);
      if (std::isfinite(x) && std::isfinite(back))
        CHECK(std::fabs(double(back) - x) < std::max(std::fabs(x) * 0x1p-15, 0x1p-141));
      const bool overflows = std::isfinite(x) && std::isinf(Bf16::value(p));
      if (overflows) CHECK(std::isinf(back) && (back > 0) == (x > 0));
      if ((bits_of(x) & 0xff) == 0 && !std::isnan(x) && !overflows) CHECK(bits_of(back) == bits_of(x));
      const auto [h, h_remainder] = Fp16Split24::split(x, draw);
      const float half = Fp16Split24::value(h, h_remainder);
      if (std::fabs(x) < 65504.0f) CHECK(std::fabs(double(half) - x) <= std::max(std::fabs(x) * 0x1p-17, 0x1p-32));
    });
  }
}

// Up or down, in the mean where it was, and nothing happens to what the format has.
template <class F, class Plain>
void rounds_stochastically() {
  for_many_floats([](float x) {
    if (std::isnan(x) || std::fabs(x) > 65000.0f) return;
    const float low = Plain::value(F::stored(x, 0)), high = Plain::value(F::stored(x, 0xffff));
    CHECK(std::fabs(low) <= std::fabs(x) && std::fabs(high) >= std::fabs(low));
    if (low != x) return;
    CHECK(bits_of(high) == bits_of(x));
  });
  const float x = 1.0f + 0x1p-12f;
  double mean = 0;
  for (uint32_t draw = 0; draw < 1 << 16; ++draw) mean += Plain::value(F::stored(x, draw)) / 65536.0;
  CHECK(std::fabs(mean - x) < 1e-9);
  CHECK(std::isnan(Plain::value(F::stored(NAN, 0xffff))) && std::isinf(Plain::value(F::stored(INFINITY, 0xffff))));
}

template <class F>
void codes_keep_what_they_must() {
  const auto top = [](float x) { return bits_of(x) & 0x7fffffffu; };
  for (float largest : {1e-44f, 1e-37f, 1e-30f, 1e-8f, 0.7f, 1.0f, 12345.0f, 3e38f}) {
    const Group group = F::group(top(largest));
    const float scale = -float_of(group.scale << 16), unit = F::unit(group.scale);
    // Below 0, which tells it from one of version 0.1.
    CHECK(group.scale >> 15 == 1 && unit > 0.0f);
    CHECK(scale >= largest * 0.999998f && (scale <= 1.01f * largest || scale <= 0x1p-117f));
    CHECK(F::code(0.0f, group, 0xffff00) == 0 && F::value(0, unit) == 0.0f);
    CHECK(F::value(F::code(-0.0f, group, 0xffff00), unit) == 0.0f);
    const auto value = [unit](uint32_t code) { return double(F::value(code, unit)); };
    // Where decoding makes no denormals, which have fewer digits.
    const bool normal = scale > 0x1p-100f;
    uint32_t last = 0;
    for (int k = 0; k <= 1000; ++k) {
      const float x = largest * (float(k) / 1000.0f);
      for (uint32_t draw : {0u, 0x8000u, 0xffffu}) {
        const uint32_t code = F::code(x, group, draw << 8);
        CHECK(code <= F::kMost && (F::kSign != 0 || x == 0.0f || code >= 1));
        if (F::kSign != 0) CHECK(F::code(-x, group, draw << 8) == (code | F::kSign));
        if (F::kSign != 0) CHECK(F::value(code | F::kSign, unit) == -F::value(code, unit));
        if (draw == 0x8000u) {
          CHECK(code >= last);
          last = code;
        }
      }
      // Neighbours bracket the value, and the nearest is within half a step.
      const uint32_t low = F::code(x, group, 0), high = F::code(x, group, 0xffff00), near = F::code(x, group, 0x800000);
      CHECK(high == low || high == low + 1);
      if (!normal) continue;
      const bool least = F::kSign == 0 && low == 1 && x < value(1);
      CHECK(least || value(low) <= x * 1.000001);
      if (low < F::kMost) CHECK(value(low + 1) >= x * 0.999999);
      const double step = value(low < F::kMost ? low + 1 : low) - value(low < F::kMost ? low : low - 1);
      CHECK(least || std::fabs(value(near) - x) <= 0.5001 * step);
    }
    // A code survives, whatever the draw: nothing drifts, and no scale creeps up.
    for (uint32_t code = 0; code <= F::kMost && normal; ++code) {
      for (uint32_t draw : {0x1000u, 0x8000u, 0xf000u}) CHECK(F::code(F::value(code, unit), group, draw << 8) == code);
      if (code == F::kMost) CHECK(F::group(top(F::value(code, unit))).scale == group.scale);
    }
  }
  for (float bad : {float(INFINITY), float(NAN), 3.4e38f}) {
    const Group group = F::group(top(bad));
    CHECK(group.scale == 0xffc0u && F::code(bad, group, 0xffff00) == 0 && F::code(-1.0f, group, 0) == 0 &&
          std::isnan(F::value(0, F::unit(group.scale))));
  }
  // A new state is zeros, its scales too.
  CHECK(F::value(0, F::unit(0)) == 0.0f);
}

// The mean of what is decoded is the value: the draw decides by the share of the step that it lies above its code.
template <class F>
void codes_are_exact_in_the_mean() {
  const Group group = F::group(bits_of(1.0f));
  const float unit = F::unit(group.scale);
  for (const float x : {0.003f, 0.02f, 0.11f, 0.347f, 0.61f, 0.98f}) {
    if (F::kSign == 0 && x < F::value(1, unit)) continue;
    double mean = 0;
    for (uint32_t draw = 0; draw < 1 << 16; ++draw) mean += F::value(F::code(x, group, draw << 8), unit) / 65536.0;
    CHECK(std::fabs(mean - x) < 1e-5);
  }
}

// A tensor in one piece and in two, where the numbers of its elements pass 2^32 inside a tile: the same draws.
void pieces_draw_as_the_whole() {
  constexpr int64_t n = 1000, cut = 384, begin = (int64_t(1) << 32) - 700;
  std::vector<uint16_t> values(n, 0x3f80), gradients(n, 0x3f80), whole = values, pieces = values;
  const auto run = [&](std::vector<uint16_t>& p, int64_t from, int64_t count) {
    Tensor t;
    t.rule = rule_number("sgd");
    t.numel = count;
    t.p = {reinterpret_cast<char*>(p.data() + from), Format::bf16_stochastic};
    t.g = {reinterpret_cast<char*>(gradients.data() + from), Format::bf16};
    float step = 0.0f;
    t.step = &step;
    t.active = t.draws = true;
    t.key = 5;
    t.place = {begin + from, 0, 0};
    Plan plan;
    plan.add(t);
    GroupRow group = group_of(t.rule);
    group.hyper[0] = 1e-3;
    run_on_cpu(&plan, {group}, Control{}, 1);
  };
  run(whole, 0, n);
  run(pieces, 0, cut);
  run(pieces, cut, n - cut);
  CHECK(whole == pieces && whole != values);
  int64_t up = 0;
  for (uint16_t p : whole) up += p == 0x3f80;
  CHECK(up > n / 2 && up < n);
}

void hashes_are_even() {
  // Bits, neighbours, steps and keys: every bit is set about half of the time, and no two streams agree.
  const Seed seeds[] = {seed_of(0, 1), seed_of(0, 2), seed_of(1, 1), seed_of(0x123456789abcdefu, 1)};
  for (const Seed a : seeds) {
    int set[32] = {}, changed[32] = {}, same = 0;
    for (uint32_t i = 0; i < 1 << 16; ++i) {
      const uint32_t word = hashed(a, i, 0);
      for (int bit = 0; bit < 32; ++bit) {
        set[bit] += word >> bit & 1;
        changed[bit] += (word ^ hashed(a, i + 1, 0)) >> bit & 1;
      }
      for (const Seed b : seeds) same += word == hashed(b, i, 0);
      same += word == hashed(a, i, 1);
    }
    for (int bit = 0; bit < 32; ++bit) CHECK(std::abs(set[bit] - 32768) < 700 && std::abs(changed[bit] - 32768) < 700);
    CHECK(same < (1 << 16) + 5);
  }
}

#if defined(__aarch64__)
using CompilersHalf = __fp16;
#elif defined(__FLT16_MAX__)
using CompilersHalf = _Float16;
#else
#error "fp16 has no oracle with this compiler: GCC 12 or Clang 15 and newer have _Float16 on x86"
#endif

// The compiler's own conversions, which round to nearest even as the hardware's do.
void fp16_is_the_compilers() {
  const auto half = [](float x) {
    const CompilersHalf rounded = CompilersHalf(x);
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
  };
  for (uint64_t u = 0; u < 1ull << 32; u += thorough ? 997 : 9973) {
    const float x = float_of(uint32_t(u));
    CHECK(Fp16::stored(x) == (std::isnan(x) ? 0x7e00u : half(x)));
  }
  for (uint32_t h = 0; h < 1 << 16; ++h) {
    const float x = Fp16::value(uint16_t(h));
    if (!std::isnan(x)) CHECK(half(x) == h);
    CHECK(std::isnan(x) == ((h & 0x7fffu) > 0x7c00u));
  }
}

void integer_powers_are_products() {
  double product = 1.0;
  for (uint64_t n = 0; n < 200; ++n) {
    CHECK(std::fabs(integer_power(0.999, n) - product) <= 1e-14 * product);
    product *= 0.999;
  }
  CHECK(integer_power(0.0, 0) == 1.0 && integer_power(0.0, 5) == 0.0);
}

void unknown_instruction_sets_are_refused() {
  bool refused = false;
  try {
    select_isa("mmx");
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find("baseline") != std::string::npos;
  }
  CHECK(refused);
  select_isa("");
}

}  // namespace

// With an argument, all mantissas of some exponents: half a minute.
int main(int argc, char**) {
  thorough = argc > 1;
#define RUN(test) (test(), std::printf("passed %s\n", #test))
  RUN(chunks_are_aligned_and_cover_every_element);
  RUN(runs_agree_for_any_chunk_threads_and_isa);
  RUN(the_skip_flag_changes_nothing);
  RUN(the_gradient_coefficient_scales_the_gradient);
  RUN(inactive_and_empty_tensors_are_left_alone);
  RUN(strided_operands_match_dense_ones);
  RUN(strides_gather_and_scatter_any_range);
  RUN(every_bf16_value_survives_decode_and_encode);
  RUN(bf16_rounds_to_nearest_even);
  RUN(split32_is_fp32);
  RUN(split24_is_within_its_bound);
  RUN((rounds_stochastically<Bf16Stochastic, Bf16>));
  RUN((rounds_stochastically<Fp16Stochastic, Fp16>));
  RUN(codes_keep_what_they_must<Int8>);
  RUN(codes_keep_what_they_must<Uint8>);
  RUN(codes_keep_what_they_must<Int4>);
  RUN(codes_keep_what_they_must<Uint4>);
  RUN(codes_are_exact_in_the_mean<Int8>);
  RUN(codes_are_exact_in_the_mean<Uint8>);
  RUN(codes_are_exact_in_the_mean<Int4>);
  RUN(codes_are_exact_in_the_mean<Uint4>);
  RUN(hashes_are_even);
  RUN(pieces_draw_as_the_whole);
  RUN(fp16_is_the_compilers);
  RUN(integer_powers_are_products);
  RUN(unknown_instruction_sets_are_refused);
  std::puts("all passed");
}
