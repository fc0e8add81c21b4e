"""Times of one large tensor (``speed``) or of many small ones (``small``): the CUDA backend beside torch's own optimizers.

The cases of ``python -m bench gpu``, in fewer rounds and without Triton and other libraries, whatever parity said: what a card
can tell within a minute. The numbers to publish are those of ``bench gpu``.
"""

from __future__ import annotations

import argparse
import functools
import re
import warnings

import torch
from kit import CUDA
from results import finish, say

import precond
from bench import gpu, timing


def chosen(part: str, scale: float, only: str = "") -> list[gpu.Case]:
    """One tensor or many; without what only other libraries are compared in."""
    cases = [case for case in gpu.cases(scale, CUDA.name) if not gpu.PEERS.keys() <= case.contenders.keys()]
    for case in cases:
        case.contenders = {
            who: make for who, make in case.contenders.items() if who == "precond cuda" or who.startswith("torch")
        }
    return [case for case in cases if (len(case.shapes) == 1) == (part == "speed") and re.search(only, case.name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("speed", "small"))
    parser.add_argument("--seconds", type=float, default=100, help="after which no case is begun (default 100)")
    parser.add_argument("--scale", type=float, default=1.0, help="of a billion elements (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--only", metavar="REGEX", default="", help="only the cases whose name matches")
    asked = parser.parse_args()
    warnings.simplefilter("ignore", precond.PrecisionWarning)
    clock = timing.Clock(CUDA.name)
    copy = gpu.copy_bandwidth(clock, CUDA.name, int(5e8 * asked.scale) + 1024)
    if asked.part == "speed":
        say(what="copy", gb_per_s=copy)

    def measure(case: gpu.Case) -> bool:
        found = gpu.run_case(case, clock, CUDA.name, asked.rounds, copy, {})
        if clock.gpu:
            torch.cuda.empty_cache()
        for who, row in found["contenders"].items():
            say(what=asked.part, case=case.name, who=who, elements=found["elements"], tensors=found["tensors"], **row)
        # torch has no fused Adagrad on a GPU, say: that is not ours to mend.
        return not any("error" in row for who, row in found["contenders"].items() if who.startswith("precond"))

    todo = {case.name: functools.partial(measure, case) for case in chosen(asked.part, asked.scale, asked.only)}
    finish(asked.part, f"cases timed, copy {copy:.0f} GB/s", todo, asked.seconds)


if __name__ == "__main__":
    main()
