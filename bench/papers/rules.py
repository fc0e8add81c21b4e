"""Adam or Gauss-Newton: rules in bases, with the axes on which their hyper-parameters are searched (arXiv 2510.13680)."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import precond

from .contenders import SECOND
from .search import Axis, Point

#: Of means of gradients, for every rule but SGD, which searches its momentum.
BETA1 = 0.9
POWERS = {"GN^-1": -1.0, "GN^-1/2": -0.5}
LR = Axis("lr", 0.05, 4.0, (-2, -1, 0, 1), halvings=1)
DAMPING = Axis("damping", 0.1, 10.0, (-2, -1, 0, 1), lowest=(-6, 0.0))
AXES = {
    "SGD": (
        dataclasses.replace(LR, start=0.0125),
        Axis("one_minus_momentum", 0.1, 10**0.5, (-1, 0, 1), highest=(2, 1.0)),
    ),
    "Adam": (
        dataclasses.replace(LR, start=0.0125),
        *SECOND["Adam"],
    ),
    "GN^-1": (LR, DAMPING),
    "GN^-1/2": (LR, DAMPING),
    "Sophia": (dataclasses.replace(LR, start=0.0125), Axis("rho", 0.04, 4.0, (-2, -1, 0, 1))),
}
#: The damping that is not relative.
EPS = Axis("eps", 1e-3, 10.0, (-2, -1, 0, 1), lowest=(-9, 1e-12))
#: State formats that a report tries at the best point.
FORMATS = ("bf16", "fp16")
#: 1 - beta2 at which Adam is tried in fp16 too: its second moment starts at 0, at 1 - beta2 times a squared gradient.
USUAL = 0.01


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule in a basis of the Gauss-Newton matrix, or ``share`` of the way to it from the coordinates."""

    rule: str
    basis: str = "identity"
    share: float = 1.0
    #: "eps": in place of the relative damping. "class": the class's own basis and curvature, fed one mean gradient on drawn
    #: labels at a time, as a user does. "published": the options of Sophia's code, all but the learning rate.
    kind: str = ""

    #: A rule is compared with all others, it has no base of its own and no default to price.
    is_default, usual = False, {}
    #: What a report has of the best point alone.
    of_best = ("curve", "cosine")

    @property
    def name(self) -> str:
        share = f" at s = {self.share:g}" if self.share != 1.0 else ""
        by = f", {self.kind}" if self.kind else ""
        return f"{self.rule}, {self.basis}{share}{by}"

    @property
    def base(self) -> str:
        return self.name

    @property
    def axes(self) -> tuple[Axis, ...]:
        lr, *second = AXES[self.rule]
        if self.kind == "published":
            return (lr,)
        return (lr, EPS) if self.kind == "eps" else (lr, *second)

    @property
    def is_curved(self) -> bool:
        """Whether the rule takes estimates of the curvature."""
        return self.rule in POWERS and self.kind != "class"

    @property
    def frame(self) -> str:
        """The basis that the harness turns to."""
        return "identity" if self.kind == "class" else self.basis

    @property
    def fed_every(self) -> int:
        """Steps between mean gradients on drawn labels, as published for Sophia; 0: none."""
        return 10 if self.rule == "Sophia" else 1 if self.kind == "class" else 0

    def described(self) -> dict[str, Any]:
        axes = [dataclasses.asdict(axis) for axis in self.axes]
        return json.loads(json.dumps({**dataclasses.asdict(self), "axes": axes, "beta1": BETA1}))

    def tried(self) -> list[str]:
        usual = ["usual", "usual, fp16"] if self.rule == "Adam" else []
        return [*FORMATS, *usual] if self.has_formats else []

    @property
    def has_formats(self) -> bool:
        return self.rule not in ("SGD", "Sophia") and self.share == 1.0 and not self.kind

    def others(self, searched: dict[str, Any], base: dict[str, Any], priced: dict[str, Any] | None) -> dict[str, Point]:
        points = {}
        for kind in self.tried():
            form = kind.removeprefix("usual").removeprefix(", ")
            points[kind] = {**searched["best"], **({"state_format": form} if form else {})}
            if kind.startswith("usual"):
                points[kind]["one_minus_beta2"] = USUAL
        return points

    def optimizer(
        self, parameters: Sequence[Sequence[nn.Parameter]], points: Sequence[Point], beta2: float
    ) -> torch.optim.Optimizer:
        """A group for each point. ``beta2`` is that of the curvature's mean."""
        groups: list[dict[str, Any]] = []
        for of, point in zip(parameters, points, strict=True):
            group: dict[str, Any] = dict(point, params=list(of))
            if self.rule == "SGD":
                group["momentum"] = 1.0 - group.pop("one_minus_momentum")
            elif self.rule == "Adam":
                group["betas"] = (BETA1, 1.0 - group.pop("one_minus_beta2"))
            groups.append(group)
        if self.rule == "SGD":
            return precond.SGD(groups)
        if self.rule == "Adam":
            return precond.Adam(groups)
        if self.rule == "Sophia":
            # Its decay is for large models: at 0.1 of a learning rate it is none here.
            return precond.Sophia(groups)
        options: dict[str, Any] = {"betas": (BETA1, beta2), "power": POWERS[self.rule]}
        if self.kind == "class":
            return precond.GaussNewton(groups, **options, basis=self.basis)
        return precond.GaussNewton(groups, **options, curvature="hutchinson")


THREE = ("Adam", *POWERS)
BASES = ("identity", "kronecker", "full")
QUADRANTS = (Rule("SGD"), *(Rule(rule, basis) for basis, rule in itertools.product(BASES, THREE)))
SHARES = (0.25, 0.5, 0.75)
GEODESIC = tuple(Rule(rule, "full", share) for rule, share in itertools.product(THREE, SHARES))
BY_EPS = tuple(Rule(rule, kind="eps") for rule in POWERS)
OF_CLASS = tuple(Rule(rule, "kronecker", kind="class") for rule in POWERS)
SOPHIA = (Rule("Sophia"), Rule("Sophia", kind="published"))
#: Batches: all data, or a few.
SIZES = ("full", "small")
OF = {
    "regression": (*QUADRANTS, *GEODESIC),
    "softmax": (*QUADRANTS, *GEODESIC),
    "parity": (*QUADRANTS, *BY_EPS),
    "staircase": (*QUADRANTS, *BY_EPS),
    "transformer": (*QUADRANTS, *BY_EPS, *SOPHIA),
}
METHODS = {f"{problem}-{size}": of for problem, of in OF.items() for size in SIZES}
for _task in ("parity-small", "transformer-small"):
    METHODS[_task] = (*METHODS[_task], *OF_CLASS)
