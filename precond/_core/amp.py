"""What ``torch.amp.GradScaler`` hands to a step that unscales gradients itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import backend as _backend
from .rows import Control


def control_of(found_inf: Tensor | None, grad_scale: Tensor | None, settings: Mapping[str, Any]) -> Control | None:
    """What a step shares, from a scaler's tensors. None: it is skipped, before it makes a state.

    Only CUDA and Triton read these tensors on their device. For the others both are numbers.
    """
    by_device = any(settings["backend"] in (None, name) and not _backend.why_not(name) for name in ("cuda", "triton"))
    if found_inf is not None and not (by_device and _backend.on_device(found_inf)):
        if found_inf.item():
            return None
        found_inf = None
    grad_coef = 1.0
    if grad_scale is not None and not (by_device and _backend.on_device(grad_scale)):
        grad_coef, grad_scale = 1.0 / float(grad_scale), None
    clip_value = settings["clip_grad_value"]
    return Control(grad_coef, grad_scale, found_inf, math.inf if clip_value is None else clip_value)
