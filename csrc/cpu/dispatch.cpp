// The tables of the instruction sets; see dispatch.h.
#include "cpu/dispatch.h"

#include <stdexcept>

#include "families.h"
#include "rules/registry.h"

namespace precond {

// What the *_isa.cpp were compiled to for one instruction set; CMakeLists.txt names the same ones.
#define PRECOND_UPDATES(family)        \
  namespace family {                   \
  extern const UpdateChunk kUpdates[]; \
  }
#define PRECOND_FIRST(family) family::kUpdates,
#define PRECOND_INSTRUCTION_SET(isa)                                        \
  namespace isa {                                                           \
  PRECOND_FAMILIES(PRECOND_UPDATES)                                         \
  const UpdateChunk* const kFamilies[] = {PRECOND_FAMILIES(PRECOND_FIRST)}; \
  extern const NormOfBlock kNormOfBlock;                                    \
  extern const BnpRow kBnpRow;                                              \
  }
PRECOND_INSTRUCTION_SET(baseline)
#if defined(PRECOND_X86_ISAS)
PRECOND_INSTRUCTION_SET(avx2)
PRECOND_INSTRUCTION_SET(avx512)
#endif

namespace {

struct Isa {
  const char* name;
  bool available;
  std::vector<UpdateChunk> updates;  // by number of the rule
  NormOfBlock norm;
  BnpRow bnp;
};

std::vector<UpdateChunk> by_number(const UpdateChunk* const* of_family) {
  std::vector<UpdateChunk> updates;
  for (const Family& family : families()) {
    updates.insert(updates.end(), *of_family, *of_family + family.count);
    ++of_family;
  }
  return updates;
}

const std::vector<Isa>& isas() {
#define PRECOND_ISA_ENTRY(isa, available)                                       \
  {                                                                             \
    #isa, available, by_number(isa::kFamilies), isa::kNormOfBlock, isa::kBnpRow \
  }
  static const std::vector<Isa> list = [] {
    std::vector<Isa> l{PRECOND_ISA_ENTRY(baseline, true)};
#if defined(PRECOND_X86_ISAS)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    l.push_back(PRECOND_ISA_ENTRY(avx2, has_avx2));
    l.push_back(PRECOND_ISA_ENTRY(avx512, has_avx512));
#endif
    return l;
  }();
#undef PRECOND_ISA_ENTRY
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
  return g_selected->updates.data();
}

NormOfBlock norm_function() {
  if (g_selected == nullptr) select_isa("");
  return g_selected->norm;
}

BnpRow bnp_function() {
  if (g_selected == nullptr) select_isa("");
  return g_selected->bnp;
}

}  // namespace precond
