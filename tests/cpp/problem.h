// Small AdamW problems for the C++ tests, in buffers of exactly their size.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "scalars.h"

using namespace precond;

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: check failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)

namespace {

int rule_number(const char* name) {
  for (size_t i = 0; i < rules().size(); ++i)
    if (std::string(name) == rules()[i].name) return int(i);
  std::abort();
}

// Exactly as many elements as asked for on the heap, so that the sanitizer sees one element too far.
template <class T>
struct Buffer {
  explicit Buffer(int64_t n) : size(n), data(new T[size_t(n)]) {}
  int64_t size;
  std::unique_ptr<T[]> data;
  char* address() { return reinterpret_cast<char*>(data.get()); }
};

struct Problem {
  Buffer<float> p, g, m, v;
  float step = 0.0f;
  Problem(int64_t n, unsigned seed) : p(n), g(n), m(n), v(n) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) {
      p.data[i] = normal(random);
      g.data[i] = normal(random);
      m.data[i] = v.data[i] = 0.0f;
    }
  }
  Tensor tensor() {
    Tensor t;
    t.rule = rule_number("adamw");
    t.numel = p.size;
    t.p.data = p.address();
    t.g.data = g.address();
    t.state[0].data = m.address();
    t.state[1].data = v.address();
    t.step = &step;
    t.active = true;
    return t;
  }
};

[[maybe_unused]] std::vector<GroupRow> adamw_group() {
  GroupRow row;
  row.rule = rule_number("adamw");
  const double hyper[] = {1e-2, 0.9, 0.999, 1e-8, 0.1, 0.0, 10.0};
  std::copy(std::begin(hyper), std::end(hyper), row.hyper);
  return {row};
}

}  // namespace
