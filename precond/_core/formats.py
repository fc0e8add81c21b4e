"""Formats in plain PyTorch: what states and weights look like in memory, for the reference backend, for making states and for
converting them. The same draws as csrc/formats/*.h, element for element.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import sharding as _sharding
from .sharding import like, local

#: Elements that share a scale.
GROUP = 64
#: Below this many elements of the unsharded tensor, and where rows are no multiple of GROUP, states stay in float32.
SMALLEST_CODED = 4096
#: The same for tensors of one dimension: biases and gains stay, a flat buffer of many parameters does not.
SMALLEST_CODED_FLAT = 1 << 20

#: States that are a mean or a sum of squares.
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg", "curvature"})

CODED = ("int8", "int4")
WEIGHT_FORMATS = ("stochastic", "split24", "split32")
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LEVELS = {"int8": 127, "uint8": 255, "int4": 7, "uint4": 15}


class Layout(NamedTuple):
    """How a parameter and its states lie in memory: names of formats, and where elements are in the unsharded tensor."""

    param: str
    states: tuple[str, ...]
    #: First element, elements of a row and from row to row there; a row of 0: all in one stretch.
    place: tuple[int, int, int]

    @property
    def plain(self) -> bool:
        """True where the dtypes say it all."""
        return all(name in _SHORT.values() for name in (self.param, *self.states))

    @property
    def draws(self) -> bool:
        """True where something is rounded stochastically."""
        return any(name not in (*_SHORT.values(), "bf16_split32") for name in (self.param, *self.states))


def is_half(p: Tensor) -> bool:
    """True for parameters that a weight format is for."""
    return p.dtype in (torch.bfloat16, torch.float16)


def takes_codes(p: Tensor) -> bool:
    """True where the states of a parameter can have codes: by its unsharded shape, so on every mesh alike."""
    if p.is_complex():
        return False
    if p.dim() == 1:
        return p.numel() >= SMALLEST_CODED_FLAT and local(p) is p
    return p.dim() > 1 and p.numel() >= SMALLEST_CODED and math.prod(p.shape[1:]) % GROUP == 0


def layout_of(p: Tensor, group: dict[str, Any], state: dict[str, Any], names: tuple[str, ...]) -> Layout:
    """The formats of a parameter and of those states that exist."""
    asked = group.get("state_format")
    found = []
    for name in names:
        value = state.get(name)
        if value is None:
            continue
        if state.get(f"{name}_scale") is not None:
            found.append(code_format(name, "int8" if value.shape == p.shape else "int4"))
        else:
            short = _SHORT.get(value.dtype, "fp32")
            drawn = asked is not None and name in SECOND_MOMENTS and short != "fp32" and not value.is_complex()
            found.append(short + "_stochastic" if drawn else short)
    short = _SHORT.get(p.dtype, "fp32")
    weight_format = group.get("weight_format")
    param = f"{short}_{weight_format}" if weight_format is not None and is_half(p) else short
    layout = Layout(param, tuple(found), (0, 0, 0))
    return layout if layout.plain else layout._replace(place=_sharding.place_of(p))


def code_format(name: str, state_format: str) -> str:
    """The format of a state's codes: second moments are stored as their roots, without a sign."""
    return "u" + state_format if name in SECOND_MOMENTS else state_format


def new_codes(p: Tensor, name: str, state_format: str) -> dict[str, Tensor]:
    """Zeros for a state of a parameter: its codes and their scales."""
    root = name in SECOND_MOMENTS
    if state_format == "int8":
        dtype = torch.uint8 if root else torch.int8
        codes = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False)
    else:
        codes = _sharding.zeros_per_row(p, 2, torch.uint8)
    return {name: codes, f"{name}_scale": _sharding.zeros_per_row(p, GROUP, torch.bfloat16)}


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


def new_remainder(p: Tensor, weight_format: str) -> Tensor:
    """Zeros for what a parameter lacks of its master: a byte each, or two, in a last dimension, since neither NCCL nor gloo
    gathers integers of 16 bits.
    """
    plain = local(p)
    if weight_format == "split24":
        return like(p, torch.zeros(plain.shape, dtype=torch.int8, device=plain.device))
    return like(p, torch.zeros(*plain.shape, 2, dtype=torch.int8, device=plain.device), torch.Size((*p.shape, 2)))


