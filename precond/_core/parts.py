"""Parts that ride along in the pass of a step, as the options of a group ask for them: masks and an average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch

from .arguments import is_number
from .formats import STATE_FORMATS
from .rows import Group, Hyper, Row, Scaled
from .scales import is_coupled

#: The options of a group, with their defaults.
OPTIONS: dict[str, Any] = {
    "cautious": None,
    "cautious_rescale": False,
    "max_update_rms": None,
    "ema_decay": None,
    "ema_start": 0,
    "ema_format": None,
}
#: What of ``cautious`` masks the update, and what the decay.
_CAUTIOUS = {None: (0.0, 0.0), "update": (1.0, 0.0), "decay": (0.0, 1.0), "both": (1.0, 1.0)}


def with_parts(row: Row, group: Group, all_have_parts: bool = False) -> Row:
    """What a group asks for in this step, its parts too; ``all_have_parts``: also where it asks for none."""
    name = suffix(group, all_have_parts)
    return Row(row.rule + name, row.sign, {**row.hyper, **hyper(group)}) if name else row


def suffix(group: Group, all_have_parts: bool = False) -> str:
    """What the name of a rule with a group's parts has behind that of the rule alone."""
    if group.get("ema_decay") is not None:
        return "+ema"
    asked = all_have_parts or group.get("cautious") is not None or group.get("max_update_rms") is not None
    return "+parts" if asked else ""


def masks_update(group: Group) -> bool:
    """True for a group whose updates are masked by the gradient."""
    return group.get("cautious") in ("update", "both")


def is_scaled(group: Group) -> bool:
    """True for a group whose updates are multiplied with a factor that depends on all of a tensor's updates."""
    return bool(group.get("cautious_rescale")) or group.get("max_update_rms") is not None


def scaled(groups: list[Group]) -> list[Scaled] | None:
    """What scales the updates of groups; None where nothing does."""
    return [scaled_of(group) for group in groups] if any(map(is_scaled, groups)) else None


def scaled_of(group: Group) -> Scaled:
    """What scales the updates of a group."""
    return Scaled(bool(group.get("cautious_rescale")), group.get("max_update_rms"))


def hyper(group: Group) -> Hyper:
    """The hyper-parameters of a group's parts."""
    decay = group.get("ema_decay")
    of_update, of_decay = _CAUTIOUS[group.get("cautious")]
    return {
        "ema_decay": 0.0 if decay is None else -1.0 if decay == "equal" else float(decay),
        "ema_start": float(group.get("ema_start", 0)),
        "cautious_update": of_update,
        "cautious_decay": of_decay,
    }


def check(group: Group, owner: type[object]) -> None:
    """Raise if an option is out of range; ``owner``: the class that errors name."""
    if OPTIONS.keys().isdisjoint(group):  # at every step, for every group
        return
    cautious, rescale, most, decay, start, form = (group.get(name, default) for name, default in OPTIONS.items())
    if not isinstance(cautious, str | None) or cautious not in _CAUTIOUS:
        raise ValueError(f"cautious must be None, 'update', 'decay' or 'both', got {cautious!r}")
    if cautious in ("decay", "both") and is_coupled(owner, group):
        raise ValueError(
            f"cautious must be None or 'update' for {owner.__name__}, whose decay is part of the gradient, got {cautious!r}"
        )
    if not isinstance(rescale, bool):
        raise ValueError(f"cautious_rescale must be False or True, got {rescale!r}")
    if rescale and not masks_update(group):
        raise ValueError(f"cautious_rescale=True needs cautious='update' or 'both', got {cautious!r}")
    if most is not None and not (is_number(most) and 0.0 < most < math.inf):
        raise ValueError(f"max_update_rms must be None or a number > 0, got {most!r}")
    if is_scaled(group) and group.get("differentiable"):
        asked = "max_update_rms" if rescale is False else "cautious_rescale"
        raise RuntimeError(f"{asked} must be {OPTIONS[asked]} with differentiable=True, got {group[asked]!r}")
    if decay is not None and decay != "equal" and not (is_number(decay) and 0.0 <= decay < 1.0):
        raise ValueError(f"ema_decay must be None, a number in [0, 1) or 'equal', got {decay!r}")
    if not (is_number(start) and 0 <= start < math.inf and start == int(start)):
        raise ValueError(f"ema_start must be an integer >= 0, got {start!r}")
    if form is not None and not (isinstance(form, str | torch.dtype) and form in STATE_FORMATS):
        raise ValueError(
            f"ema_format must be None, 'fp32', 'bf16', 'fp16', 'int8' or its torch dtype, or 'int4', got {form!r}"
        )
