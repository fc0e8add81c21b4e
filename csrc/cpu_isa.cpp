// Compiled once per instruction set, with PRECOND_ISA naming it: the update functions of every rule.
#include <utility>

#include "cpu_kernel.h"

namespace precond {
inline namespace PRECOND_ISA {

#define PRECOND_UPDATE(name, ...) &update_chunk<__VA_ARGS__>,
extern const UpdateChunk kUpdateTable[];
const UpdateChunk kUpdateTable[] = {PRECOND_ALL_RULES(PRECOND_UPDATE)};
#undef PRECOND_UPDATE

}  // namespace PRECOND_ISA
}  // namespace precond
