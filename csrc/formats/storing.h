// What a format keeps of an element, and so which functions it has.
#pragma once

namespace precond {

enum class Storing {
  alone,      // value(stored), stored(x)
  drawn,      // rounded stochastically: value(stored), stored(x, draw)
  remainder,  // what the stored value lacks beside it: value(stored, remainder), split(x, draw)
  codes,      // codes and a scale per group: unit(scale), value(code, unit), group(top), code(x, group, draw)
};

}  // namespace precond
