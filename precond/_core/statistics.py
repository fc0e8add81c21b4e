"""What a step finds out about each parameter while it updates it: sums of csrc/plan/statistics.h, added up over the processes
that have pieces of one, and what they come to.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.statistics import SUMS
from . import backend as _backend
from .norm import shard_classes
from .rows import Group, Step, parameters
from .sharding import home, local

#: The sum that is none: the largest of all pieces.
_LARGEST = SUMS.index("largest_update")
#: The columns of a step's statistics; Statistics says what they are.
COLUMNS = (
    "grad_rms", "param_rms", "update_rms", "update_ratio", "cosine", "nonfinite", "lost", "arrived", "largest_update",
)  # fmt: skip


class Extras(NamedTuple):
    """What a step does besides updating, csrc/plan/statistics.h. Tensors have a row for each parameter of the step."""

    #: float64 (parameters, SUMS), which the step writes; None: no statistics are taken.
    sums: Tensor | None = None
    #: float32 (parameters,): what updates are multiplied with; None: 1.
    factors: Tensor | None = None
    #: True: nothing is updated, and an update is without a decay.
    only: bool = False

    def compiled(self) -> Any:
        """As the compiled plans take it: addresses in place of tensors."""
        return _compiled_nothing() if self is NO_EXTRAS else _compiled(self)

    @property
    def of_reference(self) -> str | None:
        """As ``precond.reference.update`` takes it."""
        return None if self.sums is None else "only" if self.only else "statistics"


NO_EXTRAS = Extras()


def _compiled(extras: Extras) -> Any:
    assert _backend._C is not None
    addresses = {
        name: 0 if t is None else t.data_ptr() for name, t in (("sums", extras.sums), ("factors", extras.factors))
    }
    return _backend._C.Extras(**addresses, only=extras.only)


@functools.cache
def _compiled_nothing() -> Any:
    return _compiled(NO_EXTRAS)


class Statistics(NamedTuple):
    """What one step found out about each parameter.

    Tensors are on the device of the parameters, and nothing waits for it until a number is asked for. Complex elements count as
    two numbers. The columns:

    ==============  ======================================================================================================
    grad_rms        root mean square of the gradient, as the step takes it: unscaled and clipped
    param_rms       that of the parameter before the step
    update_rms      that of the update: what the step takes from the parameter, decay included, before it is rounded
    update_ratio    update_rms / param_rms
    cosine          of update and gradient; 1 goes straight down the gradient
    nonfinite       how many elements of the gradient are inf or NaN
    lost            share of the elements that have an update and are stored as they were
    arrived         u a / u u, of updates u and of what stored parameters have moved by, a: 1 where rounding loses nothing
    largest_update  largest magnitude of an element's update
    ==============  ======================================================================================================

    Attributes:
        values: float64, (parameters, columns), the parameters in the order of ``param_groups``. A row of NaN had no element that
            the step has moved by a gradient.
        columns: their names.
        params: names of the parameters: as ``param_names`` has them, or "0.1" for parameter 1 of group 0.
        total: float64, (columns,): of all elements of all parameters.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = precond.SGD([("w", w)], lr=0.1, statistics=True)
        >>> w.grad = torch.tensor([1.0, 0.0])
        >>> opt.step()
        >>> found = opt.statistics
        >>> {name: round(value, 3) for name, value in found.scalars().items() if name.startswith("cosine")}
        {'cosine/w': 1.0, 'cosine/all': 1.0}
        >>> print(found.table(columns=("grad_rms", "param_rms", "lost")))
        parameter  grad_rms  param_rms  lost
        w             0.707       3.54     0
        all           0.707       3.54     0
    """

    values: Tensor
    columns: tuple[str, ...]
    params: tuple[str, ...]
    total: Tensor

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Numbers by names that TensorBoard groups: "lost/layers.0.weight", and "lost/all" for all parameters. Waits for the
        device.

        Args:
            prefix: before each name (default none).

        Returns:
            What ``SummaryWriter.add_scalar`` takes one by one, and ``wandb.log`` as it is. Parameters without a gradient are left
            out.
        """
        rows = torch.cat([self.values, self.total[None]]).tolist()
        return {
            f"{prefix}{column}/{param}": row[k]
            for k, column in enumerate(self.columns)
            for param, row in zip((*self.params, "all"), rows, strict=True)
            if param == "all" or any(number == number for number in row)
        }

    def table(self, columns: Iterable[str] | None = None) -> str:
        """A table to print: a line for each parameter and one for all. Waits for the device.

        Args:
            columns: names of those to show, or one; None (default): all.

        Raises:
            ValueError: there is no such column.
        """
        shown = self.columns if columns is None else (columns,) if isinstance(columns, str) else tuple(columns)
        for name in shown:
            if name not in self.columns:
                raise ValueError(f"columns must be among {', '.join(self.columns)}, got {name!r}")
        rows = torch.cat([self.values, self.total[None]]).tolist()
        places = [self.columns.index(name) for name in shown]
        lines = [["parameter", *shown]]
        lines += [
            [param, *(f"{row[k]:.3g}" for k in places)] for param, row in zip((*self.params, "all"), rows, strict=True)
        ]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if k else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


