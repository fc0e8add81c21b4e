"""Steps whose states are the host's: which parameters they concern, and how a step is shared with the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import compress
from typing import Any

from torch import Tensor

from .clipping import Begun, Report
from .engine import Engine
from .memory import Memory
from .norm import NOTHING
from .offloaded import HostChecks
from .passes import Beginning
from .plan import first_differs
from .rows import Group, Step, name_of
from .sharding import aligned_gradients, local
from .states import ParamStates
from .statistics import Collected
from .twins import HostStates, Twin, Twins, contiguous, to_device, to_host, why_not


class Offload:
    """What of an optimizer the host has: it takes its parameters out of each step and steps their twins."""

    def __init__(
        self, engine: Engine, states: ParamStates, seed: int, away: Callable[[Tensor], bool], written: Iterable[Tensor]
    ) -> None:
        """``engine``, ``states``: the optimizer's own, which have this object. ``away``: whether a parameter's states are the
        host's. ``written``: its split weights that others are known to write.
        """
        self._engine_of, self._states_of, self._away = weakref.ref(engine), weakref.ref(states), away
        key_of = weakref.WeakMethod(states.key_of)
        self._written = {id(p) for p in written}
        self.twins = Twins()
        self.states = HostStates(states.recipe, seed, self.twins, key_of)
        checks = engine.checks
        own = {**checks.settings, "max_grad_norm": None, "nonfinite": "propagate", "backend": None}
        self._host = Engine(
            self.states, HostChecks(checks.owner, frozenset(), own), Report(), may_only_make_states=True
        )
        self._beginning = Beginning(engine)
        #: By the ids of an optimizer's groups: those of the same parameters' twins, and of what stays on the device.
        self._groups: dict[int, tuple[Group, Group]] = {}
        #: The addresses of a step's parameters that are known to share no memory.
        self._apart: list[int] = []

    @property
    def _engine(self) -> Engine:
        engine = self._engine_of()
        assert engine is not None
        return engine

    @property
    def _states(self) -> ParamStates:
        states = self._states_of()
        assert states is not None
        return states

    # The step.

    def concerns(self, groups: list[Group]) -> bool:
        """True where a step of these groups has parameters whose states are the host's."""
        return any(self._away(p) for group in groups for p in group["params"])

    def run(self, step: Step, *, partial: bool) -> None:
        """A step of some parameters of the host and others. ``partial``: others of the same step come, or came, by themselves."""
        self.twins.partial = partial
        if not partial:
            self.twins.wait()
        begun = self._begin(step)
        if begun is None:
            return
        step = step._replace(
            control=begun.control, clip=begun.clip, inputs={**aligned_gradients(step.groups), **step.inputs}
        )
        into = None
        if step.measured and step.into is None:
            into = Collected(step.groups)
            step = step._replace(into=into)
        self._states.bind(step.state, step.groups)
        try:
            self._states.name_streams()  # by places among all, of which the device's and the host's steps have a part
            hosts, here = self._shared_out(step)
            if here is not None:
                self._engine.check_here(here)
            self._run_twins(hosts, step.state)
            if here is not None:
                self._engine.run_here(here)
        finally:
            self._states.bind({}, [])
            self.twins.in_step = {}
            for group in step.groups:  # which keep nothing alive
                for kept in self._groups.get(id(group), ()):
                    kept.update(params=[], _called=())
        if into is not None and (total := into.total()) is not None:
            self._engine.report.note(total, into.labels)

    def _begin(self, step: Step) -> Begun | None:
        """What the step does with its gradients; None: it is skipped."""
        if step.clip is not None:
            return Begun(step.control, step.clip)
        scaled = step.control.found_inf is not None or step.control.grad_scale is not None
        if self._engine.settings["max_grad_norm"] is None and not scaled:
            return Begun(step.control, NOTHING)
        may_skip = step.control.found_inf is not None or self._engine.settings["nonfinite"] == "skip"
        first = may_skip and any(
            first_differs(row) and any(not step.state.get(p) for p in group["params"])
            for group, row in zip(step.groups, step.rows, strict=True)
        )
        return self._beginning.find(step.groups, step.control, host_must_know=first)

    def _shared_out(self, step: Step) -> tuple[Step, Step | None]:
        """The step of twins, and that of what stays on the device; None where nothing does."""
        hosts, here, inputs = [], [], {}
        in_step: dict[int, tuple[Tensor, Twin]] = {}
        stays = False
        places: list[int] = []
        for index, group in enumerate(step.groups):
            number = index if step.numbers is None else step.numbers[index]
            away = [self._away(p) for p in group["params"]]
            of_host, of_device = self._groups.setdefault(id(group), ({}, {}))
            _be_some_of(of_host, group, number, away)
            _be_some_of(of_device, group, number, [not a for a in away])
            stays = stays or not all(away)
            for position, p in enumerate(of_host["params"]):
                twin = self._up_to_date(p, of_host, position)
                assert twin.seen is not None
                places.append(twin.seen[2])
                in_step[id(twin.host)] = (p, twin)
                if (g := step.input_of(p)) is not None:
                    inputs[twin.host] = contiguous(g)
                of_host["params"][position] = twin.host
            hosts.append(of_host)
            here.append(of_device)
            places += [local(p).data_ptr() for p in of_device["params"]]
        if not self.twins.partial and places != self._apart:
            self._apart = places if self._share_nothing(step) else []
        self.twins.in_step = in_step
        into = None if step.into is None else _OfTwins(step.into, in_step)
        of_twins = step._replace(groups=hosts, state=self.states.own, inputs=inputs, into=into)
        return of_twins, step._replace(groups=here) if stays else None

    def _share_nothing(self, step: Step) -> bool:
        """Raise where parameters that the step writes share memory, which their twins do not. False where others do."""
        numbers = range(len(step.groups)) if step.numbers is None else step.numbers
        params = [
            (p, group, number, position)
            for group, number in zip(step.groups, numbers, strict=True)
            for position, p in enumerate(group["params"])
        ]

        def about(i: int) -> tuple[str, bool]:
            p, group, number, position = params[i]
            return name_of(group, number, position), step.input_of(p) is not None

        owners = [(i, "") for i in range(len(params))]
        return not Memory().check([local(p) for p, *_ in params], owners, about)

    def _up_to_date(self, p: Tensor, group: Group, position: int) -> Twin:
        """A parameter's twin, as the parameter is."""
        twin = self.twins.get(p)
        if twin is None:
            if reason := why_not(p):
                raise RuntimeError(f"offload must be None for {group['_called'][position]}: {reason}")
            twin = self._new_twin(p)
        elif not twin.is_up_to_date(p):
            self._download(p, twin)
        return twin

    def _new_twin(self, p: Tensor) -> Twin:
        self._forget_twin(p)
        twin = self.twins.make(p)
        twin.download(p)
        self.states.remainders.forget(twin.host)
        if id(p) in self._written:
            self.states.remainders.expect(twin.host)
        return twin

    def _forget_twin(self, p: Tensor) -> None:
        """A parameter's twin, if it has one, is of no use any more."""
        self.twins.wait()
        host = self.twins.drop(p)
        if host is None:
            return
        if self.states.remainders.written([host]):
            self._written.add(id(p))
        self.states.remainders.forget(host)
        self.states.own.pop(host, None)

    def _download(self, p: Tensor, twin: Twin) -> None:
        """Take over what somebody else has made of a parameter."""
        self.twins.wait()
        written = twin.was_written(p)
        twin.download(p)
        if not written and self.states.remainders.watched([twin.host]):
            self.states.remainders.note([twin.host])  # as beside a parameter: only what a version counter shows is seen

    def _run_twins(self, hosts: Step, state: Any) -> None:
        """Step the twins, with the dictionaries of their parameters' states."""
        own = self.states.own
        for p, twin in self.twins.in_step.values():
            held = state.get(p)
            if held is None:
                own.pop(twin.host, None)
            elif own.get(twin.host) is not held:
                own[twin.host] = held
        try:
            self._host.run(hosts)
        finally:
            for p, twin in self.twins.in_step.values():
                held = own.get(twin.host)
                if held is None:
                    state.pop(p, None)
                elif state.get(p) is not held:
                    state[p] = held

    def join(self) -> None:
        """Have the current streams wait for the new parameters."""
        self.twins.join()

    def wait(self) -> None:
        """Until the host has done its part of all steps; raises what went wrong."""
        self.twins.wait()

    def deliver(self) -> None:
        """Until the new parameters are there too, for every stream."""
        self.twins.wait()
        self.twins.join(everywhere=True)

    def prepare(self, count: int) -> None:
        """Before steps of so many parameters, one by one."""
        self._host.plans_kept = max(self._host.plans_kept, 2 * count + 64)

    # Between steps.

    def moved(self, p: Tensor, state: dict[str, Any] | None, names: frozenset[str]) -> None:
        """The states of a parameter with these names are now the host's, or the device's."""
        self.deliver()
        device = local(p).device
        is_split = state is not None and "remainder" in state
        if self._away(p):
            if self._states.remainders.written([p]):
                self._written.add(id(p))
            self._states.remainders.forget(p)
            if (twin := self.twins.get(p)) is not None:
                twin.seen = None  # once more: the parameter is read again
            elif is_split:
                self.states.remainders.note([self._new_twin(p).host])
            if state is not None:
                to_host(state, names, device)
            return
        self._forget_twin(p)
        if id(p) in self._written:
            self._written.remove(id(p))
            self._states.remainders.expect(p)
        if is_split:
            self._states.remainders.note([p])
        if state is not None:
            to_device(state, names, device)

    def begin(self, split: Iterable[Tensor]) -> list[Tensor]:
        """Forget what split weights of the host lacked where somebody else has written them. Returns the others."""
        own, others = self._own(split)
        for p, twin in own:
            if not twin.is_up_to_date(p):
                self._download(p, twin)
                self.states.remainders.drop_stale(self.states.own, [twin.host])
        return others

    def end(self, split: Iterable[Tensor]) -> list[Tensor]:
        """Split weights of the host are as their remainders have them. Returns the others."""
        own, others = self._own(split)
        for p, twin in own:
            self.twins.wait()
            twin.download(p)
            self.states.remainders.note([twin.host])
        return others

    def _own(self, params: Iterable[Tensor]) -> tuple[list[tuple[Tensor, Twin]], list[Tensor]]:
        """Those of some parameters that the host steps, with their twins, and the others."""
        own, others = [], []
        for p in params:
            twin = self.twins.get(p) if self._away(p) else None
            if twin is None:
                others.append(p)
            else:
                own.append((p, twin))
        return own, others

    def watched(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of some parameters that are split weights of past steps of the host."""
        remainders = self.states.remainders
        return [p for p in params if (twin := self.twins.get(p)) is not None and remainders.watched([twin.host])]

    def written(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Those of some parameters that others have written, too."""
        remainders = self.states.remainders
        return [p for p in params if (twin := self.twins.get(p)) is not None and remainders.written([twin.host])]

    def keep(self, alive: set[int]) -> None:
        """Forget parameters with other ids."""
        gone = self.twins.keep(alive)
        self._written &= alive
        for h in gone:
            self.states.own.pop(h, None)
        if gone:
            self.states.remainders.keep({*map(id, self.states.own)})


class _Called:
    """What errors call some parameters of a group: made when an error asks."""

    def __init__(self, group: Group, number: int, positions: list[int]) -> None:
        self._group, self._number, self._positions = group, number, positions

    def __getitem__(self, position: int) -> str:
        return name_of(self._group, self._number, self._positions[position])


def _be_some_of(own: Group, group: Group, number: int, chosen: list[bool]) -> None:
    """Make a group that of some parameters of another, whose number among all is given."""
    positions = [*compress(range(len(chosen)), chosen)]
    own.clear()
    own.update(group, params=[*compress(group["params"], chosen)], _called=_Called(group, number, positions))
    if "param_names" in group:
        own["param_names"] = [*compress(group["param_names"], chosen)]


class _OfTwins:
    """Collects statistics of twins as their parameters'."""

    def __init__(self, into: Collected, in_step: dict[int, tuple[Tensor, Twin]]) -> None:
        self._into, self._in_step = into, in_step

    def add(self, params: list[Tensor], found: Tensor) -> None:
        """What a pass has found about these twins."""
        self._into.add([self._in_step[id(h)][0] for h in params], found)
