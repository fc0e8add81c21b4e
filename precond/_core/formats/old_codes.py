"""Codes of version 0.1, which checkpoints bring: found by the sign of their scales, and encoded anew in place. Means were
companded by softsign there, and second moments stored as their square roots in even steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..sharding import local
from .codec import bare_codes, encode
from .layout import KNOWN_SCALES
from .names import GROUP, LEVELS, code_format

#: Groups that are encoded at once: temporaries are some ten times their codes.
_AT_ONCE = 1 << 14
#: Above it a magnitude counts as infinite. Roots were rounded up, so that their squares may be.
_LARGEST = torch.finfo(torch.bfloat16).max


def renew(states: Iterable[tuple[Any, Any]], thorough: bool = False) -> None:
    """Encode anew, in place, what is left of version 0.1 in the states of parameters, and warn once where there was any.

    A device is waited for where scales must be read. Unless ``thorough``, those that were read before or made here are not: only
    the host's are read again.
    """
    found = [
        _renew_state(p, state, thorough) for p, state in states if isinstance(p, Tensor) and isinstance(state, dict)
    ]
    if any(found):
        warnings.warn(
            "states were in the 8- or 4-bit codes of precond 0.1 and are now in today's, which rounded each value once more: "
            "training goes on, though not with the bits of 0.1. Save a new checkpoint, and load that one from now on",
            UserWarning,
            stacklevel=3,
        )


def is_old(scale: Tensor) -> Tensor:
    """Where scales are of version 0.1: above 0, or a NaN without a sign. 0 is a new state's, and has the same meaning in both."""
    return scale.view(torch.int16) > 0


def decode(stored: Tensor, scale: Tensor, form: str) -> Tensor:
    """The values of groups, one a row, of codes of version 0.1."""
    bits, levels = 4 if form.endswith("4") else 8, LEVELS[form]
    codes = bare_codes(stored, form, torch.Size([scale.numel() * GROUP])).view(-1, GROUP)
    signed = not form.startswith("u")
    if signed:
        codes = torch.where(codes > levels, codes - (1 << bits), codes)
    y = codes.float() / levels
    wide = scale.reshape(-1, 1).float()
    values = y / (2 - y.abs()) * wide if signed else (y * wide).square()
    return values.clamp(-_LARGEST, _LARGEST)


def _renew_state(p: Tensor, state: dict[str, Any], thorough: bool) -> bool:
    """Renew the codes among a parameter's states. True where there were old ones."""
    renewed = False
    for key, scale in state.items():
        name = str(key).removesuffix("_scale")
        stored = state.get(name)
        if name == key or not isinstance(scale, Tensor) or not isinstance(stored, Tensor):
            continue
        form = code_format(name, "int8" if stored.shape == p.shape or stored.dtype == torch.int8 else "int4")
        plain, beside = local(stored), local(scale)
        if not _are_codes(plain, beside, form) or not (thorough or _is_to_be_read(scale, beside)):
            continue
        renewed = _renew(plain, beside, form) or renewed
        KNOWN_SCALES[scale] = True
    return renewed


def _is_to_be_read(scale: Tensor, plain: Tensor) -> bool:
    if plain.device.type == "cpu":
        return True
    return scale not in KNOWN_SCALES and not (plain.is_cuda and torch.cuda.is_current_stream_capturing())


def _are_codes(stored: Tensor, scale: Tensor, form: str) -> bool:
    """False also for what a step refuses: it says more than could be said here."""
    n = stored.numel() * (2 if form.endswith("4") else 1)
    dtypes = (torch.int8 if form == "int8" else torch.uint8), torch.bfloat16
    # Not fake ones, nor others whose values cannot be read.
    real = type(stored) is Tensor and type(scale) is Tensor and not stored.is_meta
    fits = (stored.dtype, scale.dtype) == dtypes and scale.numel() == -(-n // GROUP)
    return real and fits and stored.is_contiguous() and scale.is_contiguous() and stored.device == scale.device


@torch.no_grad()
def _renew(stored: Tensor, scale: Tensor, form: str) -> bool:
    per = GROUP // 2 if form.endswith("4") else GROUP
    flat, scales = stored.view(-1), scale.view(-1)
    full = flat.numel() // per
    # One pass that writes nothing: on a CPU every new plan comes here, with the scales of all parameters.
    if scales.numel() == 0:
        return False
    most = scales.view(torch.int16).amax()
    if torch.equal(most, most.clamp(max=0)):
        return False
    found = is_old(scales).nonzero().view(-1)
    rows = flat[: full * per].view(full, per)
    whole = found[found < full]
    for first in range(0, whole.numel(), _AT_ONCE):
        some = whole[first : first + _AT_ONCE]
        rows[some], scales[some] = _renewed(rows[some], scales[some], form)
    if found[-1] == full:  # the last group is not full
        tail = flat[full * per :]
        padded = torch.nn.functional.pad(tail, (0, per - tail.numel())).view(1, per)
        anew, scales[full:] = _renewed(padded, scales[full:], form)
        tail.copy_(anew.view(-1)[: tail.numel()])
    return True


def _renewed(stored: Tensor, scale: Tensor, form: str) -> tuple[Tensor, Tensor]:
    codes, beside = encode(decode(stored, scale, form), form, None, 0)
    assert beside is not None
    return codes.view(stored.shape), beside
