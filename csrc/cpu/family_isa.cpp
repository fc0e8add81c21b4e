// Compiled once per family of rules and instruction set, with PRECOND_FAMILY and PRECOND_ISA naming them: the update
// functions of its rules, in the order of its table.
#include "cpu/kernel.h"
#include "rules/family.h"

namespace precond {
inline namespace PRECOND_ISA {
namespace PRECOND_FAMILY {

#define PRECOND_UPDATE(name, ...) &update_chunk<__VA_ARGS__>,
#define PRECOND_MASKS(name, ...) &update_chunk<WithMasks<__VA_ARGS__>>,
#define PRECOND_AVERAGE(name, ...) &update_chunk<WithAverage<__VA_ARGS__>>,
extern const UpdateChunk kUpdates[];
const UpdateChunk kUpdates[] = {PRECOND_RULES_AND_PARTS(PRECOND_UPDATE, PRECOND_MASKS, PRECOND_AVERAGE)};
#undef PRECOND_UPDATE
#undef PRECOND_MASKS
#undef PRECOND_AVERAGE

}  // namespace PRECOND_FAMILY
}  // namespace PRECOND_ISA
}  // namespace precond
