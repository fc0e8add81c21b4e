"""What the experiments compare: optimizers with the axes on which their hyper-parameters are searched."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import precond

from .search import Axis, Point
from .stacked import Networks

Groups = list[dict[str, Any]]

#: Factors of 4 between neighbours at first, of 2 at last.
LR = Axis("lr", 0.05, 4.0, (-2, -1, 0, 1, 2), halvings=1)
LR_ADAPTIVE = dataclasses.replace(LR, start=0.005)
#: Each base but plain SGD has a second hyper-parameter of its own to search, so that it has about as many points as FOP around
#: it. SGD has a quarter of FOP's; "momentum" contains it.
SECOND = {
    "SGD": (),
    "momentum": (Axis("one_minus_momentum", 0.1, 10**0.5, (-2, -1, 0, 1, 2), highest=(2, 1.0)),),
    # With 1 - beta2 far below 1 / steps a corrected second moment is the mean of all squares, whatever beta2 is.
    "Adam": (Axis("one_minus_beta2", 0.01, 10.0, (-2, -1, 0, 1), lowest=(-3, 1e-5), highest=(2, 1.0)),),
    "RMSprop": (Axis("one_minus_alpha", 0.01, 10.0, (-2, -1, 0, 1), highest=(2, 1.0)),),
}
FIRST = {"SGD": LR, "momentum": dataclasses.replace(LR, start=0.0125), "Adam": LR_ADAPTIVE, "RMSprop": LR_ADAPTIVE}
#: What a base takes where its second hyper-parameter is not searched: the defaults of torch.
USUAL = {
    "SGD": {},
    "momentum": {"one_minus_momentum": 0.1},
    "Adam": {"one_minus_beta2": 1e-3},
    "RMSprop": {"one_minus_alpha": 1e-2},
}


def base_optimizer(name: str, groups: Groups) -> torch.optim.Optimizer:
    """Groups have the point's names; precond's classes take theirs."""
    for group in groups:
        if name == "momentum":
            group["momentum"] = 1.0 - group.pop("one_minus_momentum")
        elif name == "Adam":
            group["betas"] = (0.9, 1.0 - group.pop("one_minus_beta2"))
        elif name == "RMSprop":
            group["alpha"] = 1.0 - group.pop("one_minus_alpha")
    kinds = {"SGD": precond.SGD, "momentum": precond.SGD, "Adam": precond.Adam, "RMSprop": precond.RMSprop}
    return kinds[name](groups)


#: ``hyper_lr`` of one who does not search, but tries three at the learning rate of the base, with one seed.
THREE_RUNS = (1e-3, 1e-2, 0.3)
#: Factor of a base's learning rate, for a control: a base that is tuned for its end may be faster on its way.
HASTE = 2.0


def default_hyper_lr() -> float:
    """That of the class."""
    return inspect.signature(precond.FOP).parameters["hyper_lr"].default


def swapped(hyper_lr: float) -> str:
    """The kind of run at the base's learning rate."""
    return f"swapped, {hyper_lr:g}"


SCALE_FREE = ("hypergradient",)
#: Seeds of which a report has the eigenvalues of M.
SPECTRA = 10


