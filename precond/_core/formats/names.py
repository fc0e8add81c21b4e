"""What a state or a weight can be stored in: the names of formats, and the numbers they share with csrc/formats/."""

from __future__ import annotations

import torch

from ... import reference

#: Elements that share a scale.
GROUP = 64

#: States that are a mean or a sum of squares.
SECOND_MOMENTS = frozenset(name for rule in reference.RULES.values() for name in rule.second_moments)

#: What ``state_format`` may be: a name, the torch dtype that stands for one, or None, the parameter's dtype.
StateFormat = str | torch.dtype | None
WEIGHT_FORMATS = ("stochastic", "split24", "split32")
#: Formats that are a dtype.
PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: The largest code of each format that has codes; without a sign for second moments, whose root they hold.
LEVELS = {"int8": 127, "uint8": 255, "int4": 7, "uint4": 15}
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
    """The format of a state's codes: second moments are stored as their roots, without a sign."""
    return "u" + state_format if name in SECOND_MOMENTS else state_format
