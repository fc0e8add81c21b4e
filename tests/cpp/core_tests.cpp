// The compiled core without Python: layouts, formats, chunks, the control word and the parallel run. Built with
// sanitizers by tests/test_cpp.py and by `make sanitize`. Prints one line per test; exits non-zero on the first
// failure.
#include <cmath>
#include <stdexcept>

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
    std::vector<int64_t> covered(sizes.size(), 0);
    for (const Chunk& c : plan.chunks(2)) {
      CHECK(c.begin % kChunkAlign == 0);
      CHECK(c.begin == covered[size_t(c.tensor)]);
      CHECK(c.count > 0);
      covered[size_t(c.tensor)] += c.count;
    }
    CHECK(covered == sizes);
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
        for (int k = 0; k < 3; ++k) plan.run(adamw_group(), Control{}, threads);
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
  plan.run(adamw_group(), control, 2);
  CHECK(problem.step == 0.0f);
  CHECK(plan.tensor(0).fresh);
  CHECK(std::memcmp(problem.p.data.get(), untouched.p.data.get(), 3000 * sizeof(float)) == 0);
  CHECK(std::memcmp(problem.m.data.get(), untouched.m.data.get(), 3000 * sizeof(float)) == 0);
  plan.run(adamw_group(), Control{}, 2);
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
  a.run(group, control, 1);
  b.run(adamw_group(), Control{}, 1);
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
  plan.run(adamw_group(), Control{}, 2);
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
  a.run(adamw_group(), Control{}, 2);
  b.run(adamw_group(), Control{}, 2);
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
  Buffer<uint16_t> all(1 << 16), back(1 << 16);
  Buffer<float> values(1 << 16);
  for (int64_t i = 0; i < all.size; ++i) all.data[i] = uint16_t(i);
  decode(Bf16{}, all.data.get(), all.size, values.data.get());
  encode(Bf16{}, values.data.get(), all.size, prepare(Bf16{}, values.data.get(), all.size), back.data.get());
  for (int64_t i = 0; i < all.size; ++i) CHECK(back.data[i] == (std::isnan(values.data[i]) ? 0x7fc0 : all.data[i]));
}

void bf16_rounds_to_nearest_even() {
  for (uint32_t u = 0; u < 0xff800000u; u += 9973) {
    const float x = float_of(u);
    if (std::isnan(x)) continue;
    uint16_t stored;
    encode(Bf16{}, &x, 1, prepare(Bf16{}, &x, 1), &stored);
    const float low = float_of(u & 0xffff0000u), high = float_of((u & 0xffff0000u) + 0x10000u);
    const float got = float_of(uint32_t(stored) << 16);
    const double below = std::fabs(double(x) - double(low)), above = std::fabs(double(high) - double(x));
    if (std::isinf(high) && !std::isinf(x)) continue;  // the distance to infinity has no meaning
    CHECK(below < above ? got == low : above < below ? got == high : (stored & 1) == 0);
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
  for (uint64_t u = 0; u < 1ull << 32; u += 997) {
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

int main() {
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
  RUN(fp16_is_the_compilers);
  RUN(integer_powers_are_products);
  RUN(unknown_instruction_sets_are_refused);
  std::puts("all passed");
}