@dataclasses.dataclass(frozen=True)
class Method:
    """A base, alone or with FOP around it. ``normalize`` is a tuple, so that a method has a hash."""

    base: str
    mode: str = ""
    normalize: tuple[str, ...] = ()
    compose: str = "gradient"

    #: What a report has of the best point alone.
    of_best = ("preconditioners",)

    @property
    def name(self) -> str:
        if not self.mode:
            return self.base
        names = (self.mode, *(self.normalize or ("raw",)), *(("direction",) if self.compose == "direction" else ()))
        return f"FOP({self.base}), {', '.join(names)}"

    @property
    def is_default(self) -> bool:
        """Whether FOP's own defaults are of this kind: around plain SGD, M of steps and M of gradients are one method."""
        return self.normalize == SCALE_FREE and (self.compose == "direction" or self.base == "SGD")

    @property
    def axes(self) -> tuple[Axis, ...]:
        lr = FIRST[self.base]
        if not self.mode:
            return lr, *SECOND[self.base]
        if "hypergradient" in self.normalize:
            return lr, Axis("hyper_lr", 1e-2, 10**0.5, (-2, -1, 0, 1, 2), lowest=(-6, 0.0))
        return lr, Axis("hyper_lr", 1.0, 10.0, (-2, -1, 0, 1, 2), lowest=(-6, 0.0))

    @property
    def usual(self) -> dict[str, float]:
        """The second hyper-parameter of a base where it is not searched."""
        return {} if self.mode else USUAL[self.base]

    def tried(self) -> list[float] | None:
        """What a report tries beside what a search has found: each ``hyper_lr``, the default first, or a base's haste."""
        if not self.mode:
            return [HASTE]
        return [default_hyper_lr(), *THREE_RUNS] if self.is_default else None

    def others(self, searched: dict[str, Any], base: dict[str, Any], priced: dict[str, Any] | None) -> dict[str, Point]:
        """Points of a report beside the best one: for a base with its usual second hyper-parameter, and that in haste; for FOP
        with the default ``hyper_lr``, at the best learning rate for it and at that of the base, and with three others at that.
        """
        if not self.mode:
            hasty = {**searched["usual"], "lr": HASTE * searched["usual"]["lr"]}
            return {"usual": searched["usual"], "hasty": hasty}
        if priced is None:
            return {}
        default = default_hyper_lr()
        at = next(of["at"] for of in priced["points"] if math.isclose(of["at"]["hyper_lr"], default, rel_tol=1e-3))
        swaps = {swapped(of): {"lr": base["usual"]["lr"], "hyper_lr": of} for of in (default, *THREE_RUNS)}
        return {"default": at, **swaps}

    def described(self) -> dict[str, Any]:
        """What a record is of: the options, what a base has by default, and the axes."""
        axes = [dataclasses.asdict(axis) for axis in self.axes]
        # As JSON gives it back, so that it compares equal.
        return json.loads(json.dumps({**dataclasses.asdict(self), "axes": axes, "usual": USUAL[self.base]}))

    def optimizers(
        self, parameters: list[list[list[nn.Parameter]]], points: Sequence[Point]
    ) -> list[torch.optim.Optimizer]:
        """A group for each point. A whole FOP has one ``hyper_lr``, so there is one FOP for each of its values."""
        made = []
        order = sorted(range(len(points)), key=lambda i: points[i].get("hyper_lr", 0.0))
        for hyper_lr, at in itertools.groupby(order, key=lambda i: points[i].get("hyper_lr", 0.0)):
            groups = []
            for i in at:
                of_base = {k: v for k, v in {**USUAL[self.base], **points[i]}.items() if k != "hyper_lr"}
                groups.append({**of_base, "params": [p for of_seed in parameters[i] for p in of_seed]})
            optimizer = base_optimizer(self.base, groups)
            if self.mode:
                options = {"normalize": self.normalize, "compose": self.compose}
                optimizer = precond.FOP(optimizer, hyper_lr, self.mode, **options)
            made.append(optimizer)
        return made

    def inspect(
        self, optimizers: list[torch.optim.Optimizer], networks: Networks, records: list[list[dict[str, Any]]]
    ) -> None:
        """Add to the records of ``SPECTRA`` seeds the eigenvalues of every layer's M M^T, and of the first seed matrices of at
        most 9 rows themselves.
        """
        owns = [optimizer.own for optimizer in optimizers if isinstance(optimizer, precond.FOP)]
        for i, j in itertools.product(range(len(records)), range(min(len(records[0]), SPECTRA))):
            found: dict[str, Any] = {}
            for name, p in zip(networks.names, networks.parameters[i][j], strict=True):
                M = next((own[p]["preconditioner"] for own in owns if p in own), None)
                if M is None or p.dim() < 2:
                    continue
                P = (M @ M.T).double() if len(M) == len(M.T) == M.numel() ** 0.5 else None
                values = torch.linalg.eigvalsh(P) if P is not None else M.square().flatten().sort().values
                found[name] = {"eigenvalues": values.tolist()}
                if P is not None and len(P) <= 9 and j == 0:
                    found[name]["matrix"] = P.tolist()
            if found:
                records[i][j]["preconditioners"] = found


BASES = tuple(SECOND)
PLAIN = tuple(Method(base) for base in BASES)
#: "input" is the paper's channel mode of a convolution.
MODES = ("spatial", "input")
OF_GRADIENTS = tuple(Method(base, mode, SCALE_FREE) for base in BASES for mode in MODES)
#: Around plain SGD, whose step is the gradient, M of steps and M of gradients are one method.
OF_STEPS = tuple(Method(base, mode, SCALE_FREE, "direction") for base in BASES[1:] for mode in MODES)
OTHERS = (
    *(Method(base, "spatial") for base in BASES),
    *(Method(base, "spatial", (name, *SCALE_FREE)) for base in ("SGD", "Adam") for name in ("matrix", "step")),
)
#: Where every layer is dense, "spatial" is "input". M of gradients has shown what it does on images.
DENSE = (*PLAIN, *(method for method in (*OF_GRADIENTS, *OF_STEPS) if method.is_default and method.mode == "input"))
METHODS = {
    "digits": (*PLAIN, *OF_GRADIENTS, *OF_STEPS, *OTHERS),
    "cartpole": DENSE,
    "acrobot": DENSE,
    "fashion": (
        *PLAIN,
        *OF_GRADIENTS[:2],
        *(method for method in OF_GRADIENTS[2:] if method.mode == "spatial"),
        *OF_STEPS,
    ),
}