#: Of each group the names of its parameters, None where it has none, and their number.
Labels = list[tuple[list[str] | None, int]]


def labels_of(groups: list[Group]) -> Labels:
    """As groups are in a step: they may be others when somebody reads what it found."""
    return [(group.get("param_names"), len(group["params"])) for group in groups]


def made_of(sums: Tensor, labels: Labels) -> Statistics:
    """The statistics of all parameters, from their sums."""
    whole = sums.sum(0)
    whole[_LARGEST] = _largest(sums[:, _LARGEST]) if len(sums) else 0.0
    values = _columns(torch.cat([sums, whole[None]]))
    names = tuple(
        f"{index}.{position}" if names is None else names[position]
        for index, (names, count) in enumerate(labels)
        for position in range(count)
    )
    return Statistics(values[:-1], COLUMNS, names, values[-1])


def _columns(sums: Tensor) -> Tensor:
    of = dict(zip(SUMS, sums.unbind(1), strict=True))
    n = of["elements"]
    there = n > 0

    def rms(name: str) -> Tensor:
        return (of[name] / n).sqrt()

    grad, param, update = (rms(f"{name}_squares") for name in ("grad", "param", "update"))
    found = {
        "grad_rms": grad,
        "param_rms": param,
        "update_rms": update,
        "update_ratio": update / param,
        "cosine": of["update_grad"] / (of["update_squares"].sqrt() * of["grad_squares"].sqrt()),
        "nonfinite": of["nonfinite"],
        "lost": of["lost"] / n,
        "arrived": of["update_arrived"] / of["update_squares"],
        "largest_update": of["largest_update"],
    }
    return torch.stack([torch.where(there, found[name], torch.nan) for name in COLUMNS], 1)


def _largest(magnitudes: Tensor) -> Tensor:
    """As bits, where NaN is the largest."""
    return magnitudes.contiguous().view(torch.int64).amax().view(torch.float64)


class Shared:
    """Parameters whose sums are added up over processes."""

    def __init__(self, groups: list[Group]) -> None:
        of, over = shard_classes(groups)
        #: Of each class the process groups.
        self.over = over
        numbers = [of[p] for group in groups for p in group["params"]]
        self._classes = [
            ([place for place, number in enumerate(numbers) if number == k], groups)
            for k, groups in enumerate(over)
            if groups
        ]
        #: The numbers of each class on the device of the sums.
        self._rows: list[Tensor] = []

    def reduce(self, sums: Tensor) -> None:
        """Add up in place. Every process that has a piece of these parameters comes here, with the same ones."""
        if self._classes and (not self._rows or self._rows[0].device != sums.device):
            self._rows = [torch.tensor(numbers, device=sums.device) for numbers, _ in self._classes]
        for rows, (_, over) in zip(self._rows, self._classes, strict=True):
            part = sums[rows]
            largest = part[:, _LARGEST].contiguous().view(torch.int64)
            for group in over:
                torch.distributed.all_reduce(part, group=group)
                torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
            part[:, _LARGEST] = largest.view(torch.float64)
            sums[rows] = part


