"""Tensors for tests: shapes around every boundary, layouts, sentinels, and one step compared with the reference."""

from __future__ import annotations

import dataclasses
import math
import os

import torch
from optimizers import Optimizer

from precond import reference
from precond._core.formats import SECOND_MOMENTS

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


def ulp_bound(
    scale: torch.Tensor, exact: torch.Tensor, ulps: float, dtype: torch.dtype, drawn: bool = False
) -> torch.Tensor:
    """``ulps`` fp32 ulp of the operands, plus the rounding of the store: to nearest, or ``drawn``, by up to a whole ulp."""
    fp32 = torch.finfo(torch.float32)
    bound = ulps * fp32.eps * scale + ulps * fp32.smallest_normal * fp32.eps
    if dtype != torch.float32:
        stored = torch.finfo(dtype)
        bound = bound + stored.eps / (1 if drawn else 2) * (1.01 * exact.abs() + 1.01 * stored.smallest_normal)
    return bound


@dataclasses.dataclass
class Snapshot:
    """A parameter before a step, in float64, and what the reference makes of it."""

    p: torch.Tensor
    states: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, p: torch.Tensor, states: list[torch.Tensor]) -> Snapshot:
        return cls(p.detach().double(), tuple(s.double() for s in states))

    def check(self, row: Optimizer, g, hyper, sign, step, fresh, p, states, drawn=()) -> float:
        """Assert that ``p`` and ``states`` are one step from here; return the largest error in ulp of the operands.

        ``drawn``: positions of states that are rounded stochastically.
        """
        rule = reference.RULES[row.rule].update
        g = sign * g.double()
        exact_p, exact_states = rule(self.p, g, self.states, hyper, step, fresh)
        # The same formula on magnitudes: how large its operands are. A coupled decay adds to the gradient.
        plain = {**hyper, "l1_decay": 0.0}
        q, _ = rule(self.p, g, self.states, plain, step, fresh)
        zero = torch.zeros_like(self.p)
        decay = getattr(rule, "keywords", {}).get("decay")
        coupled = hyper["weight_decay"] if decay == "coupled" else 0.0
        scale_g = g.abs() + coupled * self.p.abs()
        # A negative second moment, an estimate of a curvature, counts as none.
        names = reference.RULES[row.rule].states
        sizes = [
            s.clamp(min=0) if name in SECOND_MOMENTS else s.abs() for name, s in zip(names, self.states, strict=True)
        ]
        steps, scales = rule(zero, scale_g, tuple(sizes), plain, step, fresh)
        scale_p = self.p.abs() + steps.abs() + (q - exact_p).abs()
        slack = [torch.zeros_like(self.p) for _ in row.ulps]
        if row.steep:
            few_ulp = row.ulps[0] * torch.finfo(torch.float32).eps
            operands = [(g, scale_g), *((s, s.abs()) for s in self.states)]
            for k, (operand, size) in enumerate(operands):
                for sign_of_error in (-1, 1):
                    near = [o for o, _ in operands]
                    near[k] = operand + sign_of_error * few_ulp * size
                    near_p, near_states = rule(self.p, near[0], tuple(near[1:]), hyper, step, fresh)
                    for room, exact, other in zip(slack, (exact_p, *exact_states), (near_p, *near_states), strict=True):
                        room.copy_(torch.maximum(room, (other - exact).abs()))
        worst = 0.0
        results = [(p, exact_p, scale_p), *zip(states, exact_states, scales, strict=True)]
        for k, ((actual, exact, scale), ulps, room) in enumerate(zip(results, row.ulps, slack, strict=True), -1):
            error = (actual.double() - exact).abs()
            bound = ulp_bound(scale, exact.abs() + room, ulps, actual.dtype, k in drawn) + room
            assert torch.all(error <= bound), (
                f"{row.rule}: error {error.max():.3e} is {(error / bound).max():.2f} times the bound"
            )
            if actual.numel() and actual.dtype == torch.float32:
                worst = max(worst, (error / (torch.finfo(torch.float32).eps * scale + 1e-300)).max().item())
        return worst


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
