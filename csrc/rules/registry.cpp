// Puts the families' tables together; see registry.h.
#include "rules/registry.h"

#include "families.h"

namespace precond {

#define PRECOND_TABLE(family)    \
  namespace family {             \
  std::vector<RuleInfo> table(); \
  }
PRECOND_FAMILIES(PRECOND_TABLE)
#undef PRECOND_TABLE

namespace {

struct Registry {
  std::vector<Family> families;
  std::vector<RuleInfo> rules;

  void add(const char* name, const std::vector<RuleInfo>& table) {
    families.push_back({name, int(rules.size()), int(table.size())});
    rules.insert(rules.end(), table.begin(), table.end());
  }
};

const Registry& registry() {
  static const Registry all = [] {
    Registry r;
#define PRECOND_ADD(family) r.add(#family, family::table());
    PRECOND_FAMILIES(PRECOND_ADD)
#undef PRECOND_ADD
    return r;
  }();
  return all;
}

}  // namespace

const std::vector<Family>& families() { return registry().families; }
const std::vector<RuleInfo>& rules() { return registry().rules; }

}  // namespace precond
