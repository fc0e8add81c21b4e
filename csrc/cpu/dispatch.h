// Which instruction set runs, chosen at load and changeable for tests; and what the rules are called.
#pragma once

#include <string>
#include <vector>

#include "cpu/bnp.h"
#include "cpu/kernel.h"
#include "cpu/norm.h"

namespace precond {

// Instruction sets compiled in that this CPU has, from the plainest to the widest.
std::vector<std::string> available_isas();
// Selects one by name, the widest if the name is empty. Throws std::invalid_argument if it cannot run here.
void select_isa(const std::string& name);
std::string selected_isa();
const UpdateChunk* update_table();
NormOfBlock norm_function();
BnpRow bnp_function();

struct RuleInfo {
  const char* name;
  int states, squares;
  std::vector<std::string> hyper;
  void (*fill_row)(const double* hyper, double step, bool fresh, float* row);
  int row_floats;
  const char* type;  // of the functor, as it is spelled
};
const std::vector<RuleInfo>& rules();

}  // namespace precond
