"""precond: fused, preconditioned optimizers for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch as torch  # first: the extension shares its OpenMP runtime

from ._core.conversions import averaged_state_dict, master_weights, to_torch_state_dict
from ._core.groups import param_groups
from ._core.optimizer import PrecisionWarning
from ._core.settings import Settings
from ._core.statistics import Statistics
from ._version import __version__
from .adadelta import Adadelta, AdadeltaW
from .adagrad import Adagrad, AdagradW
from .adam import Adam, AdamW
from .adamax import Adamax, AdamaxW
from .bases import interpolate_basis
from .bnp import BNP
from .dual import DualDescent
from .fop import FOP
from .gauss_newton import GaussNewton
from .gradient_regularizer import GradientRegularizer
from .gradient_release import GradientRelease, release_gradients
from .grouped import Grouped
from .lion import Lion
from .muon import Muon
from .nadam import NAdam, NAdamW
from .radam import RAdam, RAdamW
from .rmsprop import RMSprop, RMSpropW
from .schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from .sgd import SGD, SGDW
from .soap import SOAP
from .sophia import Sophia

if TYPE_CHECKING:
    from . import curvature as curvature
    from . import diagnostics as diagnostics
else:

    def __getattr__(name: str) -> Any:
        """Modules that training alone does not need, imported when they are first used."""
        if name in ("curvature", "diagnostics"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BNP",
    "FOP",
    "SGD",
    "SGDW",
    "SOAP",
    "Adadelta",
    "AdadeltaW",
    "Adagrad",
    "AdagradW",
    "Adam",
    "AdamW",
    "Adamax",
    "AdamaxW",
    "DualDescent",
    "GaussNewton",
    "GradientRegularizer",
    "GradientRelease",
    "Grouped",
    "Lion",
    "Muon",
    "NAdam",
    "NAdamW",
    "PrecisionWarning",
    "RAdam",
    "RAdamW",
    "RMSprop",
    "RMSpropW",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Settings",
    "Sophia",
    "Statistics",
    "__version__",
    "averaged_state_dict",
    "interpolate_basis",
    "master_weights",
    "param_groups",
    "release_gradients",
    "to_torch_state_dict",
]
