"""Random words, csrc/base/random.h: one for each element, from a key, the step and the element's place. Eight share a hash."""

from __future__ import annotations

import torch
from torch import Tensor

M32 = 0xFFFFFFFF
_M64 = (1 << 64) - 1


def seed_of(key: int, step: int) -> tuple[int, int]:
    """The two halves of a hash of key and step."""
    z = (key + (step + 1) * 0x9E3779B97F4A7C15) & _M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _M64
    z ^= z >> 31
    return z & M32, z >> 32


#: Elements that share a hash, from a multiple of as many on in the unsharded tensor, and what each multiplies it with.
ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09)


def random_words(key: int, step: int, place: tuple[int, int, int], shape: torch.Size, device: torch.device) -> Tensor:
    """A word of 32 bits, as int64, for each element."""
    a, b = seed_of(key, step)
    begin, row, row_step = place
    i = torch.arange(shape.numel(), dtype=torch.int64, device=device)
    index = begin + (i if row == 0 else i // row * row_step + i % row)
    run = index // len(ODD)
    x = ((run & M32) + a) & M32
    x = x ^ (x >> 16)
    x = _times(x, 0x7FEB352D)
    x = x ^ ((b + (run >> 32) * 0x9E3779B9) & M32)
    x = x ^ (x >> 15)
    x = _times(x, 0x846CA68B)
    odd = torch.tensor(ODD, dtype=torch.int64, device=device)[index % len(ODD)]
    return _times(x ^ (x >> 16), odd).view(shape)


def _times(x: Tensor, factor: int | Tensor) -> Tensor:
    """x * factor modulo 2^32, in halves: the whole product of two words may not fit into an int64."""
    low, high = factor & 0xFFFF, factor >> 16
    return (x * low + (((x * high) & 0xFFFF) << 16)) & M32


def draw_of(words: Tensor | None, operand: int) -> Tensor | int:
    """16 bits of an operand; without words, half."""
    if words is None:
        return 0x8000
    word = words if operand < 2 else _times(words, 0x01000193 if operand < 4 else 0x5BD1E995)
    return (word >> (8 if operand in (1, 2) else 16)) & 0xFFFF


def fraction(draw: Tensor | int, bits: int) -> Tensor | float:
    """The first so many bits of a draw as a number in [0, 1): float32, whatever torch divides integers into by default."""
    first = draw >> (16 - bits)
    wide: Tensor | float = first.float() if isinstance(first, Tensor) else first
    return wide / (1 << bits)
