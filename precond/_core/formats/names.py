"""What a state or a weight can be stored in: the names of formats, and the numbers they share with csrc/formats/."""

from __future__ import annotations

import torch

#: Elements that share a scale.
GROUP = 64

#: States that are a mean or a sum of squares.
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg", "curvature"})

CODED = ("int8", "int4")
WEIGHT_FORMATS = ("stochastic", "split24", "split32")
#: Formats that are a dtype.
PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: The largest code of each format that has codes; without a sign for second moments, whose root they hold.
LEVELS = {"int8": 127, "uint8": 255, "int4": 7, "uint4": 15}
#: What ``state_format`` takes: dtypes, and formats with codes.
STATE_FORMATS: dict[str | torch.dtype, torch.dtype | str] = {
    name: dtype for dtype, short in PLAIN.items() for name in (short, dtype)
}
STATE_FORMATS |= {"int8": "int8", torch.int8: "int8", "int4": "int4"}


def code_format(name: str, state_format: str) -> str:
    """The format of a state's codes: second moments are stored as their roots, without a sign."""
    return "u" + state_format if name in SECOND_MOMENTS else state_format
