"""What a step takes: parameters, gradients, states and options, checked before anything changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_capturable_supported_devices

from . import backend as _backend
from .arguments import check_nonnegative
from .formats import STATE_FORMATS, WEIGHT_FORMATS
from .rows import Group, Row, Step
from .scales import check_scales
from .sharding import local
from .states import States

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)

_LARGEST = torch.finfo(torch.float32).max
_WIDE = (torch.float64, torch.complex128)


class Checks:
    """What an optimizer takes. ``owner`` is the class that errors name."""

    def __init__(self, owner: type[object], sparse_rules: frozenset[str], settings: Mapping[str, Any]) -> None:
        self.owner, self.sparse_rules, self.settings = owner, sparse_rules, settings

    def backend_of(self, name: str, p: Tensor, step: Step, row: Row, states: States) -> str:
        """Check a parameter, its gradient and its states; choose the backend that updates them. Without a gradient it is what one
        like the parameter would give.
        """
        g = step.input_of(p)
        g = p if g is None else g
        present = states.present(p, row.rule)
        if not torch.is_grad_enabled() and not p.is_inference():
            found = _backend.known(self.settings["backend"], [p, g, *present.values()])
            if found is not None:
                return found
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(f"{name} must be floating point or complex, got {p.dtype}")
        if p.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{name} must not be an inference tensor outside of inference mode")
        sparse = g.layout == torch.sparse_coo and row.rule in self.sparse_rules
        self._check_layouts(name, p, g, row, sparse)
        if g.device != p.device:
            raise RuntimeError(f"{name} must have its gradient on {p.device}, got {g.device}")
        if g.is_complex() != p.is_complex():
            raise RuntimeError(f"{name} of {p.dtype} must have a gradient of the same kind, got {g.dtype}")
        if g.shape != p.shape:
            raise RuntimeError(f"{name} must have a gradient of shape {tuple(p.shape)}, got {tuple(g.shape)}")
        coded = {key for key in present if f"{key}_scale" in states.state[p]}
        for key, state in present.items():
            if (state.shape != p.shape and key not in coded) or state.device != p.device:
                raise RuntimeError(
                    f"{key} of {name} must have shape {tuple(p.shape)} on {p.device}, "
                    f"got {tuple(state.shape)} on {state.device}"
                )
            if key not in coded and (state.is_complex() != p.is_complex() or not _is_number(state)):
                raise RuntimeError(f"{key} of {name} must be {_kind(p)} as the parameter is, got {state.dtype}")
        # A step is differentiable where gradients are enabled in it.
        if sparse or torch.is_grad_enabled():
            return "reference"
        valued = [local(state) for key, state in present.items() if key not in coded]
        return _backend.choose(self.settings["backend"], [local(p), local(g), *valued], name)

    def device_of(self, p: Tensor, states: States) -> torch.device:
        """Where a parameter is updated."""
        return local(p).device

    def _check_layouts(self, name: str, p: Tensor, g: Tensor, row: Row, sparse: bool) -> None:
        if sparse and row.hyper["weight_decay"] != 0.0:
            raise RuntimeError(
                f"weight_decay option is not compatible with sparse gradients, got {row.hyper['weight_decay']} for {name}"
            )
        for what, t in ((name, p),) if sparse else ((name, p), (f"the gradient of {name}", g)):
            if t.layout in _SPARSE:
                is_adam = issubclass(self.owner, torch.optim.Adam)
                advice = ", please consider SparseAdam instead" if is_adam else ""
                rule, _, parts = row.rule.partition("+")
                advice = (
                    " with cautious, max_update_rms, ema_decay or statistics"
                    if parts and rule in self.sparse_rules
                    else advice
                )
                raise RuntimeError(
                    f"{self.owner.__name__} does not support sparse gradients{advice} ({what} has layout {t.layout})"
                )
            if t.layout != torch.strided:
                raise RuntimeError(f"{what} must have layout torch.strided, got {t.layout}")


def _is_number(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _kind(p: Tensor) -> str:
    return "complex" if p.is_complex() else "floating point"


def check_defaults(defaults: dict[str, Any], backend: str | None) -> None:
    """Raise, in torch's words, for options of torch's that contradict each other."""
    if defaults.get("fused") and defaults.get("differentiable"):
        raise RuntimeError("`fused` does not support `differentiable`")
    if defaults.get("fused") and defaults.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if defaults.get("differentiable") and backend not in (None, "reference"):
        raise RuntimeError(f"differentiable=True needs backend=None or 'reference', got {backend!r}")


def check_options(group: Group, options: Mapping[str, Any], owner: type[object]) -> None:
    """Raise if an option of a group that torch does not have is out of range; ``options``: those that the owner has."""
    state_format = group.get("state_format")
    if state_format is not None and state_format not in STATE_FORMATS:
        raise ValueError(
            f"state_format must be None, 'fp32', 'bf16', 'fp16', 'int8' or its torch dtype, or 'int4', got {state_format!r}"
        )
    weight_format = group.get("weight_format")
    if weight_format not in (None, *WEIGHT_FORMATS):
        raise ValueError(f"weight_format must be None or one of {', '.join(WEIGHT_FORMATS)}, got {weight_format!r}")
    if "l1_decay" in options:
        check_nonnegative("l1_decay value", "l1_decay", group.get("l1_decay", 0.0))
        if group.get("l1_form", "proximal") not in ("proximal", "subgradient"):
            raise ValueError(f"l1_form must be 'proximal' or 'subgradient', got {group['l1_form']!r}")
    elif group.get("l1_decay", 0.0) != 0.0:
        raise ValueError(f"{owner.__name__} must have no l1_decay in a group, got {group['l1_decay']}")
    if not group.get("l1_cap", 10.0) > 0.0:
        raise ValueError(f"l1_cap must be > 0, got {group['l1_cap']}")
    check_scales(group, owner)


def check_capturable(group: Group, *, fused: bool) -> None:
    """Raise torch's error for capturable=True and a parameter that is not on a supported device. The fused step of torch's
    classes that have one raises none.
    """
    if group.get("capturable") and not fused and not _backend.cuda_on_host():
        devices = _get_capturable_supported_devices()
        if any(p.grad is not None and p.device.type not in devices for p in group["params"]):
            raise AssertionError(f"If capturable=True, params and state_steps must be on supported devices: {devices}.")


def check_numbers(row: Row, group: Group) -> None:
    """Raise for a hyper-parameter that is no number, or that is none in float32, which all but float64 parameters are updated
    in: a step with it is infinite, and the next one NaN. torch raises too. Infinity itself is a number.
    """
    for name, value in row.hyper.items():
        if isinstance(value, float) and not -_LARGEST <= value <= _LARGEST:
            if math.isnan(value):
                raise ValueError(f"{name} must be a number, got nan")
            if math.isfinite(value) and any(p.dtype not in _WIDE for p in group["params"]):
                raise ValueError(f"{name} must be at most {_LARGEST:.4g} in magnitude, as a float32, got {value}")
