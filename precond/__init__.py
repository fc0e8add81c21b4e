"""precond: fused, preconditioned optimizers for PyTorch."""

from __future__ import annotations

import torch as torch  # first: the extension shares its OpenMP runtime

from ._groups import param_groups
from ._optimizer import PrecisionWarning
from ._version import __version__
from .adamw import AdamW
from .sgd import SGD

__all__ = ["SGD", "AdamW", "PrecisionWarning", "__version__", "param_groups"]
