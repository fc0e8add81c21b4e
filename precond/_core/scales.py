"""What a group makes of its learning rate and decays: ``lr_scale``, ``decay_scale`` and a decay that follows lr / lr_max."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from . import backend as _backend
from .arguments import is_number
from .rows import Group, Hyper

#: Options of every group, with their defaults. ``added_lr`` is the lr that a group with ``decoupled="independent"`` was added
#: with.
SCALES = {"lr_scale": 1.0, "decay_scale": 1.0, "decoupled": "lr", "lr_max": None, "added_lr": None}

#: Those that stay in a group that was given them, whatever they are: loops of others read them there.
KEPT = ("lr_scale", "decay_scale")

#: torch's classes whose ``weight_decay`` is added to the gradient; a group's "decoupled_weight_decay" comes first.
_COUPLED = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
)


def is_coupled(owner: type[object], group: Group) -> bool:
    """True where the decay of a class and group is added to the gradient."""
    return not group.get("decoupled_weight_decay", not issubclass(owner, _COUPLED))


def check_scales(group: Group, owner: type[object]) -> None:
    """Raise if one of these options is out of range."""
    if "lr_scale" in group:
        _check_scale("lr_scale", group["lr_scale"])
    if "decay_scale" in group:
        _check_scale("decay_scale", group["decay_scale"])
    if "decoupled" in group:
        decoupled = group["decoupled"]
        if is_coupled(owner, group):
            raise ValueError(
                f"{owner.__name__} must have no decoupled in a group, since its decay is part of the gradient, got {decoupled!r}"
            )
        if decoupled not in ("lr", "independent"):
            raise ValueError(f"decoupled must be 'lr' or 'independent', got {decoupled!r}")
        lr_max = group.get("lr_max") if decoupled == "independent" else None
        if lr_max is not None and not (is_number(lr_max) and 0.0 < lr_max < math.inf):
            raise ValueError(f"lr_max must be None or a finite number > 0, got {lr_max!r}")


def _check_scale(name: str, value: Any) -> None:
    if not (is_number(value) and 0.0 <= value < math.inf):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def remember_lr(group: Group) -> None:
    """Keep the lr that a group is added with, where its decay is measured by it."""
    if group.get("decoupled") == "independent" and group.get("lr_max") is None:
        lr = group["lr"]
        group.setdefault("added_lr", float(lr.detach() if isinstance(lr, Tensor) else lr))


def lr_max_of(group: Group) -> float:
    """The largest lr of a schedule: ``lr_max`` of the group, or what torch's OneCycleLR or any scheduler of torch keeps there, or
    the lr that the group was added with.
    """
    for name in ("lr_max", "max_lr", "initial_lr", "added_lr"):
        value = group.get(name)
        if value is None or _backend.on_device(value):
            continue
        largest = float(value.detach() if isinstance(value, Tensor) else value)
        if not 0.0 < largest < math.inf:
            raise ValueError(
                f"lr_max must be a finite number > 0 with decoupled='independent', got {largest} from {name}: "
                "give the group its lr_max"
            )
        return largest
    raise ValueError(
        "lr_max must be given with decoupled='independent' in a group without max_lr and initial_lr, got None"
    )


def lr_of(group: Group) -> Any:
    """The learning rate of a group's steps."""
    return _times(group["lr"], float(group["lr_scale"])) if "lr_scale" in group else group["lr"]


def l1_decay_of(group: Group) -> float:
    """The L1 decay of a group: 0 where it has the rule without one."""
    l1_decay = float(group.get("l1_decay", 0.0))
    return l1_decay * float(group["decay_scale"]) if "decay_scale" in group else l1_decay


def scale(hyper: Hyper, group: Group) -> None:
    """Scale lr and decays, as the rules take them: their decay is lr times ``weight_decay``, or times ``l1_decay``."""
    if "lr_scale" not in group and "decay_scale" not in group and "decoupled" not in group:
        return
    of_lr, of_decay = float(group.get("lr_scale", 1.0)), float(group.get("decay_scale", 1.0))
    if group.get("decoupled") == "independent":
        largest, lr = lr_max_of(group), hyper["lr"]
        if not isinstance(lr, Tensor) and lr > largest * (1.0 + 1e-6):
            raise ValueError(
                f"lr must be at most lr_max with decoupled='independent', got {lr} > {largest}: give the group its lr_max"
            )
        # Of lr_scale = 0 nothing is left to divide: such a group does not move at all.
        of_decay = of_decay / (largest * of_lr) if of_lr > 0.0 else 0.0
    if of_lr != 1.0:
        hyper["lr"] = _times(hyper["lr"], of_lr)
    if of_decay != 1.0:
        for name in ("weight_decay", "l1_decay"):
            hyper[name] = _times(hyper[name], of_decay)


def _times(value: float | Tensor, factor: float) -> float | Tensor:
    """On a device in float64, as on the host."""
    if isinstance(value, Tensor) and not torch.is_grad_enabled():
        value = value.double()
    return value * factor


def _scaled_already(groups: list[Group]) -> bool | None:
    """True where something else has multiplied lr by ``lr_scale``, as timm's schedulers do: the lr of groups, or what they are of
    their ``initial_lr``, have the ratio of the scales. None where too few groups move to tell.
    """
    lrs, shares, scales = [], [], set()
    for group in groups:
        lr, of_lr, initial = group["lr"], group.get("lr_scale", 1.0), group.get("initial_lr")
        if isinstance(lr, Tensor) or not (lr > 0.0 and of_lr > 0.0):
            continue
        scales.add(of_lr)
        lrs.append(lr / of_lr)
        known = initial is not None and not isinstance(initial, Tensor) and initial > 0.0
        shares.append(lr / of_lr / initial if known else math.nan)
    if len(scales) < 2:
        return None
    return any(all(math.isclose(each, of[0], rel_tol=1e-12) for each in of) for of in (lrs, shares))


def warned_if_scaled(groups: list[Group]) -> bool:
    """Warn where groups have an ``lr_scale`` that their lr seems to have already. True once it is known: only the first step
    that can tell counts, since later on a schedule may come to such numbers by chance.
    """
    found = _scaled_already(groups) if any("lr_scale" in group for group in groups) else False
    if found:
        lrs, of_lrs = [group["lr"] for group in groups], [group.get("lr_scale", 1.0) for group in groups]
        warnings.warn(
            f"lr_scale seems to be in lr already, and would be applied twice: lr is {lrs} with lr_scale {of_lrs}; "
            "see docs/param_groups.md for schedulers that multiply by lr_scale, such as timm's",
            stacklevel=3,
        )
    return found is not None