def sums_for(step: Step, device: torch.device) -> Tensor:
    """Sums of a step's parameters that nothing has been added to."""
    return torch.zeros(len(parameters(step)), len(SUMS), dtype=torch.float64, device=device)


#: The least share of elements that what a mask leaves is divided by: that of its authors' code.
_LEAST_SHARE = 1e-3


def factors_of(step: Step, sums: Tensor) -> Tensor:
    """What updates are multiplied with, of each parameter: float32. ``sums``: of updates without a decay, in a pass that stores
    nothing, so that each of them that is not 0 is lost.

    torch's sqrt of float64 has the last bit wrong now and then, another one on each device (0.6 % on an H100); rounded to
    float32, factors are the same but for about one in 10^9.
    """
    assert step.scaled is not None
    of = dict(zip(SUMS, sums.unbind(1), strict=True))
    factors, begin = [], 0
    for group, row, scaled in zip(step.groups, step.rows, step.scaled, strict=True):
        end = begin + len(group["params"])
        n = of["elements"][begin:end].clamp(min=1.0)
        factor = torch.ones_like(n)
        if scaled.rescale:
            factor = factor / (of["lost"][begin:end] / n).clamp(min=_LEAST_SHARE)
        if scaled.max_rms is not None:
            lr = row.hyper["lr"]
            most = (lr.to(n).reshape(()) if isinstance(lr, Tensor) else lr) * scaled.max_rms
            rms = (of["update_squares"][begin:end] / n).sqrt() * factor
            factor = torch.where(rms > most, factor * (most / rms), factor)
        factors.append(factor)
        begin = end
    return torch.cat(factors).float()


#: Sets of rows: which parameters have a gradient may differ from step to step.
_PLACES_KEPT = 64


class Collected:
    """The sums of a step of several passes: a row for each of its parameters, whichever pass finds them."""

    def __init__(self, groups: list[Group]) -> None:
        params = [p for group in groups for p in group["params"]]
        self.sums = torch.zeros(len(params), len(SUMS), dtype=torch.float64, device=home(groups))
        self.labels = labels_of(groups)
        #: The row of each parameter, by its id.
        self._rows = {id(p): row for row, p in enumerate(params)}
        self._shared = Shared(groups) if any(hasattr(p, "placements") for p in params) else None
        #: The rows of each pass on the device: a step that is captured into a graph could not copy them there.
        self._places: dict[tuple[int, ...], Tensor] = {}
        #: True once a pass has found something.
        self.any = False

    def fits(self, groups: list[Group]) -> bool:
        """True if a step of these groups has the same parameters."""
        return [id(p) for group in groups for p in group["params"]] == list(self._rows) and self.sums.device == home(
            groups
        )

    def begin(self, groups: list[Group]) -> Collected:
        """Collect those of another step."""
        self.sums.zero_()
        self.labels, self.any = labels_of(groups), False
        return self

    def add(self, params: list[Tensor], found: Tensor) -> None:
        """What a pass has found about these parameters."""
        self.any = True
        rows = tuple(self._rows[id(p)] for p in params)
        places = self._places.get(rows)
        if places is None:
            if len(self._places) >= _PLACES_KEPT:
                self._places = {}
            places = self._places[rows] = torch.tensor(rows, dtype=torch.int64, device=self.sums.device)
        self.sums[places] = found.to(self.sums.device)

    def total(self) -> Tensor | None:
        """What all passes have found, added up over processes: each of them comes here. None: nothing."""
        if self._shared is not None:
            self._shared.reduce(self.sums)
        return self.sums if self.any or self._shared is not None else None

    def kept(self) -> list[Tensor]:
        """What a graph that was captured from this step writes and reads."""
        return [self.sums, *self._places.values()]


def put_together(step: Step, extras: list[Extras]) -> Tensor:
    """The sums of the parameters of several backends, of which each has rows of its own, on the first one's device."""
    parts = [extra.sums for extra in extras if extra.sums is not None]
    total = parts[0] if parts else sums_for(step, home(step.groups))  # a process may have no gradient
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def real(t: Tensor) -> Tensor:
    """The local numbers of a tensor."""
    plain = local(t)
    return torch.view_as_real(plain) if plain.is_complex() else plain
