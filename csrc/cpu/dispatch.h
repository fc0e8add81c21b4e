// Which instruction set runs, chosen at load and changeable for tests.
#pragma once

#include <string>
#include <vector>

#include "cpu/bnp.h"
#include "cpu/norm.h"
#include "cpu/update.h"

namespace precond {

// Instruction sets compiled in that this CPU has, from the plainest to the widest.
std::vector<std::string> available_isas();
// Selects one by name, the widest if the name is empty. Throws std::invalid_argument if it cannot run here.
void select_isa(const std::string& name);
std::string selected_isa();
const UpdateChunk* update_table();  // by number of the rule
NormOfBlock norm_function();
BnpRow bnp_function();

}  // namespace precond
