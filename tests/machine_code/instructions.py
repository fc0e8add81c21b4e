"""From a line of SASS to what the emulator executes."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple


class Operand(NamedTuple):
    """``-|R7|.H1`` has minus, magnitude, part ``H1`` and text ``R7``."""

    minus: bool
    inverted: bool
    magnitude: bool
    part: str  # a byte or a half: B0 to B3, H0, H1, or ""
    text: str  # what is left: R7, UR4, RZ, c[0x0][0x210], 0x1f, 1.5


class Instruction(NamedTuple):
    """``@!P0 LDG.E.128 R4, desc[UR4][R2.64]``, taken apart."""

    predicate: str  # "P0", "!P0", or "" for none
    op: str  # as it is printed, with its modifiers
    name: str  # without them, and without the U of the uniform data path
    mods: frozenset[str]
    operands: list[str]

    def __str__(self) -> str:
        return f"{self.op} {', '.join(self.operands)}"


@functools.cache
def parse(text: str) -> Operand:
    minus = text.startswith("-") and not re.match(r"-(0x|\d|INF|QNAN)", text)
    text = text[minus:]
    inverted = text.startswith("~")
    text = text[inverted:]
    magnitude = text.startswith("|")
    text = text.strip("|")
    found = re.match(r"(U?R\d+|U?RZ)\.(B\d|H\d)(_H\d)?$", text)
    return Operand(minus, inverted, magnitude, found[2] if found else "", found[1] if found else text)


def decode(text: str) -> Instruction:
    predicate = ""
    if found := re.match(r"@(!?U?P[\dT]+)\s+(.*)", text):
        predicate, text = found[1], found[2]
    op, _, rest = text.partition(" ")
    operands = [x.strip().replace(".reuse", "") for x in re.split(r",(?![^\[]*\])", rest)] if rest else []
    name, *mods = op.split(".")
    name = name[1:] if name.startswith("U") else name
    return Instruction(predicate, op, name, frozenset(mods), operands)


def only(known: bool, i: Instruction) -> None:
    """A use of an instruction that no kernel has had yet is not guessed at."""
    if not known:
        raise NotImplementedError(str(i))


def is_predicate(text: str) -> bool:
    return re.match(r"!?U?P[\dT]", text) is not None
