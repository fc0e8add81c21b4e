"""What the constructors share: checks with torch's messages, and how a hyper-parameter is read at a step."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from . import backend as _backend

L1_OPTIONS = {"l1_decay": 0.0, "l1_form": "proximal"}


def is_number(value: object) -> bool:
    """True for a real number of Python's or NumPy's; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_nonnegative(what: str, name: str, value: Any) -> None:
    """Raise torch's message with our expectation behind it."""
    if not value >= 0.0:
        raise ValueError(f"Invalid {what}: {value} ({name} must be >= 0)")


def check_lr(lr: Any) -> None:
    """Raise torch's messages for a learning rate that no optimizer takes."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
    check_nonnegative("learning rate", "lr", lr)


def check_betas(betas: Any) -> tuple[Any, Any]:
    """Raise torch's messages for decay rates that no optimizer takes. Returns them as a pair, whatever sequence they are in: a
    list, an array, a tensor, or what a configuration library has for a list.
    """
    try:
        beta1, beta2 = (betas[i] for i in range(len(betas)))
    except (TypeError, ValueError, LookupError):
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}") from None
    for i, beta in enumerate((beta1, beta2)):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element, got {beta.numel()} elements")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta} (it must be in [0, 1))")
    return beta1, beta2


def number(value: Any) -> float | Tensor:
    """A hyper-parameter as the rules take it: a float, or a tensor that only its device reads or that autograd watches."""
    if not isinstance(value, Tensor):
        return float(value.item() if hasattr(value, "item") else value)  # an array of one element too
    if torch.is_grad_enabled():
        return value.reshape(())  # without dimensions it widens no operand
    return value if _backend.on_device(value) else float(value.detach())


def arguments(of: dict[str, Any]) -> dict[str, Any]:
    """What a constructor was called with, from its ``locals()``: the defaults of its groups."""
    return {name: value for name, value in of.items() if name not in ("self", "params", "settings", "__class__")}
