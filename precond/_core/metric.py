"""P P^T, by which a preconditioned step multiplies a gradient: data that an optimizer gives, and that GradientRegularizer and
``precond.diagnostics`` read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Basis(Protocol):
    """An orthogonal U."""

    def rotate(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """U^T t."""

    def rotate_back(self, t: Tensor) -> Tensor:
        """U t."""


class Metric(NamedTuple):
    """P P^T = U diag(1 / (sqrt(scale v) + eps)) U^T of one parameter, as its last step left it; the identity where v is None.

    Momentum and decay are no part of it, and where a method bounds its steps it holds below that bound.
    """

    v: Tensor | None = None
    scale: float = 1.0
    eps: float = 0.0
    #: None: the parameter's own coordinates.
    basis: Basis | None = None
    #: Positive where a coordinate has a second moment. None: where v > 0. Elsewhere eps alone would be P, so none is known.
    known: Tensor | None = None
    #: Why a step is not P P^T times a mean of gradients, whatever P; the other fields then say nothing.
    why_not: str = ""


def of_parts(formula: Callable[..., Tensor], *states: Tensor) -> Tensor:
    """A formula of states in float32 or wider, where they are complex of their real and of their imaginary parts."""
    parts = formula(*(torch.view_as_real(t) if t.is_complex() else _widened(t) for t in states))
    return torch.view_as_complex(parts) if states[0].is_complex() else parts


def _widened(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
