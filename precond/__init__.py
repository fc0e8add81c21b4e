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
from .dual import DualDescent
from .fop import FOP
from .gauss_newton import GaussNewton, Sophia
from .lion import Lion
from .muon import Muon
from .rmsprop import RMSprop, RMSpropW
from .sgd import SGD, SGDW
from .soap import SOAP

__all__ = [
    "BNP",
    "FOP",
    "SGD",
    "SGDW",
    "SOAP",
    "Adagrad",
    "AdagradW",
    "Adam",
    "AdamW",
    "DualDescent",
    "GaussNewton",
    "Lion",
    "Muon",
    "PrecisionWarning",
    "RMSprop",
    "RMSpropW",
    "Settings",
    "Sophia",
    "__version__",
    "master_weights",
    "param_groups",
    "to_torch_state_dict",
]
