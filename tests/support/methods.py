"""Every optimizer and wrapper as something that a training loop is handed: a function of the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from families import CLASSES
from torch import nn

import precond

KRONECKER = dict(lr=0.01, clip=1.0, curvature="gradient", basis="kronecker", basis_frequency=2)


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer of a model, and what a training loop must know of it."""

    name: str
    make: Callable[[nn.Module], torch.optim.Optimizer]
    #: torch's optimizer that takes the same steps within float32 rounding, or None.
    stock: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    #: The dtype of the model.
    dtype: torch.dtype = torch.float32
    #: The step evaluates a closure.
    closure: bool = False
    #: It needs whole matrices: sharded parameters raise.
    whole: bool = False
    #: It takes matrices alone: not the flat shards that some libraries make of them.
    matrices: bool = False
    #: Shards take the steps of the whole bit for bit.
    exact: bool = True
    #: For a wrapper: what puts it around any optimizer of a model. ``make`` puts it around its own.
    wrap: Callable[[nn.Module, torch.optim.Optimizer], torch.optim.Optimizer] | None = None

    def __str__(self) -> str:
        return self.name


def of_class(cls: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: cls(model.parameters(), **options)


def wrapper(name: str, wrap: Callable[[nn.Module, Any], torch.optim.Optimizer], base: Any, **options: Any) -> Method:
    return Method(name, lambda model: wrap(model, base(model)), wrap=wrap, **options)


def muon(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Of matrices alone; what nobody trains needs no gradients, which nobody would drop."""
    for p in model.parameters():
        p.requires_grad_(p.dim() == 2)
    return precond.Muon([p for p in model.parameters() if p.requires_grad], lr=0.01, **options)


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    """A method for each group, with one norm over all of them."""
    named = list(model.named_parameters())
    matrices, rest = ([item for item in named if (item[1].dim() > 1) == has] for has in (True, False))
    groups = [
        dict(params=matrices[:1], optimizer=precond.AdamW, lr=0.01),
        dict(params=matrices[1:], optimizer=precond.SGD, lr=0.1, momentum=0.9),
        dict(params=rest, optimizer=precond.DualDescent, granularity="tensor", lr=0.01, momentum=0.9),
    ]
    return precond.Grouped(groups, max_grad_norm=1.0)


#: A row per class of the table.
ELEMENTWISE = [
    Method(row.rule, of_class(row.cls, **row.kwargs), row.peer and of_class(row.peer, **row.kwargs)) for row in CLASSES
]
#: Classes that are no row of the table, in each mode that has states or arithmetic of its own.
METHODS = [
    Method("dual_entry", of_class(precond.DualDescent, lr=0.01, granularity="entry", momentum=0.9)),
    Method("dual_unit", of_class(precond.DualDescent, lr=0.01, granularity="unit", momentum=0.9)),
    # Shards add their squares up in another order.
    Method("dual_global", of_class(precond.DualDescent, lr=0.01, momentum=0.9), exact=False),
    Method("dual_spectral", of_class(precond.DualDescent, lr=0.01, granularity="spectral", momentum=0.9)),
    Method("muon", muon, matrices=True),
    Method("soap", of_class(precond.SOAP, lr=0.01, precondition_frequency=2)),
    Method("sophia", of_class(precond.Sophia, lr=0.01)),
    Method("gauss_newton", of_class(precond.GaussNewton, lr=0.01, clip=1.0, curvature="gradient")),
    Method("gauss_newton_kronecker", of_class(precond.GaussNewton, **KRONECKER)),
]
#: Methods in groups of one optimizer. Shards add their squares up in another order.
GROUPED = [
    Method("grouped", grouped, exact=False),
    Method(
        "grouped_muon",
        lambda model: precond.Grouped.for_model(
            model, matrices=dict(optimizer=precond.Muon, lr=0.01), rest=precond.AdamW
        ),
        matrices=True,
    ),
]
#: Formats of less than 32 bits.
FORMATS = [
    Method(
        "adamw_split24_int8",
        of_class(precond.AdamW, lr=0.01, weight_format="split24", state_format="int8"),
        dtype=torch.bfloat16,
    )
]
#: An average of the weights beside a method: in float32, and in codes, of a method that otherwise counts no steps.
AVERAGES = [
    Method("adamw_averaged", of_class(precond.AdamW, lr=0.01, ema_decay=0.5)),
    Method(
        "sgd_averaged_int8",
        of_class(precond.SGD, lr=0.1, weight_format="split24", ema_decay="equal", ema_start=1, ema_format="int8"),
        dtype=torch.bfloat16,
    ),
    Method("muon_averaged", functools.partial(muon, ema_decay=0.5), matrices=True),
    Method("soap_averaged", of_class(precond.SOAP, lr=0.01, precondition_frequency=2, ema_decay=0.5)),
]
WRAPPERS = [
    wrapper(
        "bnp",
        lambda model, base: precond.BNP(model, base, stat_momentum=0.5),
        of_class(precond.AdamW, lr=0.01),
        whole=True,
    ),
    wrapper(
        "fop",
        lambda model, base: precond.FOP(base, 0.05, "diagonal", normalize=None, compose="gradient"),
        of_class(precond.AdamW, lr=0.01),
    ),
    wrapper(
        "fop_direction",
        lambda model, base: precond.FOP(base, 5.0, "diagonal", normalize=None),
        of_class(precond.AdamW, lr=0.01),
    ),
    wrapper(
        "gradient_regularizer",
        lambda model, base: precond.GradientRegularizer(base, rho=0.05),
        of_class(precond.AdamW, lr=0.01),
        closure=True,
    ),
]
#: Wrappers around an optimizer that has states before its first step, which torch.distributed.checkpoint takes for all there are.
AROUND_STATES = [
    wrapper(
        "fop_adagrad",
        lambda model, base: precond.FOP(base, 0.05, "output", compose="gradient"),
        of_class(torch.optim.Adagrad),
        whole=True,
    ),
    wrapper(
        "bnp_adagradw",
        lambda model, base: precond.BNP(model, base, stat_momentum=0.5),
        of_class(precond.AdagradW),
        whole=True,
    ),
]
ALL = [*ELEMENTWISE, *METHODS, *GROUPED, *FORMATS, *AVERAGES, *WRAPPERS]
