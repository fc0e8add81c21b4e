// The per-instruction-set tables and the registry of rules; see dispatch.h.
#include "cpu/dispatch.h"

#include <stdexcept>

#include "rules/scalars.h"

namespace precond {

// Names of the namespaces that isa.cpp and bnp_isa.cpp were compiled in; CMakeLists.txt lists the same ones.
namespace baseline {
extern const UpdateChunk kUpdateTable[];
extern const NormOfBlock kNormOfBlock;
extern const BnpRow kBnpRow;
}  // namespace baseline
#if defined(PRECOND_X86_ISAS)
namespace avx2 {
extern const UpdateChunk kUpdateTable[];
extern const NormOfBlock kNormOfBlock;
extern const BnpRow kBnpRow;
}  // namespace avx2
namespace avx512 {
extern const UpdateChunk kUpdateTable[];
extern const NormOfBlock kNormOfBlock;
extern const BnpRow kBnpRow;
}  // namespace avx512
#endif

namespace {

struct Isa {
  const char* name;
  bool available;
  const UpdateChunk* table;
  NormOfBlock norm;
  BnpRow bnp;
};

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = [] {
    std::vector<Isa> l{{"baseline", true, baseline::kUpdateTable, baseline::kNormOfBlock, baseline::kBnpRow}};
#if defined(PRECOND_X86_ISAS)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    l.push_back({"avx2", has_avx2, avx2::kUpdateTable, avx2::kNormOfBlock, avx2::kBnpRow});
    l.push_back({"avx512", has_avx512, avx512::kUpdateTable, avx512::kNormOfBlock, avx512::kBnpRow});
#endif
    return l;
  }();
  return list;
}

const Isa* g_selected = nullptr;

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.available) names.push_back(isa.name);
  return names;
}

void select_isa(const std::string& name) {
  const Isa* found = nullptr;
  std::string known;
  for (const Isa& isa : isas()) {
    if (!isa.available) continue;
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
    if (name.empty() || name == isa.name) found = &isa;
  }
  if (found == nullptr)
    throw std::invalid_argument("PRECOND_ISA must be one of " + known + " on this CPU, got " + name);
  g_selected = found;
}

std::string selected_isa() {
  if (g_selected == nullptr) select_isa("");
  return g_selected->name;
}

const UpdateChunk* update_table() {
  if (g_selected == nullptr) select_isa("");
  return g_selected->table;
}

NormOfBlock norm_function() {
  if (g_selected == nullptr) select_isa("");
  return g_selected->norm;
}

BnpRow bnp_function() {
  if (g_selected == nullptr) select_isa("");
  return g_selected->bnp;
}

const std::vector<RuleInfo>& rules() {
#define PRECOND_INFO(name, ...)                                                                                      \
  {name,                                                                                                             \
   __VA_ARGS__::kStates,                                                                                             \
   __VA_ARGS__::kSquares,                                                                                            \
   std::vector<std::string>(std::begin(__VA_ARGS__::Hyper::names), std::end(__VA_ARGS__::Hyper::names)),             \
   [](const double* hyper, double step, bool fresh, float* row) { fill_row<__VA_ARGS__>(hyper, step, fresh, row); }, \
   int(sizeof(__VA_ARGS__) / sizeof(float)),                                                                         \
   #__VA_ARGS__},
  static const std::vector<RuleInfo> list = {PRECOND_ALL_RULES(PRECOND_INFO)};
#undef PRECOND_INFO
  return list;
}

}  // namespace precond
