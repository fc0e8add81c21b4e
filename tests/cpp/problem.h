// Small AdamW problems for the C++ tests, in buffers of exactly their size.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "rules/registry.h"

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

// Where a rule's hyper-parameter of this name is.
[[maybe_unused]] int hyper_index(int rule, const std::string& name) {
  const auto& names = rules()[size_t(rule)].hyper;
  return int(std::find(names.begin(), names.end(), name) - names.begin());
}

[[maybe_unused]] GroupRow group_of(int rule) {
  const std::map<std::string, double> values = {
      {"lr", 1e-2},       {"weight_decay", 0.1}, {"l1_decay", 0.3},  {"l1_cap", 10.0},         {"beta1", 0.9},
      {"beta2", 0.999},   {"eps", 1e-8},         {"lr_decay", 0.1},  {"alpha", 0.9},           {"momentum", 0.9},
      {"dampening", 0.2}, {"ema_decay", 0.9},    {"ema_start", 0.0}, {"cautious_update", 1.0}, {"cautious_decay", 1.0}};
  GroupRow row;
  row.rule = rule;
  double* next = row.hyper;
  for (const std::string& name : rules()[size_t(rule)].hyper) *next++ = values.at(name);
  return row;
}

[[maybe_unused]] std::vector<GroupRow> adamw_group() { return {group_of(rule_number("adamw"))}; }

}  // namespace
