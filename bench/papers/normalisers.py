"""Batch normalisation preconditioning (BNP) and what it is compared with: plain optimizers, layers in the network."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import precond

from .search import Axis, Point

MOMENTUM = 0.9
AXES = {
    name: (Axis("lr", start, 4.0, (-2, -1, 0, 1, 2), halvings=1),) for name, start in (("SGD", 0.05), ("Adam", 0.005))
}
#: The momentum of BatchNorm's running statistics, torch's default the first: of batches of 1 to 8 they are the noisier, the
#: larger it is.
RUNNING = Axis("running", 0.1, 10**0.5, (-2, -1, 0), highest=(2, 1.0))
#: The least variance that BNP divides by, relative to the layer's largest; the default is the start.
LEAST = Axis("eps1", 1e-2, 10.0, (-1, 0, 1), lowest=(-3, 0.0))
#: The class's other defaults.
CONSTANTS = {"stat_momentum": 0.99, "eps2": 1e-4}
#: What a layer's gradient is divided by, beside s^2: by the class, which has no q in a direction, and by others.
Q2 = {
    "BNP": "max(m, rows) / samples",
    "BNP, direction": "1",
    "BNP, q of rows": "max(m / rows, 1)",
    "BNP, q of images": "max(m / samples, 1)",
}
#: What BNP is around each optimizer. Adam undoes the scaling of a gradient, so around it BNP acts on the direction.
BNPS = {"SGD": "BNP", "Adam": "BNP, direction"}
#: Layers in the network, with parameters of their own.
LAYERS = ("BatchNorm", "GroupNorm")


@dataclasses.dataclass(frozen=True)
class Normalised:
    """An optimizer on a network, with one way to normalise."""

    base_optimizer: str
    #: Empty for none, a key of ``Q2``, or one of ``LAYERS``.
    norm: str = ""

    is_default = False
    #: What a report has of the best point alone.
    of_best = ("curve", "conditions")

    @property
    def name(self) -> str:
        return f"{self.base_optimizer}, {self.norm}" if self.norm else self.base_optimizer

    @property
    def base(self) -> str:
        return self.base_optimizer

    @property
    def axes(self) -> tuple[Axis, ...]:
        second = (LEAST,) if self.is_bnp else (RUNNING,) if self.norm == "BatchNorm" else ()
        return AXES[self.base_optimizer] + second

    @property
    def usual(self) -> dict[str, float]:
        """BNP's default, at which the learning rate is searched too."""
        return {LEAST.name: LEAST.start} if self.is_bnp else {}

    @property
    def is_bnp(self) -> bool:
        return self.norm in Q2

    @property
    def layer(self) -> str:
        """The layers that the network has more, or empty."""
        return self.norm if self.norm in LAYERS else ""

    def described(self) -> dict[str, Any]:
        axes = [dataclasses.asdict(axis) for axis in self.axes]
        momentum = {"momentum": MOMENTUM} if self.base_optimizer == "SGD" else {}
        constants = {**CONSTANTS, "q2": Q2[self.norm]} if self.is_bnp else {}
        return json.loads(json.dumps({**dataclasses.asdict(self), "axes": axes, **momentum, **constants}))

    def tried(self) -> list[str] | None:
        return ["swapped"] if self.norm == BNPS["Adam"] else None

    def others(self, searched: dict[str, Any], base: dict[str, Any], priced: dict[str, Any] | None) -> dict[str, Point]:
        """BNP with its default, at its best learning rate for that; around Adam also at that of Adam alone."""
        swapped = {"swapped": {**self.usual, "lr": base["best"]["lr"]}} if self.tried() else {}
        return {"usual": searched["usual"], **swapped} if self.usual else {}

    def optimizer(self, parameters: Sequence[Sequence[nn.Parameter]], points: Sequence[Point]) -> torch.optim.Optimizer:
        """A group for each point."""
        groups = [dict(lr=point["lr"], params=list(of)) for of, point in zip(parameters, points, strict=True)]
        return precond.SGD(groups, momentum=MOMENTUM) if self.base_optimizer == "SGD" else precond.Adam(groups)


METHODS_OF = {name: tuple(Normalised(name, norm) for norm in ("", of_bnp, *LAYERS)) for name, of_bnp in BNPS.items()}
NETS, SIZES = ("dense", "conv"), (1, 2, 4, 8)


#: The class as it was, and between. In convolutional networks alone: a dense layer has as many rows as samples.
OF_ROWS, OF_IMAGES = Normalised("SGD", "BNP, q of rows"), Normalised("SGD", "BNP, q of images")
#: Convolutional networks that end in a mean over positions, for what q they want.
MEANS = ("mean-1", "mean-8", "mean-large")


def of_task(net: str, size: int) -> tuple[Normalised, ...]:
    """All but BatchNorm of one image in a dense network, for which torch raises: a convolution has positions."""
    every = itertools.chain(*METHODS_OF.values(), (OF_ROWS,) if net == "conv" else ())
    return tuple(method for method in every if not (method.norm == "BatchNorm" and (net, size) == ("dense", 1)))


METHODS = {
    **{f"{net}-{size}": of_task(net, size) for net in NETS for size in SIZES},
    **{f"online-{net}": of_task(net, 1) for net in NETS},
    **{task: (Normalised("SGD"), Normalised("SGD", "BNP"), OF_ROWS, OF_IMAGES) for task in MEANS},
}
