"""Runs one rule over arbitrary tensors with hyper-parameters per tensor, by the same plans, formats and backends. For
methods that have a matrix product or a norm between two passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .. import reference
from . import formats
from .checks import Checks
from .clipping import Begun
from .counters import make_counter
from .engine import Engine
from .formats import Layout, StateFormat
from .norm import NormClasses
from .remainders import Remainders, State
from .rows import Control, Group, Row, Scaled, Step
from .settings import DEFAULTS
from .sharding import reduce, shard_groups
from .states import present_of
from .statistics import Collected


class Job(NamedTuple):
    """A tensor that a pass updates in place."""

    p: Tensor
    #: What the rule takes for its gradient; None: this process has none, and takes part in what others find out about p.
    g: Tensor | None
    state: dict[str, Any]
    #: Of the pass's rule.
    hyper: dict[str, float | Tensor]
    #: -1 ascends.
    sign: float = 1.0
    weight_format: str | None = None
    #: What the states are asked to be stored in.
    state_format: StateFormat = None
    #: What errors call it: the parameter of its caller that it is, or is made for.
    name: str = "a tensor"
    #: What scales its update, of a rule with parts.
    scaled: Scaled | None = None


class JobStates:
    """The states of tensors that a pass updates: dictionaries of its caller, which hold everything but the rule's states of one
    number already.
    """

    def __init__(self, names: tuple[str, ...], remainders: Remainders) -> None:
        self.state: State = {}
        self._names, self._remainders = names, remainders

    def bind(self, state: State, groups: list[Group]) -> None:
        """Take the dictionaries of the next jobs."""
        self.state = state

    def names(self, rule: str) -> tuple[str, ...]:
        """What the caller calls the rule's states."""
        return self._names

    def scalars(self, rule: str) -> Mapping[str, float]:
        """The rule's states of one number, with their initial value."""
        return reference.RULES[rule].scalars

    def keys(self, group: Group, rule: str) -> None:
        """None: the caller has made the states, whatever they are."""

    def present(self, p: Tensor, rule: str) -> dict[str, Tensor]:
        """Those that exist."""
        return present_of(self.state, p, self._names)

    def missing(self, p: Tensor, rule: str) -> bool:
        """True where the caller has not given a state."""
        state = self.state[p]
        if self.counts(p, rule) and any(name not in state for name in ("step", *self.scalars(rule))):
            return True
        return len(self.present(p, rule)) < len(self._names)

    def layout(self, p: Tensor, group: Group, rule: str) -> Layout:
        """The formats of a tensor and of its states."""
        return formats.layout_of(p, group, self.state[p], self._names)

    def ensure(self, name: str, p: Tensor, group: Group, row: Row) -> bool:
        """Make a step counter. False: the caller has made the states."""
        if self.counts(p, row.rule):
            make_counter(name, p, self.state[p], group, self.scalars(row.rule))
        return False

    def counts(self, p: Tensor, rule: str) -> bool:
        """True where the rule or random bits depend on the step."""
        return reference.RULES[rule].reads_step or "key" in self.state[p]

    def begin(self, split: Iterable[Tensor]) -> None:
        """Forget what split weights lacked of their masters where somebody else has written them."""
        self._remainders.drop_stale(self.state, split)

    def end(self, split: Iterable[Tensor]) -> None:
        """Split weights are now as the pass left them."""
        self._remainders.note(split)


#: What a pass does with its ``g`` unless it is told otherwise: nothing.
_AS_THEY_ARE = Begun()


class _NoStates(dict[Tensor, dict[str, Any]]):
    """No states of any parameter; asking makes none, or a plan would not know it again."""

    def __missing__(self, p: Tensor) -> dict[str, Any]:
        return {}


#: For steps that measure gradients alone.
NO_STATES = _NoStates()


class Beginning:
    """What the passes of an optimizer's steps do with its gradients: finds it before them, from the norm of all gradients."""

    def __init__(self, engine: Engine) -> None:
        """``engine``: the optimizer's own."""
        states = JobStates((), Remainders())
        self.engine = Engine(states, engine.checks, engine.report, engine.captured)
        # Without the formats of states that nobody reads here.
        self._groups: list[Group] = []

    def find(self, groups: list[Group], control: Control, *, host_must_know: bool) -> Begun | None:
        """For all groups of the optimizer. None: the step is skipped."""
        if len(groups) != len(self._groups):
            self._groups = [{} for _ in groups]
            self.engine.forget_plans()
        for own, group in zip(self._groups, groups, strict=True):
            own.clear()
            own.update({key: group[key] for key in ("params", "param_names") if key in group})
        rows = [Row("sgd", 1.0, plain_step(0.0, 0.0))] * len(groups)
        step = Step(self._groups, NO_STATES, {}, rows, control)
        try:
            return self.engine.begin(step, host_must_know=host_must_know)
        finally:
            for own in self._groups:
                own["params"] = []


