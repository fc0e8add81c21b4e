// What a format keeps of an element, and so which functions its struct has.
#pragma once

#include <cstdint>

namespace precond {

enum class Storing {
  alone,      // value(stored), stored(x)
  drawn,      // rounded stochastically: value(stored), stored(x, draw)
  remainder,  // what the stored value lacks beside it: value(stored, remainder), split(x, draw)
  codes,      // codes and a scale per group: unit(scale), value(code, unit), group(top), code(x, group, draw)
};

// What elements are in memory: the dtypes of operands, of the codes, scales and remainders beside them, and of step
// counters.
enum class Storage : int32_t { none, fp32, bf16, fp16, int8, uint8, fp64, int32, int64 };

}  // namespace precond
