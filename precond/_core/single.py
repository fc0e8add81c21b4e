"""Steps of single parameters, which together are one step of an optimizer."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from .engine import Engine
from .norm import NormClasses
from .optimizer import FusedOptimizer
from .passes import NO_STATES, JobStates, plain_step
from .precision import at_stated_precision
from .remainders import Remainders
from .rows import Control, Group, PartOfStep, Row, Step, name_of

#: What a group of one parameter has that the parameter's own has not.
_OWN = frozenset(("params", "param_names", "_called"))


class Place:
    """A parameter where it stands, as a group of its own. Between steps it keeps no tensor alive."""

    def __init__(self, group: Group, index: int, position: int) -> None:
        self.group, self.index, self.position = group, index, position
        #: Plans are kept by the ids of groups.
        self._alone: Group = {}
        self._measured: Group = {}

    @property
    def name(self) -> str:
        """What errors call the parameter."""
        return name_of(self.group, self.index, self.position)

    def alone(self) -> Group:
        """Its group with this parameter alone."""
        group = self._alone
        group.clear()
        group.update(self.group, params=[self.group["params"][self.position]], _called=[self.name])
        if "param_names" in group:
            group["param_names"] = [group["param_names"][self.position]]
        return group

    def close(self) -> None:
        """After a step of it alone: what the step has noted in the group is the whole group's."""
        for key, value in self._alone.items():
            if key not in _OWN and self.group.get(key) is not value:
                self.group[key] = value
        self._alone.clear()

    @contextlib.contextmanager
    def measured(self) -> Iterator[Group]:
        """As a group that is only measured."""
        self._measured.update(params=[self.group["params"][self.position]], _called=[self.name])
        try:
            yield self._measured
        finally:
            self._measured.clear()


class Single:
    """Steps and measures single parameters of an optimizer."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._owner = weakref.ref(optimizer)
        self._measuring: Engine | None = None

    @property
    def _optimizer(self) -> FusedOptimizer:
        optimizer = self._owner()
        assert optimizer is not None
        return optimizer

    def prepare(self, count: int) -> None:
        """Before the first of so many parameters in a step: random bits are named by places among all."""
        states, engine = self._optimizer.states, self._optimizer.engine
        states.name_streams()
        # Of each parameter one that measures and one that does not, and room for some that change.
        for each in (engine, *([] if self._measuring is None else [self._measuring])):
            each.plans_kept = max(each.plans_kept, 2 * count + 64)
        if engine.offload is not None:
            engine.offload.prepare(count)

    def step(self, place: Place, part: PartOfStep) -> None:
        """Update a parameter that has a gradient."""
        optimizer = self._optimizer
        groups, optimizer.param_groups = optimizer.param_groups, [place.alone()]
        optimizer._partial = part
        try:
            _update(optimizer)
        finally:
            optimizer.param_groups, optimizer._partial = groups, None
            place.close()

    def rest(self, part: PartOfStep) -> None:
        """Update all parameters that have a gradient."""
        self._optimizer._partial = part
        try:
            _update(self._optimizer)
        finally:
            self._optimizer._partial = None

    def norms(self, place: Place, classes: NormClasses, *, inf: bool) -> Tensor:
        """For each class the sum of squares, or the largest magnitude, of a parameter's gradient."""
        if self._measuring is None:
            self._measuring = Engine(JobStates((), Remainders()), self._optimizer.engine.checks)
            self._measuring.plans_kept = self._optimizer.engine.plans_kept
        with place.measured() as group:
            step = Step([group], NO_STATES, {}, [Row("sgd", 1.0, plain_step(0.0, 0.0))], Control())
            return self._measuring.norms(step, classes, inf=inf)


@torch._disable_dynamo  # type: ignore[attr-defined]
@at_stated_precision
def _update(optimizer: FusedOptimizer) -> None:
    optimizer._update()


def places_of(groups: list[Group]) -> dict[int, Place]:
    """The places of all parameters, by the parameters' ids."""
    return {
        id(p): Place(group, index, position)
        for index, group in enumerate(groups)
        for position, p in enumerate(group["params"])
    }
