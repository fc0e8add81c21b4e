"""precond: fused, preconditioned optimizers for PyTorch."""

from __future__ import annotations

import torch as torch  # first: the extension shares its OpenMP runtime

from ._conversions import master_weights, to_torch_state_dict
from ._groups import param_groups
from ._optimizer import PrecisionWarning
from ._settings import Settings
from ._version import __version__
from .adagrad import Adagrad, AdagradW
from .adam import Adam, AdamW
from .bnp import BNP
from .lion import Lion
from .rmsprop import RMSprop, RMSpropW
from .sgd import SGD, SGDW

__all__ = [
    "BNP",
    "SGD",
    "SGDW",
    "Adagrad",
    "AdagradW",
    "Adam",
    "AdamW",
    "Lion",
    "PrecisionWarning",
    "RMSprop",
    "RMSpropW",
    "Settings",
    "__version__",
    "master_weights",
    "param_groups",
    "to_torch_state_dict",
]
