"""Tensors for tests: shapes around every boundary, layouts, sentinels, values, bits."""

from __future__ import annotations

import dataclasses
import math
import os

import torch

#: The compiled backend under test; tests/test_cuda_on_host.py runs the suites again with another one.
BACKEND = os.environ.get("PRECOND_BACKEND", "cpu")
SENTINEL = 12345.0
PAD = 32  # elements before and after

# Around vector widths (4, 8, 16), the alignment of chunks (256) and a tile (512).
SIZES = [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257, 511, 512, 513, 1025]
# Around a chunk.
CHUNK_SIZES = [32767, 32768, 32769, 70001]
LAYOUTS = ["contiguous", "offset", "transposed", "channels_last", "strided"]
GRADIENT_LAYOUTS = ["same", "contiguous", "transposed", "expanded", "strided"]


def memory(t: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes on the host, with one payload for every NaN."""
    t = t.detach().cpu().contiguous()
    t = torch.view_as_real(t) if t.is_complex() else t
    if t.is_floating_point():
        t = torch.where(t.isnan(), torch.full_like(t, torch.nan), t)
    return t.view(-1).view(torch.uint8)


@dataclasses.dataclass
class Guarded:
    """A tensor inside a larger buffer whose margins are checked afterwards."""

    tensor: torch.Tensor
    buffer: torch.Tensor
    inside: torch.Tensor  # flat mask of the buffer: elements of the tensor

    def check(self) -> None:
        outside = self.buffer[~self.inside]
        assert torch.equal(outside, torch.full_like(outside, SENTINEL)), "wrote outside of its tensor"


def guarded(values: torch.Tensor, layout: str) -> Guarded:
    """A copy of ``values`` in memory of the given layout, with sentinels around and between."""
    shape = values.shape
    if layout == "transposed" and values.dim() >= 2:
        order = list(reversed(range(values.dim())))
    elif layout == "channels_last" and values.dim() == 4:
        order = [0, 2, 3, 1]
    else:
        order = list(range(values.dim()))
    gap = 2 if layout == "strided" else 1
    strides = [0] * values.dim()
    stride = gap
    for d in reversed(order):
        strides[d] = stride
        stride *= max(shape[d], 1)
    pad = PAD + (1 if layout == "offset" else 0)
    buffer = torch.full((2 * pad + gap * values.numel() + gap,), SENTINEL, dtype=values.dtype)
    tensor = buffer.as_strided(shape, strides, pad)
    tensor.copy_(values)
    inside = torch.zeros(buffer.numel(), dtype=torch.bool)
    inside.as_strided(shape, strides, pad).fill_(True)
    return Guarded(tensor, buffer, inside)


def gradient(values: torch.Tensor, layout: str, p: torch.Tensor) -> torch.Tensor:
    """A gradient with the given values (its first row everywhere when expanded) and layout."""
    if layout == "expanded":
        if values.dim() == 0 or values.numel() == 0:
            return values
        return values[:1].expand(values.shape)
    if layout == "same":
        return torch.empty_strided(p.shape, p.stride(), dtype=values.dtype).copy_(values) if p.numel() else values
    return guarded(values, layout).tensor


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, any NaN like any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nan_a, nan_b = torch.isnan(a), torch.isnan(b)
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(integer) == b.contiguous().view(integer)
    return bool((same | (nan_a & nan_b)).all()) and torch.equal(nan_a, nan_b)


def random_values(shape, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal values over several magnitudes."""
    values = torch.randn(shape) * torch.exp2(torch.randint(-6, 3, torch.Size(shape)).float())
    return (scale * values).to(dtype)


def nasty_values(n: int) -> torch.Tensor:
    """Random values with zeros, denormals, infinities and NaNs mixed in."""
    values = random_values((n,))
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-42, 3e38, -3e38, math.inf, -math.inf, math.nan, 1e-20, 1e19])
    where = torch.rand(n) < 0.3
    values[where] = special[torch.randint(len(special), (int(where.sum()),))]
    return values
