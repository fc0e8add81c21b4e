"""What a state or a weight can be stored in: the names of formats, and the numbers they share with csrc/formats/."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ... import reference

#: Elements that share a scale.
GROUP = 64

#: States that are a mean or a sum of squares.
SECOND_MOMENTS = frozenset(name for rule in reference.RULES.values() for name in rule.second_moments)

#: The state that has an average of the weights. It moves little at a step, so that 16 bits of it are drawn too.
EMA = "ema"

#: What ``state_format`` may be: a name, the torch dtype that stands for one, or None, the parameter's dtype.
StateFormat = str | torch.dtype | None
WEIGHT_FORMATS = ("stochastic", "split24", "split32")
#: Formats that are a dtype.
PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Law(NamedTuple):
    """What codes of a format mean, as in csrc/formats/codes.h: the upper bits of the float 2 + K y, where y is a magnitude over
    its group's scale.
    """

    #: Bits of that float below a code.
    below: int
    #: The largest code, without a sign: that of 2 + K.
    largest: int
    #: K.
    span: float
    #: 1 / K in float32, rounded to 0: the largest code is not decoded to more than its scale.
    inverse: float


#: The law of each format that has codes. Second moments have no sign.
LAWS = {
    "int8": Law(18, 127, 29.5, float.fromhex("0x1.15b1e4p-5")),
    "uint8": Law(18, 255, 502.0, float.fromhex("0x1.05197ep-9")),
    "int4": Law(22, 7, 22.0, float.fromhex("0x1.745d16p-5")),
    "uint4": Law(22, 15, 382.0, float.fromhex("0x1.571ed2p-9")),
}
#: The largest code of each.
LEVELS = {name: law.largest for name, law in LAWS.items()}
#: Formats that have codes, as ``state_format`` names them.
CODED = tuple(name for name in LEVELS if not name.startswith("u"))
#: What ``state_format`` takes, and what that is: a dtype, or a format that has codes.
STATE_FORMATS: dict[StateFormat, torch.dtype | str] = {
    **{name: dtype for dtype, short in PLAIN.items() for name in (short, dtype)},
    **{name: name for name in CODED},
    torch.int8: "int8",
}


def is_coded(state_format: StateFormat) -> bool:
    """True for a format that has codes, by its name or by its torch dtype."""
    return isinstance(STATE_FORMATS.get(state_format), str)


def code_format(name: str, state_format: str) -> str:
    """The format of a state's codes: those of second moments have no sign."""
    return "u" + state_format if name in SECOND_MOMENTS else state_format
