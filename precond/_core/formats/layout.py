"""How a parameter and its states lie in memory, and making what they need beside themselves."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import sharding
from ..sharding import like, local
from .names import EMA, GROUP, LAWS, PLAIN, SECOND_MOMENTS, code_format

#: Below this many elements of the unsharded tensor, and where rows are no multiple of GROUP, states stay in float32.
SMALLEST_CODED = 4096
#: The same for tensors of one dimension: biases and gains stay, a flat buffer of many parameters does not.
SMALLEST_CODED_FLAT = 1 << 20

#: Scales that were made here or looked at, so that nobody waits for a device to find codes of version 0.1.
KNOWN_SCALES = WeakIdKeyDictionary()

_PLAIN = frozenset(PLAIN.values())
_DRAWS_NOTHING = _PLAIN | {"bf16_split32"}


@functools.cache
def _within(names: frozenset[str], param: str, states: tuple[str, ...]) -> bool:
    """True where all formats are some of these. Plans ask for each parameter, and few combinations occur."""
    return names.issuperset((param, *states))


class Layout(NamedTuple):
    """How a parameter and its states lie in memory: names of formats, and where elements are in the unsharded tensor."""

    param: str
    states: tuple[str, ...]
    #: First element, elements of a row and from row to row there; a row of 0: all in one stretch.
    place: tuple[int, int, int]

    @property
    def plain(self) -> bool:
        """True where the dtypes say it all."""
        return _within(_PLAIN, self.param, self.states)

    @property
    def draws(self) -> bool:
        """True where something is rounded stochastically."""
        return not _within(_DRAWS_NOTHING, self.param, self.states)


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


def layout_of(
    p: Tensor, group: dict[str, Any], state: dict[str, Any], names: tuple[str, ...], name: str = "a parameter"
) -> Layout:
    """The formats of a parameter, which errors call so, and of those states that exist."""
    asked = group.get("state_format")
    found = []
    for key in names:
        value = state.get(key)
        if value is None:
            continue
        if state.get(f"{key}_scale") is not None:
            # Of another shape than its parameter's, int8 codes are still int8's: ``check`` says so.
            whole = value.shape == p.shape or value.dtype == torch.int8
            found.append(code_format(key, "int8" if whole else "int4"))
        else:
            short = PLAIN.get(value.dtype, "fp32")
            drawn = key == EMA or (asked is not None and key in SECOND_MOMENTS)
            drawn = drawn and short != "fp32" and not value.is_complex()
            found.append(short + "_stochastic" if drawn else short)
    short = PLAIN.get(p.dtype, "fp32")
    weight_format = group.get("weight_format")
    param = f"{short}_{weight_format}" if weight_format is not None and is_half(p) else short
    layout = Layout(param, tuple(found), (0, 0, 0))
    return layout if layout.plain else layout._replace(place=sharding.place_of(p, name))


def new_codes(p: Tensor, key: str, state_format: str, name: str = "a parameter") -> dict[str, Tensor]:
    """Zeros for a state of a parameter, which errors call so: its codes and their scales."""
    if state_format == "int8":
        dtype = torch.uint8 if key in SECOND_MOMENTS else torch.int8
        codes = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False)
    else:
        codes = sharding.zeros_per_row(p, 2, torch.uint8, name)
    scale = sharding.zeros_per_row(p, GROUP, torch.bfloat16, name)
    KNOWN_SCALES[scale] = True
    return {key: codes, f"{key}_scale": scale}


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
    # Codes and scales of as many elements in other rows would be taken for those of other elements.
    per_row = p.shape[:1] if p.dim() > 1 else ()
    expected: dict[str, tuple[torch.dtype, int, tuple[int, ...]]] = {}
    if layout.param.endswith("split24"):
        expected["remainder"] = torch.int8, n, p.shape[:-1]
    elif layout.param.endswith("split32"):
        expected["remainder"] = torch.int8, 2 * n, p.shape
    for key, form in zip(names, layout.states, strict=True):
        if form in LAWS:
            dtype = torch.int8 if form == "int8" else torch.uint8
            expected[key] = (dtype, n, p.shape[:-1]) if form.endswith("8") else (dtype, (n + 1) // 2, per_row)
            expected[f"{key}_scale"] = torch.bfloat16, -(-n // GROUP), per_row
    for key, (dtype, count, rows) in expected.items():
        placed = [(getattr(t, "device_mesh", None), getattr(t, "placements", None)) for t in (p, state[key])]
        if placed[0] != placed[1] and placed[0][0] is not None:
            raise TypeError(f"{key} of {name} must be placed as the parameter, {placed[0]}, got {placed[1]}")
        t = local(state[key])
        found = t.dtype, t.numel(), t.device, state[key].shape[:-1]
        if found != (dtype, count, local(p).device, rows) or not t.is_contiguous():
            raise TypeError(
                f"{key} of {name} must have {count} contiguous elements of {dtype} on {p.device} "
                f"for a parameter of shape {tuple(p.shape)}, "
                f"got shape {tuple(t.shape)} with strides {t.stride()} of {t.dtype} on {t.device}"
            )


def has_remainder(state: dict[str, Any], weight_format: str, p: Tensor) -> bool:
    remainder = state.get("remainder")
    shape = p.shape if weight_format == "split24" else (*p.shape, 2)
    return isinstance(remainder, Tensor) and (remainder.dtype, remainder.shape) == (torch.int8, torch.Size(shape))
