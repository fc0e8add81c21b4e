// The CUDA sources, run on the CPU (tests/cuda_on_host), against the CPU backend: the same bits, and no element outside
// of its tensor. Built with AddressSanitizer and UndefinedBehaviorSanitizer, and once with ThreadSanitizer.
#include <cstring>
#include <set>
#include <stdexcept>

#include "any.h"
#include "base/series.h"
#include "cuda/executor.h"

namespace {

const std::vector<int64_t> kSizes = {0, 1, 3, 4, 255, 1023, 1024, 1025, 8191, 8192, 8193, 20001};

using Formats = std::vector<Format>;
const Format F = Format::fp32, B = Format::bf16, H = Format::fp16;

// One of each number of states, which decides where operands lie.
std::vector<int> rules_of_each_shape() {
  std::vector<int> found;
  std::set<int> shapes;
  for (int rule = 0; rule < int(rules().size()); ++rule)
    if (shapes.insert(rules()[size_t(rule)].states).second) found.push_back(rule);
  return found;
}

void every_rule_and_format_has_the_bits_of_the_cpu() {
  const std::vector<std::pair<std::pair<Format, Format>, Formats>> mixes = {
      {{F, F}, {F}}, {{F, F}, {B}}, {{F, B}, {F}},    {{F, B}, {B}}, {{B, F}, {F}}, {{B, F}, {B}},
      {{B, B}, {F}}, {{B, B}, {B}}, {{F, F}, {B, F}}, {{H, H}, {H}}, {{H, F}, {F}}, {{H, B}, {F}}};
  int turn = 0;
  for (int rule = 0; rule < int(rules().size()); ++rule) {
    ++turn;
    for (const auto& mix : mixes) {
      const int misalign = turn++ % 2;
      Plan cpu, gpu;
      CudaExecutor cuda(0);
      std::vector<std::unique_ptr<Any>> ours, theirs;
      for (size_t i = 0; i < kSizes.size(); ++i) {
        const auto build = [&] {
          return make(rule, kSizes[i], mix.first.first, mix.first.second, mix.second, misalign, unsigned(i));
        };
        ours.push_back(build());
        theirs.push_back(build());
        gpu.add(ours.back()->tensor);
        cpu.add(theirs.back()->tensor);
      }
      for (int step = 0; step < 2; ++step) {
        cuda.run(&gpu, {group_of(rule)}, DeviceStep{});
        run_on_cpu(&cpu, {group_of(rule)}, Control{}, 1);
        CHECK(cuda.launches() == 1);
      }
      for (size_t i = 0; i < kSizes.size(); ++i) {
        CHECK(ours[i]->step == 2.0f);
        CHECK(same_memory(*ours[i], *theirs[i]));
      }
    }
  }
}

// What a state gets where a format of few bits is asked for.
std::vector<Format> coded_states(int rule, Format mean, Format square) {
  std::vector<Format> states;
  for (int k = 0; k < rules()[size_t(rule)].states; ++k)
    states.push_back(rules()[size_t(rule)].squares >> k & 1 ? square : mean);
  if (states.empty()) states = {Format::fp32};
  return states;
}

// Around a run of a thread, a group, a row of threads' runs, a chunk; by turns, since each takes a block, whose threads
// are fibers.
const std::vector<int64_t> kMixedSizes[] = {{0, 7, 9, 64, 500, 2049, 8193}, {1, 8, 63, 65, 2047, 8191}};

void rules_in_every_storage_format_have_the_bits_of_the_cpu() {
  using P = Format;
  const std::vector<Format> weights = {
      P::bf16_split24,    P::fp32,         P::bf16,         P::fp16,        P::bf16_stochastic,
      P::fp16_stochastic, P::bf16_split32, P::fp16_split24, P::fp16_split32};
  const std::vector<std::pair<Format, Format>> states = {{P::int8, P::uint8},
                                                         {P::fp32, P::fp32},
                                                         {P::bf16, P::bf16_stochastic},
                                                         {P::fp16, P::fp16_stochastic},
                                                         {P::int4, P::uint4},
                                                         {P::fp32, P::uint8},
                                                         {P::int4, P::fp32}};
  int turn = 0;
  for (const int rule : rules_of_each_shape()) {
    for (const Format weight : weights) {
      for (const auto& [mean, square] : states) {
        // Every format of one with two of the others; the whole product is left to tests/test_formats_cuda.py.
        if (weight != weights[0] && weight != weights[1] && mean != states[0].first) continue;
        const std::vector<int64_t>& sizes = kMixedSizes[turn++ % 2];
        const std::vector<Format> formats = coded_states(rule, mean, square);
        const int misalign = (int(weight) + int(mean)) % 2;
        Plan cpu, gpu;
        CudaExecutor cuda(0);
        std::vector<std::unique_ptr<Any>> ours, theirs;
        bool mixed = false;
        for (size_t i = 0; i < sizes.size(); ++i) {
          const Format g = weight < P::bf16_stochastic || i % 2 == 0 ? F : B;
          for (auto* side : {&ours, &theirs}) {
            side->push_back(make(rule, sizes[i], weight, g, formats, misalign, unsigned(i)));
            Tensor& t = side->back()->tensor;
            // Cut out of a wider tensor, here and there.
            if (i % 3 == 1) t.place = {int64_t(0xfffffff0), 0, 0};
            if (i % 3 == 2) t.place = {7, is_coded(mean) || is_coded(square) ? kGroup : 13, 400};
            mixed = mixed || t.draws;
            (side == &ours ? gpu : cpu).add(t);
          }
        }
        for (int step = 0; step < 2; ++step) {
          cuda.run(&gpu, {group_of(rule)}, DeviceStep{});
          run_on_cpu(&cpu, {group_of(rule)}, Control{}, 1);
          if (mixed) CHECK(cuda.launches() == 1);
        }
        for (size_t i = 0; i < sizes.size(); ++i) CHECK(same_memory(*ours[i], *theirs[i]));
      }
    }
  }
}

void seeds_on_the_device_are_those_of_the_host() {
  const int rule = rule_number("adamw");
  const auto build = [&] { return make(rule, 3000, Format::bf16_stochastic, B, {Format::int8, Format::uint8}, 0, 5); };
  auto ours = build(), theirs = build();
  ours->tensor.step_on_device = true;
  Plan gpu, cpu;
  gpu.add(ours->tensor);
  cpu.add(theirs->tensor);
  CudaExecutor cuda(0);
  for (int step = 0; step < 6; ++step) {
    const float found_inf = step == 2 ? 1.0f : 0.0f;
    DeviceStep device;
    device.found_inf = &found_inf;
    cuda.run(&gpu, {group_of(rule)}, device);
    if (step != 2) run_on_cpu(&cpu, {group_of(rule)}, Control{}, 1);
    CHECK(same_memory(*ours, *theirs));
  }
  CHECK(ours->step == 5.0f);
}

// On the host, and beside the counter on the device, where a skipped step leaves both as they are.
void scalar_states_advance_with_the_counter() {
  const int rule = rule_number("carrying");
  const GroupRow group = group_of(rule);
  const auto hyper = [&](const char* name) { return group.hyper[hyper_index(rule, name)]; };
  for (const bool on_device : {false, true}) {
    auto ours = make(rule, 3000, F, F, {F}, 0, 2), theirs = make(rule, 3000, F, F, {F}, 0, 2);
    ours->tensor.step_on_device = on_device;
    Plan gpu, cpu;
    gpu.add(ours->tensor);
    cpu.add(theirs->tensor);
    CudaExecutor cuda(0);
    float product = 1.0f;
    for (int step = 1; step < 5; ++step) {
      const float found_inf = 1.0f;
      DeviceStep skipped;
      skipped.found_inf = &found_inf;
      if (on_device) cuda.run(&gpu, {group}, skipped);
      cuda.run(&gpu, {group}, DeviceStep{});
      run_on_cpu(&cpu, {group}, Control{0.0f, 1.0f}, 1);
      run_on_cpu(&cpu, {group}, Control{}, 1);
      CHECK(same_memory(*ours, *theirs));
      product = float(double(product) * hyper("momentum") * (1.0 - 0.5 * integer_power(0.96, uint64_t(step))));
      CHECK(std::abs(theirs->scalar - product) <= 1e-7f * product);
    }
    // What only the device knows cannot advance what the host keeps.
    const double momentum = 0.5;
    GroupRow unknown = group;
    unknown.hyper[hyper_index(rule, "momentum")] = NAN;
    DeviceStep device;
    device.overrides = {{&momentum, 0, hyper_index(rule, "momentum"), 1}};
    if (on_device) {
      cuda.run(&gpu, {unknown}, device);
      CHECK(ours->scalar < product && ours->scalar > 0.0f);
    } else {
      CHECK(fails([&] { cuda.run(&gpu, {unknown}, device); }));
      CHECK(ours->step == 4.0f && ours->scalar == theirs->scalar);
    }
  }
}

void scalars_on_the_device_have_the_bits_of_the_host() {
  const int rule = rule_number("adamw_l1");
  auto ours = make(rule, 5000, F, F, {F}, 0, 1), theirs = make(rule, 5000, F, F, {F}, 0, 1);
  ours->tensor.step_on_device = true;
  Plan gpu, cpu;
  gpu.add(ours->tensor);
  cpu.add(theirs->tensor);
  CudaExecutor cuda(0);
  float lr = 0.0f, found_inf = 0.0f;
  const float scale = 4.0f;
  double weight_decay = 0.25;
  for (int step = 0; step < 6; ++step) {
    lr = 0.01f * float(step + 1);
    found_inf = step == 2 ? 1.0f : 0.0f;
    GroupRow group = group_of(rule);
    group.sign = -1.0f;
    DeviceStep device;
    device.overrides = {{&lr, 0, hyper_index(rule, "lr"), 0}, {&weight_decay, 0, hyper_index(rule, "weight_decay"), 1}};
    device.grad_scale = &scale;
    device.found_inf = &found_inf;
    cuda.run(&gpu, {group}, device);
    CHECK(cuda.launches() == 3);
    if (step == 2) continue;
    group.hyper[hyper_index(rule, "lr")] = double(lr);
    group.hyper[hyper_index(rule, "weight_decay")] = weight_decay;
    run_on_cpu(&cpu, {group}, Control{0.25f, 0.0f}, 1);
  }
  CHECK(ours->step == 5.0f && theirs->step == 5.0f);
  CHECK(same_memory(*ours, *theirs));
  // Back to scalars from the host: nothing of the device's control word may linger.
  gpu.tensor(0).step_on_device = false;
  found_inf = 1.0f;
  DeviceStep skipped;
  skipped.found_inf = &found_inf;
  bool refused = false;
  try {
    cuda.run(&gpu, {group_of(rule)}, skipped);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  CHECK(refused);
  cuda.run(&gpu, {group_of(rule)}, DeviceStep{});
  run_on_cpu(&cpu, {group_of(rule)}, Control{}, 1);
  CHECK(same_memory(*ours, *theirs));
}

void tables_follow_what_changes() {
  const int rule = rule_number("sgd_momentum");
  auto a = make(rule, 3000, F, F, {F}, 0, 1), b = make(rule, 700, F, F, {F}, 0, 2);
  auto c = make(rule, 3000, F, F, {F}, 0, 1), d = make(rule, 700, F, F, {F}, 0, 2);
  Plan gpu, cpu;
  gpu.add(a->tensor);
  gpu.add(b->tensor);
  cpu.add(c->tensor);
  cpu.add(d->tensor);
  CudaExecutor cuda(0);
  Buffer<float> other(3000);
  Buffer<uint16_t> narrow(3000);
  for (int64_t i = 0; i < 3000; ++i) {
    other.data[i] = float(i) / 100.0f;
    narrow.data[i] = Bf16::stored(float(i) / 50.0f);
  }
  for (int step = 0; step < 6; ++step) {
    for (Plan* plan : {&gpu, &cpu}) {
      if (step == 2) plan->tensor(0).g.data = other.address();
      if (step == 3) plan->tensor(0).g = {narrow.address(), Format::bf16, kDense};
      plan->tensor(1).active = step != 1 && step != 4;
    }
    cuda.run(&gpu, {group_of(rule)}, DeviceStep{});
    run_on_cpu(&cpu, {group_of(rule)}, Control{}, 1);
    CHECK(cuda.launches() == (step < 3 ? 1 : 2));
  }
  CHECK(a->step == 6.0f && b->step == 4.0f);
  CHECK(same_memory(*a, *c) && same_memory(*b, *d));
}

void strided_operands_go_through_the_general_kernel() {
  const int64_t n = 2100;
  const int rule = rule_number("adamw");
  auto dense = make(rule, n, F, F, {F}, 0, 4), other = make(rule, n, F, F, {F}, 0, 4);
  Buffer<float> wide(3 * n);
  for (int64_t i = 0; i < 3 * n; ++i) wide.data[i] = -7.0f;
  for (int64_t i = 0; i < n; ++i) std::memcpy(&wide.data[3 * i], dense->tensor.p.data + 4 * i, 4);
  Plan cpu, gpu;
  cpu.add(dense->tensor);
  Tensor t = other->tensor;
  const int64_t shape[] = {7, 300}, strides[] = {3, 21};
  Strides merged;
  CHECK(make_strides(storage_order(shape, strides, 2), shape, strides, &merged));
  t.p.data = wide.address();
  t.p.strides = gpu.add_strides(merged);
  gpu.add(t);
  CudaExecutor cuda(0);
  for (int step = 0; step < 2; ++step) {
    cuda.run(&gpu, {group_of(rule)}, DeviceStep{});
    run_on_cpu(&cpu, {group_of(rule)}, Control{}, 1);
  }
  for (int64_t i = 0; i < n; ++i) {
    CHECK(std::memcmp(&wide.data[3 * i], dense->tensor.p.data + 4 * i, 4) == 0);
    CHECK(wide.data[3 * i + 1] == -7.0f && wide.data[3 * i + 2] == -7.0f);
  }
}

// p, g and plain states at every third element, codes and remainders dense.
void strided_weights_and_gradients_of_every_format() {
  const int64_t n = 2100;
  const int rule = rule_number("adamw");
  const int64_t shape[] = {7, 300}, strides[] = {3, 21};
  Strides merged;
  CHECK(make_strides(storage_order(shape, strides, 2), shape, strides, &merged));
  for (const Format weight : {Format::fp32, Format::fp16_stochastic, Format::bf16_split24, Format::bf16_split32}) {
    for (const Format mean : {Format::int8, Format::int4, Format::bf16}) {
      const std::vector<Format> states = {mean, mean == Format::int4 ? Format::uint4 : Format::bf16_stochastic};
      auto dense = make(rule, n, weight, B, states, 0, 4), other = make(rule, n, weight, B, states, 0, 4);
      Plan cpu, gpu;
      cpu.add(dense->tensor);
      Tensor t = other->tensor;
      std::vector<std::pair<Operand*, int64_t>> spread = {{&t.p, weight == Format::fp32 ? 4 : 2}, {&t.g, 2}};
      if (mean == Format::bf16) spread.insert(spread.end(), {{&t.state[0], 2}, {&t.state[1], 2}});
      std::vector<Buffer<char>> wide;
      for (const auto& [o, size] : spread) {
        wide.emplace_back(3 * n * size);
        std::memset(wide.back().address(), 0x5a, size_t(3 * n * size));
        for (int64_t i = 0; i < n; ++i)
          std::memcpy(wide.back().address() + 3 * size * i, o->data + size * i, size_t(size));
        o->data = wide.back().address();
        o->strides = gpu.add_strides(merged);
      }
      gpu.add(t);
      CudaExecutor cuda(0);
      for (int step = 0; step < 3; ++step) {
        cuda.run(&gpu, {group_of(rule)}, DeviceStep{});
        run_on_cpu(&cpu, {group_of(rule)}, Control{}, 1);
      }
      const Tensor& d = dense->tensor;
      const Operand* const expected[] = {&d.p, &d.g, &d.state[0], &d.state[1]};
      for (size_t k = 0; k < spread.size(); ++k) {
        const int64_t size = spread[k].second;
        for (int64_t i = 0; i < n; ++i) {
          CHECK(std::memcmp(wide[k].address() + 3 * size * i, expected[k]->data + size * i, size_t(size)) == 0);
          for (int64_t b = size; b < 3 * size; ++b) CHECK(wide[k].address()[3 * size * i + b] == 0x5a);
        }
      }
      if (mean != Format::bf16) {
        const int64_t bytes = mean == Format::int8 ? n : n / 2;
        CHECK(std::memcmp(t.state[0].data, d.state[0].data, size_t(bytes)) == 0);
        CHECK(std::memcmp(t.state[0].beside, d.state[0].beside, size_t((n + kGroup - 1) / kGroup * 2)) == 0);
      }
    }
  }
}

void norms_and_clipped_steps_have_the_bits_of_the_cpu() {
  const int rule = rule_number("adamw");
  for (const Format format : {F, B, H}) {
    for (int inf : {0, 1}) {
      Plan gpu, cpu;
      CudaExecutor cuda(0);
      std::vector<std::unique_ptr<Any>> ours, theirs;
      for (size_t i = 0; i < kSizes.size(); ++i) {
        for (auto* all : {&ours, &theirs}) {
          all->push_back(make(rule, kSizes[i], F, format, {F}, int(i % 2), unsigned(i)));
          Tensor& t = all->back()->tensor;
          t.norm_class = int32_t(i % 2);
          t.active = i != 3;
          (all == &ours ? gpu : cpu).add(t);
        }
      }
      Buffer<double> a(2), b(2);
      Clip clip;
      clip.inf = inf;
      clip.classes = 2;
      DeviceStep step;
      step.clip = clip;
      step.clip.total = a.data.get();
      clip.total = b.data.get();
      cuda.norm(gpu, {group_of(rule)}, step);
      measure_on_cpu(cpu, clip, 2);
      CHECK(std::memcmp(a.data.get(), b.data.get(), 16) == 0 && a.data[0] > 0.0 && a.data[1] > 0.0);

      for (int64_t i = 0; i < gpu.size(); ++i) gpu.tensor(i).norm_class = cpu.tensor(i).norm_class = 0;
      for (int k = 0; k < 2; ++k) {
        float norm[2], coef[2];
        int64_t skipped[2] = {0, 0};
        step.clip.classes = clip.classes = 1;
        step.clip.measure = 1;
        step.clip.max_norm = clip.max_norm = 0.5f;
        step.clip.grad_norm = norm, clip.grad_norm = norm + 1;
        step.clip.clip_coef = coef, clip.clip_coef = coef + 1;
        step.clip.skipped = skipped, clip.skipped = skipped + 1;
        step.clip_value = 1e-3f;
        cuda.run(&gpu, {group_of(rule)}, step);
        CHECK(cuda.launches() == 5);
        measure_on_cpu(cpu, clip, 1);
        Control control{1.0f, 0.0f, 1e-3f};
        finish(clip, &control);
        run_on_cpu(&cpu, {group_of(rule)}, control, 1);
        CHECK(norm[0] == norm[1] && coef[0] == coef[1] && coef[0] < 1.0f && skipped[0] == 0);
      }
      for (size_t i = 0; i < kSizes.size(); ++i) CHECK(same_memory(*ours[i], *theirs[i]));
    }
  }
}

// With factors on updates, which a first pass does not write; of a tensor without a gradient all sums are 0.
void statistics_have_the_bits_of_the_cpu() {
  const std::vector<std::pair<Format, std::vector<Format>>> formats = {
      {F, {F, F}}, {Format::bf16_split24, {Format::int8, Format::uint8}}};
  for (const char* name : {"adamw+parts", "adamw+ema", "sgd+parts"}) {
    const int rule = rule_number(name);
    for (auto [weight, states] : formats) {
      states.resize(size_t(std::max(rules()[size_t(rule)].states, 1)), B);
      Plan cpu, gpu;
      CudaExecutor cuda(0);
      std::vector<std::unique_ptr<Any>> ours, theirs, before;
      for (size_t i = 0; i < kSizes.size(); ++i) {
        for (auto* side : {&ours, &theirs, &before})
          side->push_back(make(rule, kSizes[i], weight, F, states, int(i % 2), unsigned(i)));
        for (auto* side : {&ours, &theirs}) {
          Tensor& t = (*side)[i]->tensor;
          t.number = int32_t(kSizes.size() - 1 - i);
          t.active = i != 7;
          (side == &ours ? gpu : cpu).add(t);
        }
      }
      const int64_t count = int64_t(kSizes.size() * kStatistics);
      Buffer<double> on_device(count), on_host(count);
      Buffer<float> factors(int64_t(kSizes.size()));
      for (int64_t i = 0; i < factors.size; ++i) factors.data[i] = 1.0f + 0.125f * float(i);
      for (const bool only : {true, false}) {
        DeviceStep step;
        step.extras = {on_device.data.get(), factors.data.get(), only};
        cuda.run(&gpu, {group_of(rule)}, step);
        CHECK(cuda.launches() == 4);  // two for the scalars, one for all tensors, one for their sums
        run_on_cpu(&cpu, {group_of(rule)}, Control{}, 1, {on_host.data.get(), factors.data.get(), only});
        CHECK(std::memcmp(on_device.data.get(), on_host.data.get(), size_t(count) * sizeof(double)) == 0);
        for (size_t i = 0; i < kSizes.size(); ++i) {
          const double elements = on_host.data[(kSizes.size() - 1 - i) * kStatistics + kElements];
          CHECK(elements == (i == 7 ? 0.0 : double(kSizes[i])));
          CHECK(same_memory(*ours[i], *theirs[i]));
          if (only) CHECK(same_memory(*ours[i], *before[i]) && ours[i]->step == before[i]->step);
        }
      }
    }
  }
}

}  // namespace

int main() {
#define RUN(test) (test(), std::printf("passed %s\n", #test))
  RUN(every_rule_and_format_has_the_bits_of_the_cpu);
  RUN(rules_in_every_storage_format_have_the_bits_of_the_cpu);
  RUN(seeds_on_the_device_are_those_of_the_host);
  RUN(scalar_states_advance_with_the_counter);
  RUN(strided_weights_and_gradients_of_every_format);
  RUN(scalars_on_the_device_have_the_bits_of_the_host);
  RUN(tables_follow_what_changes);
  RUN(strided_operands_go_through_the_general_kernel);
  RUN(norms_and_clipped_steps_have_the_bits_of_the_cpu);
  RUN(statistics_have_the_bits_of_the_cpu);
  std::puts("all passed");
}