def check(name: str, p: Tensor, state: dict[str, Any], names: tuple[str, ...], layout: Layout) -> None:
    """Raise where codes, scales or a remainder are not what a layout says: a checkpoint can bring anything."""
    n = local(p).numel()
    expected = {}
    if layout.param.endswith(("split24", "split32")):
        expected["remainder"] = torch.int8, n if layout.param.endswith("24") else 2 * n
    for key, form in zip(names, layout.states, strict=True):
        if form in _LEVELS:
            expected[key] = torch.int8 if form == "int8" else torch.uint8, n if form.endswith("8") else (n + 1) // 2
            expected[f"{key}_scale"] = torch.bfloat16, -(-n // GROUP)
    for key, (dtype, count) in expected.items():
        t = local(state[key])
        if (t.dtype, t.numel(), t.device) != (dtype, count, local(p).device) or not t.is_contiguous():
            raise TypeError(
                f"{key} of {name} must have {count} contiguous elements of {dtype} on {p.device}, "
                f"got shape {tuple(t.shape)} with strides {t.stride()} of {t.dtype} on {t.device}"
            )


def has_remainder(state: dict[str, Any], weight_format: str, p: Tensor) -> bool:
    remainder = state.get("remainder")
    shape = p.shape if weight_format == "split24" else (*p.shape, 2)
    return isinstance(remainder, Tensor) and (remainder.dtype, remainder.shape) == (torch.int8, torch.Size(shape))


# Random words, csrc/base/random.h.

_M32 = 0xFFFFFFFF
_M64 = (1 << 64) - 1


def seed_of(key: int, step: int) -> tuple[int, int]:
    """The two halves of a hash of key and step."""
    z = (key + (step + 1) * 0x9E3779B97F4A7C15) & _M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _M64
    z ^= z >> 31
    return z & _M32, z >> 32


def random_words(key: int, step: int, place: tuple[int, int, int], shape: torch.Size, device: torch.device) -> Tensor:
    """A word of 32 bits, as int64, for each element."""
    a, b = seed_of(key, step)
    begin, row, row_step = place
    i = torch.arange(shape.numel(), dtype=torch.int64, device=device)
    index = begin + (i if row == 0 else i // row * row_step + i % row)
    x = ((index & _M32) + a) & _M32
    x = x ^ (x >> 16)
    x = _times(x, 0x7FEB352D)
    x = x ^ ((b + (index >> 32) * 0x9E3779B9) & _M32)
    x = x ^ (x >> 15)
    x = _times(x, 0x846CA68B)
    return (x ^ (x >> 16)).view(shape)


def _times(x: Tensor, factor: int) -> Tensor:
    """x * factor modulo 2^32, in halves: the whole product of two words may not fit into an int64."""
    low, high = factor & 0xFFFF, factor >> 16
    return (x * low + (((x * high) & 0xFFFF) << 16)) & _M32


def draw_of(words: Tensor | None, operand: int) -> Tensor | int:
    """16 bits of an operand; without words, half."""
    return 0x8000 if words is None else (words >> (0, 8, 16, 4)[operand]) & 0xFFFF


# Decoding and encoding. Values are float32, or wider for the reference backend, and of the parameter's shape.


def decode(stored: Tensor, beside: Tensor | None, form: str, shape: torch.Size) -> Tensor:
    """The values of codes and scales, of a split weight, or of a tensor that stands alone."""
    if form in _LEVELS:
        assert beside is not None
        codes = stored.reshape(-1)
        if form.endswith("4"):
            halves = torch.stack([codes & 15, codes >> 4], dim=1).reshape(-1)[: shape.numel()].to(torch.int16)
            codes = halves if form == "uint4" else torch.where(halves > 7, halves - 16, halves)
        scale = beside.reshape(-1).float().repeat_interleave(GROUP)[: shape.numel()]
        y = codes.float() / _LEVELS[form]
        values = (y * scale) ** 2 if form.startswith("u") else y / (2 - y.abs()) * scale
        return values.view(shape)
    if form.endswith(("split24", "split32")):
        assert beside is not None
        if form.startswith("bf16"):
            high = stored.contiguous().view(torch.int16).int() << 16
            low = beside.int() << 8 if form.endswith("24") else _of_bytes(beside).int()
            return (high + low).view(torch.float32)
        value = stored.float()
        if form.endswith("24"):
            return value + beside.float() * (fp16_step(value) / 2**8)
        return value + _of_bytes(beside).float() * (fp16_step(value) / 2**14)
    return stored.float()


def encode(values: Tensor, form: str, words: Tensor | None, operand: int) -> tuple[Tensor, Tensor | None]:
    """What ``decode`` takes: the tensor itself and what lies beside it."""
    draw = draw_of(words, operand)
    if form in _LEVELS:
        return _encode_codes(values, form, draw)
    x = values.float()
    if form in ("bf16_split24", "bf16_split32"):
        bits = torch.where(x.isnan(), 0x7FC00000, x.contiguous().view(torch.int32).long() & _M32)
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
        least = (draw >> (16 - kept)) / 2**kept
        whole = torch.floor(lacking / fp16_step(value) * parts + least)
        whole = whole.clamp(max=largest)
        return rounded, whole.to(torch.int8) if largest == 127 else _bytes_of(whole.to(torch.int16))
    if form == "bf16_stochastic":
        bits = x.contiguous().view(torch.int32).long() & _M32
        return _bf16_of(torch.where(x.isnan(), 0x7FC0, (bits + draw) >> 16)), None
    if form == "fp16_stochastic":
        step = fp16_step(x)
        whole = torch.floor(x.abs() / step + (draw >> 3) / 2**13) * step
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
    _, exponent = torch.frexp(x.float())  # x = m 2^exponent, 1/2 <= m < 1
    return torch.ldexp(torch.ones_like(x, dtype=torch.float32), exponent.clamp(min=-13) - 11)


def _encode_codes(values: Tensor, form: str, draw: Tensor | int) -> tuple[Tensor, Tensor]:
    levels = _LEVELS[form]
    root = form.startswith("u")
    x = values.sqrt().float() if root else values.float()
    n = x.numel()
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -n % GROUP)).view(-1, GROUP)
    bits = flat.view(torch.int32) & 0x7FFFFFFF
    scale = ((bits.amax(dim=1).long() + 0xFFEF) >> 16).clamp(min=0x0380)
    finite = scale < 0x7F80
    scale = torch.where(finite, scale, 0x7FC0)
    y = flat.abs() / _bf16_of(scale).float()[:, None]
    y = torch.where(finite[:, None], y, 0.0).reshape(-1)[:n]
    part = (draw.reshape(-1) if isinstance(draw, Tensor) else draw) / 65536
    if root:
        # The mean of the second moment is exact, not that of its root: y^2 between the squares of two codes.
        y = y * levels
        below = torch.floor(y)
        codes = below + (part * (2 * below + 1) < y**2 - below**2)
        codes = torch.maximum(codes.clamp(max=levels), (y > 0).to(codes.dtype)).to(torch.uint8)
    else:
        codes = torch.floor(2 * y / (1 + y) * levels + part).clamp(max=levels)
        codes = torch.copysign(codes, x.reshape(-1)).to(torch.int8)
    if form.endswith("4"):
        halves = torch.nn.functional.pad(codes.view(torch.uint8) & 15, (0, n % 2)).view(-1, 2)
        return halves[:, 0] | halves[:, 1] << 4, _bf16_of(scale)
    return codes.view(values.shape), _bf16_of(scale)


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
) -> None:
    """The reference backend's step of a parameter with formats: decode, ``reference.update``, encode."""
    plain = local(p)
    remainder = state.get("remainder")
    values = decode(plain, None if remainder is None else local(remainder), layout.param, plain.shape)
    wide = [values if layout.param != "fp32" else plain.clone()]
    wide += [values_of(state, name, form, p) for name, form in zip(names, layout.states, strict=True)]
    g = g.to_dense() if g.is_sparse else g
    reference.update(rule, wide[0], g, wide[1:], hyper, step, fresh, grad_coef, clip_value)
    words = random_words(state["key"], step, layout.place, plain.shape, plain.device) if layout.draws else None
    stored, beside = encode(wide[0], layout.param, words, 0)
    plain.copy_(stored)
    if beside is not None and remainder is not None:
        local(remainder).copy_(beside)
    for operand, (name, form) in enumerate(zip(names, layout.states, strict=True), 1):
        fill(state, name, wide[operand], form, words, operand)
