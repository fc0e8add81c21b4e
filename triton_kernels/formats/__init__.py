"""Formats: how one logical fp32 value lives in memory, as in csrc/formats and under the names of ``_C.formats``."""

from .codes import is_coded
from .storing import BESIDE, NO_AVERAGE, address, as_stored, block_at, decode, draws, is_plain, load, operand, store

__all__ = [
    "BESIDE",
    "NO_AVERAGE",
    "address",
    "as_stored",
    "block_at",
    "decode",
    "draws",
    "is_coded",
    "is_plain",
    "load",
    "operand",
    "store",
]
