"""The table of optimizers: one row per rule, read by parity, reference, API, checkpoint and benchmark code."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

import precond
from precond._core.optimizer import FusedOptimizer
from precond._core.rows import Row


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One rule and how to get it. ``ulps``: tolerance in fp32 ulp of the operands, for p and for each state. ``steep``: the
    result may be that of operands a few ulp away, because the rule has a jump or a cancellation.
    """

    rule: str
    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]
    peer: type[torch.optim.Optimizer] | None
    ulps: tuple[float, ...]
    steep: bool = False

    def __str__(self) -> str:
        return self.rule


def counts_steps(row: Optimizer) -> bool:
    """True where every parameter of a row's optimizer has a step counter."""
    return row.cls._counts_steps or precond.reference.RULES[row.rule].reads_step


def intrinsic(name, cls, kwargs, ulps, suffix="", steep=False, peer=None, **l1) -> list[Optimizer]:
    """A rule with each intrinsic decay; with L2 alone it may have a peer."""
    forms = {"": {}, "_l1": l1, "_l1_subgradient": l1 | {"l1_form": "subgradient"}}
    return [
        Optimizer(f"{name}{infix}{suffix}", cls, kwargs | options, None if infix else peer, ulps, steep)
        for infix, options in forms.items()
    ]


_SGD = dict(lr=0.1, weight_decay=0.03)
_MOMENTUM = dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.03, maximize=True)
_NESTEROV = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.03)
_ADAM = dict(lr=0.05, weight_decay=0.1)
_AMSGRAD = dict(lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, amsgrad=True, maximize=True)
_ADAGRAD = dict(lr=0.05, lr_decay=0.1, initial_accumulator_value=0.1, weight_decay=0.1)
_RMSPROP = dict(lr=0.05, alpha=0.9, weight_decay=0.1)
_CENTERED = dict(lr=0.05, alpha=0.9, weight_decay=0.1, centered=True, maximize=True)

# Worst of `python -m bench errors` (10 seeds x 3 steps x 72,000 elements x 9 mixes of dtypes): p 1.0 to 2.0 for the SGDs, 1.6 to
# 2.7 for the adaptive rules, but for steep ones.
OPTIMIZERS = [
    Optimizer("sgd", precond.SGD, _SGD, torch.optim.SGD, (2.0,)),
    Optimizer("sgd_momentum", precond.SGD, _MOMENTUM, torch.optim.SGD, (2.0, 2.0)),
    Optimizer("sgd_nesterov", precond.SGD, _NESTEROV, torch.optim.SGD, (2.0, 2.0)),
    *intrinsic("sgdw", precond.SGDW, _SGD, (3.0,), l1_decay=0.6),
    *intrinsic("sgdw", precond.SGDW, _MOMENTUM, (3.0, 2.0), "_momentum", l1_decay=0.6),
    *intrinsic("sgdw", precond.SGDW, _NESTEROV, (3.0, 2.0), "_nesterov", l1_decay=0.6),
    Optimizer("adam", precond.Adam, _ADAM, torch.optim.Adam, (4.0, 2.0, 2.0), True),
    Optimizer("adam_amsgrad", precond.Adam, _AMSGRAD, torch.optim.Adam, (4.0, 2.0, 2.0, 2.0), True),
    *intrinsic("adamw", precond.AdamW, _ADAM, (4.0, 2.0, 2.0), peer=torch.optim.AdamW, l1_decay=0.6),
    *intrinsic(
        "adamw",
        precond.AdamW,
        _AMSGRAD,
        (4.0, 2.0, 2.0, 2.0),
        "_amsgrad",
        peer=torch.optim.AdamW,
        l1_decay=0.6,
        l1_cap=0.5,
    ),
    Optimizer("adagrad", precond.Adagrad, _ADAGRAD, torch.optim.Adagrad, (4.0, 2.0), True),
    *intrinsic("adagradw", precond.AdagradW, _ADAGRAD, (4.0, 2.0), l1_decay=0.6),
    Optimizer("rmsprop", precond.RMSprop, _RMSPROP, torch.optim.RMSprop, (4.0, 2.0), True),
    Optimizer("rmsprop_centered", precond.RMSprop, _CENTERED, torch.optim.RMSprop, (4.0, 2.0, 2.0), True),
    Optimizer(
        "rmsprop_momentum", precond.RMSprop, _RMSPROP | dict(momentum=0.8), torch.optim.RMSprop, (4.0, 2.0, 4.0), True
    ),
    Optimizer(
        "rmsprop_centered_momentum",
        precond.RMSprop,
        _CENTERED | dict(momentum=0.8),
        torch.optim.RMSprop,
        (4.0, 2.0, 4.0, 2.0),
        True,
    ),
    *intrinsic("rmspropw", precond.RMSpropW, _RMSPROP, (4.0, 2.0), l1_decay=0.6),
    *intrinsic("rmspropw", precond.RMSpropW, _CENTERED, (4.0, 2.0, 2.0), "_centered", True, l1_decay=0.6),
    *intrinsic(
        "rmspropw",
        precond.RMSpropW,
        _RMSPROP | dict(momentum=0.8),
        (4.0, 2.0, 4.0),
        "_momentum",
        l1_decay=0.6,
        l1_cap=0.5,
    ),
    *intrinsic(
        "rmspropw",
        precond.RMSpropW,
        _CENTERED | dict(momentum=0.8),
        (4.0, 2.0, 4.0, 2.0),
        "_centered_momentum",
        True,
        l1_decay=0.6,
    ),
    *intrinsic("lion", precond.Lion, dict(lr=0.05, weight_decay=0.1), (2.0, 2.0), steep=True, l1_decay=0.6),
]


