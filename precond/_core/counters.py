"""Step counters of parameters, and their other states of one number: what they may be, where they lie, how they count."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import backend as _backend
from .rows import Group

_NO_SCALARS: Mapping[str, float] = {}


def counter_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's step counter: torch's, but float32 wherever a compiled plan or Triton may count."""
    wide = torch.get_default_dtype() == torch.float64 and p.dtype not in _backend.FUSED_DTYPES
    return torch.float64 if wide else torch.float32


#: What a step counter may be, in any shape of one element: what counts past 2^24. One of 16 bits stands still at 2048 or 256.
COUNTER_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)


def is_counter(name: str, value: object, device: torch.device) -> bool:
    """True for a parameter's step counter, or another state of one number, that a step advances in place."""
    if not isinstance(value, Tensor) or value.numel() != 1 or value.device != device or value.layout != torch.strided:
        return False
    return value.dtype in (COUNTER_DTYPES if name == "step" else COUNTER_DTYPES[:2]) and not value.is_neg()


def next_step(counter: Tensor) -> int:
    """Advance a counter on the host, and return it. A float that 1 no longer moves goes to the next one that there is, as in
    csrc/plan/number.h: random bits, which depend on it, would otherwise be the same in every step.
    """
    before = counter.item()
    if counter.dtype.is_floating_point and 0 < before < math.inf and before >= 2 / torch.finfo(counter.dtype).eps:
        counter.copy_(torch.nextafter(counter, torch.full_like(counter, math.inf)))
    elif counter.dtype.is_floating_point or before < torch.iinfo(counter.dtype).max:
        counter += 1
    return countable(counter.item())


def countable(step: float) -> int:
    """The number of a step; no counter comes to 2^62 by counting."""
    return max(int(step), 0) if step < 2**62 else 2**62


def counts_beside(group: Group, backend: str) -> bool:
    """Where torch keeps a parameter's step counter: beside it if capturable or fused, else on the host."""
    return backend in ("cuda", "triton") and bool(group.get("capturable") or group.get("fused"))


def check_one(name: str, param: str, value: object) -> None:
    """Raise for a counter, or another state of one number, that has several elements."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise RuntimeError(f"{name} of {param} must have one element, got shape {tuple(value.shape)}")


def make_counter(
    param: str,
    p: Tensor,
    state: dict[str, Any],
    group: Group,
    scalars: Mapping[str, float] = _NO_SCALARS,
    wide: bool = False,
) -> None:
    """Make a parameter's step counter and a rule's scalar states, which are float64 where they are ``wide``. What is there stays
    the same tensor, which others may share, unless it is on another device, is a number of Python's or cannot count; then one
    that can takes its place.
    """
    device = p.device if p.device.type != "cpu" and counts_beside(group, "cuda") else torch.device("cpu")
    for name, initial in (("step", 0.0), *scalars.items()):
        value = state.get(name, initial)
        if is_counter(name, value, device):
            continue
        dtype = torch.float64 if wide and name != "step" else counter_dtype(p)
        check_one(name, param, value)
        if isinstance(value, Tensor):
            kept = value.dtype in COUNTER_DTYPES and (name == "step" or value.dtype.is_floating_point)
            state[name] = value.detach().to(device, value.dtype if kept else dtype, copy=True)
        else:
            # torch.tensor() would wait for a device, once per parameter; on the host a fake one knows its value.
            make = torch.tensor if device.type == "cpu" else functools.partial(torch.full, ())
            state[name] = make(float(value), dtype=dtype, device=device)
