"""torch's own table of what its optimizers take and refuse, for those that precond replaces."""

from __future__ import annotations

import copy

import pytest
from torch.testing._internal.common_optimizers import optim_db

import precond

INFOS = [info for info in optim_db if hasattr(precond, info.optim_cls.__name__)]
infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.optim_cls.__name__)


def ours(info):
    return getattr(precond, info.optim_cls.__name__)


def inputs(info, skip=()):
    """Every input of torch's table, without flags and with each flag of an implementation that torch's class has."""
    for given in info.optim_inputs_func(device="cpu"):
        for flag in (None, *(flag for flag in info.supported_impls if flag not in skip)):
            yield copy.deepcopy(given.kwargs) | ({} if flag is None else {flag: True})


def taken_by(kwargs, p):
    """The parameter, or what a differentiable step takes of it: it takes no leaf."""
    return p.clone() if kwargs.get("differentiable") else p
