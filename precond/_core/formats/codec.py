"""Decoding and encoding in plain PyTorch, for the reference backend and for converting states: the same draws as
csrc/formats/*.h, element for element. Values are float32, or wider for the reference backend, and of the parameter's shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...reference.statistics import Seen
from ..sharding import local
from .layout import Layout
from .names import GROUP, LAWS
from .random import M32, draw_of, fraction, random_words

#: The bits of the float32 2.
_TWO = 0x40000000


def values_of(state: dict[str, Any], name: str, form: str, p: Tensor) -> Tensor:
    """The values of a state of a parameter, of the local shape."""
    scale = state.get(f"{name}_scale")
    return decode(local(state[name]), None if scale is None else local(scale), form, local(p).shape)


def fill(
    state: dict[str, Any], name: str, values: Tensor, form: str, words: Tensor | None = None, operand: int = 0
) -> None:
    """Write values into a state's codes and scales, or into what stands alone."""
    stored, beside = encode(values, form, words, operand)
    local(state[name]).copy_(stored.view(local(state[name]).shape))
    if beside is not None:
        scale = local(state[f"{name}_scale"])
        scale.copy_(beside.view(scale.shape))


def decode(stored: Tensor, beside: Tensor | None, form: str, shape: torch.Size) -> Tensor:
    """The values of codes and scales, of a split weight, or of a tensor that stands alone."""
    if form in LAWS:
        assert beside is not None
        codes = bare_codes(stored, form, shape)
        law = LAWS[form]
        scale = beside.reshape(-1).float().repeat_interleave(GROUP)[: shape.numel()]
        whole = (_TWO + ((codes & law.largest) << law.below)).view(torch.float32)
        values = (whole - 2.0) * (scale * -law.inverse + 0.0)  # a scale is below 0, or a new state's +0
        if not form.startswith("u"):
            values = torch.where(codes > law.largest, -values.abs(), values)
        return values.view(shape)
    if form.endswith(("split24", "split32")):
        assert beside is not None
        if form.startswith("bf16"):
            high = stored.contiguous().view(torch.int16).int() << 16
            low = beside.int() << 8 if form.endswith("24") else _of_bytes(beside).int()
            # A remainder that is not the parameter's leaves it infinite, and does not take a 0 below 0.
            master = (high + low).view(torch.float32)
            return torch.where(stored.isfinite() & ~master.isnan(), master, stored.float())
        value = stored.float()
        if form.endswith("24"):
            return value + beside.float() * (fp16_step(value) / 2**8)
        return value + _of_bytes(beside).float() * (fp16_step(value) / 2**14)
    return stored.float()


def encode(values: Tensor, form: str, words: Tensor | None, operand: int) -> tuple[Tensor, Tensor | None]:
    """What ``decode`` takes: the tensor itself and what lies beside it."""
    draw = draw_of(words, operand)
    if form in LAWS:
        return _encode_codes(values, form, draw)
    x = values.float()
    if form in ("bf16_split24", "bf16_split32"):
        bits = torch.where(x.isnan(), 0x7FC00000, x.contiguous().view(torch.int32).long() & M32)
        if form == "bf16_split32":
            high = (bits + 0x8000) >> 16
            remainder = _bytes_of((bits - (high << 16)).to(torch.int16))
        else:
            master = (bits + (draw >> 8)) >> 8
            high = (master + 0x80) >> 8
            remainder = (master - (high << 8)).to(torch.int8)
        return _bf16_of(high), remainder
    if form in ("fp16_split24", "fp16_split32"):
        rounded = x.half()
        value = rounded.float()
        parts, kept, largest = (2.0**8, 15, 127) if form == "fp16_split24" else (2.0**14, 10, 32767)
        lacking = torch.where(value.isfinite(), x - value, 0.0)
        whole = torch.floor(lacking / fp16_step(value) * parts + fraction(draw, kept))
        whole = whole.clamp(max=largest)
        return rounded, whole.to(torch.int8) if largest == 127 else _bytes_of(whole.to(torch.int16))
    if form == "bf16_stochastic":
        bits = x.contiguous().view(torch.int32).long() & M32
        return _bf16_of(torch.where(x.isnan(), 0x7FC0, (bits + draw) >> 16)), None
    if form == "fp16_stochastic":
        step = fp16_step(x)
        whole = torch.floor(x.abs() / step + fraction(draw, 13)) * step
        return torch.where(x.isfinite(), torch.copysign(whole, x), x).half(), None
    return x, None


def _bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int8).view(*x.shape, 2) if x.dim() else x.view(1).view(torch.int8)


def _of_bytes(x: Tensor) -> Tensor:
    return x.view(torch.int16).view(x.shape[:-1])


def _bf16_of(bits: Tensor) -> Tensor:
    return torch.where(bits > 0x7FFF, bits - 0x10000, bits).to(torch.int16).view(torch.bfloat16)