class Curved(precond.GaussNewton):
    """With a curvature that nobody estimated, so that a step may come first."""

    def __init__(self, params, **kwargs) -> None:
        super().__init__(params, **kwargs)
        for group in self.param_groups:
            for p in group["params"]:
                self._init_state(p, group, self._row(group))
                # An estimate of a Hessian's diagonal may be negative, a mean of squares not.
                lowest = 0.0 if group["curvature"] == "gradient" else -0.1
                values = torch.linspace(lowest, 2.0, p.numel(), device=p.device).view(p.shape)
                h = self.state[p]["curvature"]
                h.copy_(torch.complex(values, values) if h.is_complex() else values)
                self.state[p]["curvature_step"] = 1


class Alone(FusedOptimizer):
    """A rule of which some method has a pass."""

    def __init__(self, params, rule, numbers, lr=0.1, weight_decay=0.0, maximize=False, state_format=None, **settings):
        defaults = dict(rule=rule, numbers=numbers, lr=lr, weight_decay=weight_decay, maximize=maximize)
        defaults |= dict(state_format=state_format, foreach=None, differentiable=False, fused=None)
        super().__init__(params, defaults, settings=settings)

    def _check_defaults(self, defaults) -> None:
        pass

    def _row(self, group) -> Row:
        return Row(group["rule"], -1.0 if group["maximize"] else 1.0, {"lr": group["lr"], **group["numbers"]})


_DUAL = dict(lr=0.1, granularity="entry", weight_decay=0.03, scale=0.3)
_AVERAGED = dict(momentum=0.9, nesterov=True, maximize=True)
_KERNELS = {"ratio": ("adam", 3.0), "smoothed": ("smoothed", 3.0), "clip": ("clip", 3.0), "asinh": ("asinh", 6.0)}
_KERNELS |= {"log": ("log", 6.0), "power": ("power", 6.0)}
_GN = dict(lr=0.05, betas=(0.9, 0.95), eps=1e-3, clip=2.0, weight_decay=0.1)
#: Rules of methods beyond the family; the same loops and formats run them, so fewer tests do.
BEYOND = [
    *(
        Optimizer(
            f"dual_{name}{suffix}", precond.DualDescent, _DUAL | dict(kernel=kernel) | options, None, ulps, bool(suffix)
        )
        for name, (kernel, error) in _KERNELS.items()
        for suffix, options, ulps in (("", {}, (error,)), ("_momentum", _AVERAGED, (error + 1.0, 3.0)))
    ),
    Optimizer("average", Alone, dict(rule="average", numbers=dict(momentum=0.9, lookahead=0.1)), None, (3.0, 3.0)),
    *intrinsic("gauss_newton", Curved, _GN, (5.0, 2.0, 2.0), "", True, l1_decay=0.6),
    *intrinsic("gauss_newton", Curved, _GN | dict(power=-0.5), (5.0, 2.0, 2.0), "_root", True, l1_decay=0.6),
    *intrinsic("gauss_newton", Curved, _GN | dict(curvature="gradient"), (5.0, 2.0, 2.0), "_own", True, l1_decay=0.6),
    *intrinsic(
        "gauss_newton",
        Curved,
        _GN | dict(curvature="gradient", power=-0.5),
        (5.0, 2.0, 2.0),
        "_own_root",
        True,
        l1_decay=0.6,
    ),
    Optimizer("perturb", Alone, dict(rule="perturb", numbers=dict(radius=0.05, scale=1.0, eps=0.0)), None, (2.0, 0.0)),
    Optimizer(
        "perturb_adaptive",
        Alone,
        dict(rule="perturb_adaptive", numbers=dict(radius=0.05, scale=1.2, eps=1e-3)),
        None,
        (4.0, 0.0, 0.0),
    ),
]
ALL_RULES = [*OPTIMIZERS, *BEYOND]
BY_RULE = {row.rule: row for row in ALL_RULES}
WITH_PEER = [row for row in OPTIMIZERS if row.peer is not None]
#: One row per class, for what does not depend on the rule.
CLASSES = [
    BY_RULE[rule]
    for rule in (
        "sgd_momentum",
        "sgdw_momentum",
        "adam",
        "adamw",
        "adagrad",
        "adagradw",
        "rmsprop_centered_momentum",
        "rmspropw_momentum",
        "lion",
    )
]
#: One row per number of states, for what depends on where operands lie.
BY_STATES = [BY_RULE[rule] for rule in ("sgd", "sgd_momentum", "adamw", "adamw_amsgrad")]
#: Those that torch has too.
DROP_INS = [row for row in CLASSES if row.peer is not None]


def stock(row: Optimizer):
    """What a row is compared with: torch's class, or where torch has none ours on the reference backend."""
    return row.peer or functools.partial(row.cls, backend="reference")


#: Rules that overwrite their parameter or their first state, and so do not load it.
OVERWRITING = ("average", "perturb", "perturb_adaptive")
