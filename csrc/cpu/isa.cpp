// Compiled once per instruction set, with PRECOND_ISA naming it: the update functions of every rule, and
// the norm of a block.
#include <utility>

#include "cpu/kernel.h"
#include "cpu/norm.h"

namespace precond {
inline namespace PRECOND_ISA {

#define PRECOND_UPDATE(name, ...) &update_chunk<__VA_ARGS__>,
extern const UpdateChunk kUpdateTable[];
const UpdateChunk kUpdateTable[] = {PRECOND_ALL_RULES(PRECOND_UPDATE)};
#undef PRECOND_UPDATE

extern const NormOfBlock kNormOfBlock;
const NormOfBlock kNormOfBlock = &norm_of_block;

}  // namespace PRECOND_ISA
}  // namespace precond
