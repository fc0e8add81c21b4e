"""Formats of states and weights: what they are called, what they look like in memory, and how values get in and out."""

from .codec import decode, encode, fill, update, values_of
from .layout import Layout, check, has_remainder, is_half, layout_of, new_codes, new_remainder, takes_codes
from .names import CODED, EMA, GROUP, SECOND_MOMENTS, STATE_FORMATS, WEIGHT_FORMATS, StateFormat, code_format, is_coded
from .old_codes import renew
from .random import seed_of

__all__ = [
    "CODED",
    "EMA",
    "GROUP",
    "SECOND_MOMENTS",
    "STATE_FORMATS",
    "WEIGHT_FORMATS",
    "Layout",
    "StateFormat",
    "check",
    "code_format",
    "decode",
    "encode",
    "fill",
    "has_remainder",
    "is_coded",
    "is_half",
    "layout_of",
    "new_codes",
    "new_remainder",
    "renew",
    "seed_of",
    "takes_codes",
    "update",
    "values_of",
]