class Pass:
    """Runs one rule over tensors of its caller, in groups that plans serve. Between runs it keeps none of them alive. Not copied
    or saved: its owner makes another.
    """

    def __init__(
        self,
        rule: str,
        names: tuple[str, ...],
        backend: str | None,
        *,
        remainders: Remainders | None = None,
        captured: list[Any] | None = None,
    ) -> None:
        """``names``: what the caller calls the rule's states. ``remainders``, ``captured``: those of the caller's engine."""
        self._rule = rule
        self._states = JobStates(names, Remainders() if remainders is None else remainders)
        checks = Checks(Pass, frozenset(), {**DEFAULTS, "backend": backend})
        self.engine = Engine(self._states, checks, captured=captured)
        self._groups: list[Group] = []
        #: The ids of the last run's tensors, by group. Plans compare addresses, so it does not matter if one is another's by now.
        self._seen: list[list[int]] = []

    def run(self, jobs: list[Job], begun: Begun = _AS_THEY_ARE, into: Collected | None = None) -> None:
        """Update every job's tensor in one region; ``begun``: what is done with each ``g``; ``into``: what collects statistics,
        for which the rule has parts.
        """
        if jobs:
            step = self._step(jobs)._replace(
                control=begun.control, clip=begun.clip, measured=into is not None, into=into
            )
            try:
                self.engine.run(step)
            finally:
                self._release()

    def squared_norms(self, jobs: list[Job], classes: list[int]) -> list[Tensor]:
        """Per job the sum of squares of every ``g`` of its class, classes being numbered from 0, over all processes that have a
        piece of one: float64 numbers on the first one's device, in the order of csrc/plan/norm.h.
        """
        shards = [shard_groups(job.p, job.name) or {} for job in jobs]
        measured = range(len(jobs)) if any(shards) else classes  # pieces are added up over their own processes
        of = {job.p: number for job, number in zip(jobs, measured, strict=True)}
        try:
            found = self.engine.norms(self._step(jobs), NormClasses(of, [()] * (max(measured) + 1)))
        finally:
            self._release()
        # No index by numbers of the host, which torch would copy to the device and wait.
        parts = found.unbind()
        if not any(shards):
            return [parts[number] for number in classes]
        totals: dict[int, Tensor] = {}
        for i, (groups, number) in enumerate(zip(shards, classes, strict=True)):
            reduce(found[i : i + 1], groups.values())
            totals[number] = totals[number] + parts[i] if number in totals else parts[i]
        return [totals[number] for number in classes]

    def _step(self, jobs: list[Job]) -> Step:
        # A group for those that ask for the same: the host reads hyper-parameters once for each.
        alike: dict[tuple[Any, ...], list[Job]] = {}
        for job in jobs:
            asked = id(job.hyper), job.sign, job.weight_format, id(job.state_format), "key" in job.state, job.scaled
            alike.setdefault(asked, []).append(job)
        seen = [[id(job.p) for job in members] for members in alike.values()]
        if seen != self._seen:
            self._groups = [{} for _ in seen]
            self._seen = seen
            self.engine.forget_plans()
        for group, members in zip(self._groups, alike.values(), strict=True):
            group["params"], group["_called"] = [job.p for job in members], [job.name for job in members]
            group["weight_format"], group["state_format"] = members[0].weight_format, members[0].state_format
        scaled = [members[0].scaled for members in alike.values()]
        return Step(
            groups=self._groups,
            state={job.p: job.state for job in jobs},
            inputs={job.p: job.g for job in jobs if job.g is not None},
            rows=[Row(self._rule, members[0].sign, members[0].hyper) for members in alike.values()],
            control=Control(),
            scaled=[each or Scaled() for each in scaled] if any(scaled) else None,
        )

    def _release(self) -> None:
        """Let go of tensors and states."""
        for group in self._groups:
            group["params"] = []
        self._states.bind({}, [])


def plain_step(lr: float | Tensor, weight_decay: float | Tensor) -> dict[str, float | Tensor]:
    """Hyper-parameters of the rule "sgdw" for a tensor."""
    return {"lr": lr, "weight_decay": weight_decay, "l1_decay": 0.0, "momentum": 0.0, "dampening": 0.0}