def fp16_step(x: Tensor) -> Tensor:
    """The distance of float16 numbers around x."""
    _, exponent = torch.frexp(x.float())  # x = m 2^exponent, 1/2 <= m < 1, and 0 of 0
    exponent = torch.where(x == 0, -13, exponent.clamp(min=-13))
    return torch.ldexp(torch.ones_like(x, dtype=torch.float32), exponent - 11)


def bare_codes(stored: Tensor, form: str, shape: torch.Size) -> Tensor:
    """The codes of a tensor of this shape, as int32 in a row: its magnitude, and above it the sign's bit where there is one."""
    codes = stored.reshape(-1).view(torch.uint8)
    if form.endswith("4"):
        codes = torch.stack([codes & 15, codes >> 4], dim=1).reshape(-1)[: shape.numel()]
    return codes.int()


def _encode_codes(values: Tensor, form: str, draw: Tensor | int) -> tuple[Tensor, Tensor]:
    law = LAWS[form]
    x = values.float()
    n = x.numel()
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -n % GROUP)).view(-1, GROUP)
    bits = flat.view(torch.int32).long() & M32
    scale = (((bits & 0x7FFFFFFF).amax(dim=1) + 0xFFFF) >> 16).clamp(min=0x0480)
    finite = scale < 0x7F80
    wide = _bf16_of(scale).float()
    # torch's number / tensor would be a reciprocal and a product.
    per_scale = torch.where(finite, torch.full_like(wide, law.span) / wide, 0.0)
    bits = torch.where(finite[:, None], bits, 0)
    magnitude = torch.where(finite[:, None], flat.abs(), 0.0)
    z = _two_plus(magnitude.double() * per_scale.double()[:, None]).reshape(-1)[:n]
    bits = bits.reshape(-1)[:n]
    draw = draw.reshape(-1) if isinstance(draw, Tensor) else draw
    codes = (z.view(torch.int32).long() + (draw << (law.below - 16)) - _TWO) >> law.below
    if form.startswith("u"):
        codes = torch.maximum(codes, (bits & 0x7FFFFFFF).clamp(max=1))
    else:
        codes = codes | torch.where(bits > 0x7FFFFFFF, law.largest + 1, 0)
    stored = codes.to(torch.uint8)
    # Below 0: what tells these scales from those of version 0.1.
    scale = _bf16_of(torch.where(finite, scale | 0x8000, 0xFFC0))
    if form.endswith("4"):
        halves = torch.nn.functional.pad(stored, (0, n % 2)).view(-1, 2)
        return halves[:, 0] | halves[:, 1] << 4, scale
    return (stored if form == "uint8" else stored.view(torch.int8)).view(values.shape), scale


def _two_plus(product: Tensor) -> Tensor:
    """2 + a float64 that is the exact product of two float32, rounded once, as a fused multiply-add does. The sum is rounded to
    odd first, so that rounding it again to float32 does what rounding the exact one does.
    """
    total = product + 2.0
    lost = product - (total - 2.0)
    bits = total.view(torch.int64)
    return (bits + torch.where(bits % 2 == 0, lost.sign().long(), 0)).view(torch.float64).float()


def update(
    rule: str,
    p: Tensor,
    g: Tensor,
    state: dict[str, Any],
    names: tuple[str, ...],
    layout: Layout,
    hyper: reference.Hyper,
    step: int,
    fresh: bool,
    grad_coef: float,
    clip_value: float,
    measures: str | None = None,
) -> tuple[Seen | None, Tensor]:
    """The reference backend's step of a parameter with formats: decode, ``reference.update``, encode. Returns what that does, and
    the parameter as it is stored.
    """
    plain = local(p)
    remainder = state.get("remainder")
    values = decode(plain, None if remainder is None else local(remainder), layout.param, plain.shape)
    wide = [values if layout.param != "fp32" else plain.clone()]
    wide += [values_of(state, name, form, p) for name, form in zip(names, layout.states, strict=True)]
    g = g.to_dense() if g.is_sparse else g
    seen = reference.update(rule, wide[0], g, wide[1:], hyper, step, fresh, grad_coef, clip_value, measures)
    if measures == "only":
        return seen, wide[0]
    words = random_words(state["key"], step, layout.place, plain.shape, plain.device) if layout.draws else None
    stored, beside = encode(wide[0], layout.param, words, 0)
    plain.copy_(stored)
    if beside is not None and remainder is not None:
        local(remainder).copy_(beside)
    for operand, (name, form) in enumerate(zip(names, layout.states, strict=True), 1):
        fill(state, name, wide[operand], form, words, operand)
    if seen is None:
        return None, wide[0]
    return seen, decode(plain, None if remainder is None else local(remainder), layout.param, plain.shape)
