"""Runs steps: keeps plans, and builds one where none holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from . import backend as _backend
from .checks import Checks
from .clipping import Begun, Report
from .norm import NormClasses
from .plan import Outcome, StepPlan
from .rows import Group, Row, Step, parameters
from .sharding import agreed, aligned_gradients, home, local
from .states import States

_PLANS_KEPT = 64
#: How often a step is prepared where another thread replaces gradients or states in between.
_ATTEMPTS = 8


class Offloads(Protocol):
    """What takes parameters out of steps whose states are the host's; offload.py."""

    def concerns(self, groups: list[Group]) -> bool:
        """True where a step of these groups has such parameters."""

    def run(self, step: Step, *, partial: bool) -> None:
        """A step with such parameters. ``partial``: others of the same step come, or came, by themselves."""

    def join(self) -> None:
        """Have the current streams wait for the new parameters."""

    def wait(self) -> None:
        """Until the host has done its part of all steps; raises what went wrong."""

    def deliver(self) -> None:
        """Until the new parameters are there too, for every stream."""

    def keep(self, alive: set[int]) -> None:
        """Forget parameters with other ids."""

    def prepare(self, count: int) -> None:
        """Before steps of so many parameters, one by one."""

    def moved(self, p: Tensor, state: dict[str, Any] | None, names: frozenset[str]) -> None:
        """The states of a parameter with these names are now the host's, or the device's."""


class Engine:
    """What runs the steps of one optimizer. ``plans`` only caches checks on groups and states."""

    def __init__(
        self,
        states: States,
        checks: Checks,
        report: Report | None = None,
        captured: list[Any] | None = None,
        *,
        may_only_make_states: bool = False,
    ) -> None:
        """``report`` and ``captured`` are those of an engine that this one replaces or works for. ``may_only_make_states``: the
        first step may be one that ``torch.distributed.checkpoint`` makes to have states.
        """
        self.states, self.checks = states, checks
        self.report = Report() if report is None else report
        #: Compiled plans that graphs were captured from. A replay needs their memory, also when there is a newer plan.
        self.captured: list[Any] = [] if captured is None else captured
        self.plans: dict[tuple[Any, ...], StepPlan] = {}
        self.plans_kept = _PLANS_KEPT
        self._may_only_make_states = may_only_make_states
        self.offload: Offloads | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """What concerns the whole step: :class:`precond.Settings`."""
        return self.checks.settings

    def run(self, step: Step, *, partial: bool = False) -> None:
        """Run each group's rule on its parameters. ``partial``: others of the same step come, or came, by themselves."""
        if self.offload is not None and self.offload.concerns(step.groups):
            self.offload.run(step, partial=partial)
        else:
            self.run_here(step)

    def run_here(self, step: Step) -> None:
        """The same where states are beside their parameters, by the plan for these groups or a new one."""
        self.states.bind(step.state, step.groups)
        try:
            self._run(step)
        finally:
            self.states.bind({}, [])

    def check_here(self, step: Step) -> None:
        """Raise what ``run_here`` would raise before it changes anything."""
        self.states.bind(step.state, step.groups)
        try:
            plan = self.plans.get(_key(step))
            if plan is None or not plan.holds(step):
                self._new(step).forget(step)
        finally:
            self.states.bind({}, [])

    def _run(self, step: Step) -> None:
        key = _key(step)
        plan = self.plans.get(key)
        tried = plan is not None and plan.notices_placements
        if plan is not None and tried and plan.run(step) is not Outcome.STALE:
            return
        aligned = aligned_gradients(step.groups)
        step = step._replace(inputs={**aligned, **step.inputs})
        if plan is None or (tried and not aligned) or plan.run(step) is Outcome.STALE:
            self._keep(key, self._run_new(step))

    def begin(self, step: Step, *, host_must_know: bool) -> Begun | None:
        """What the passes of a step do with its gradients, from the norm of all of them; None where it is skipped."""
        self.states.bind(step.state, step.groups)
        try:
            return self._begin(step, host_must_know)
        finally:
            self.states.bind({}, [])

    def _begin(self, step: Step, host_must_know: bool) -> Begun | None:
        key = _key(step)
        plan = self.plans.get(key)
        found: Begun | Outcome = Outcome.STALE
        if plan is not None and plan.notices_placements:
            found = plan.begin(step, host_must_know=host_must_know)
        if found is Outcome.STALE:
            step = step._replace(inputs=aligned_gradients(step.groups))
            if plan is not None:
                found = plan.begin(step, host_must_know=host_must_know)
        for _ in range(_ATTEMPTS):
            if found is not Outcome.STALE:
                return None if isinstance(found, Outcome) else found
            plan = self._new(step)
            self._keep(key, plan)
            found = plan.begin(step, host_must_know=host_must_know)
        raise RuntimeError("gradients changed, again and again, while their norm was measured")

    def norms(self, step: Step, classes: NormClasses, *, inf: bool = False) -> Tensor:
        """For each class the sum of squares of this process' gradients, or the largest magnitude: float64 numbers on the first
        one's device.
        """
        self.states.bind(step.state, step.groups)
        try:
            return self._norms(step, classes, inf)
        finally:
            self.states.bind({}, [])

    def _norms(self, step: Step, classes: NormClasses, inf: bool) -> Tensor:
        key = _key(step)
        plan = self.plans.get(key)
        found = None if plan is None else plan.norms(step, classes, inf)
        if plan is None or found is None:
            plan = self._new(step)
            found = plan.norms(step, classes, inf)
            if found is None:
                raise RuntimeError("a tensor changed while its norm was measured")
        self._keep(key, plan)
        return found

    def forget_plans(self) -> None:
        """Build a plan for the next step, with every check."""
        self.plans = {}

    def _new(self, step: Step) -> StepPlan:
        return StepPlan(step, self.states, self.checks, self.report, self.captured)

    def _run_new(self, step: Step) -> StepPlan:
        may_ask = self._may_only_make_states and stands_still(step.rows)
        has_none = may_ask and not any(step.state.get(p) for p in parameters(step))
        for attempt in range(_ATTEMPTS):
            plan = self._new(step)
            asks = may_ask and _asks_for_states_only(plan, step)
            if may_ask and (groups := plan.process_groups):
                # Gradients of one rank may be zeros alone, and the others wait for its sums. All come here without a state.
                asks = has_none and attempt == 0 and agreed(asks, groups, home(step.groups))
            if asks:
                plan.keep_new_states()
                return plan
            if plan.run(step) is not Outcome.STALE:
                return plan
        raise RuntimeError("gradients or states changed, again and again, while the step was prepared")

    def _keep(self, key: tuple[Any, ...], plan: StepPlan) -> None:
        """Keep a plan for the next step. Without a compiled part the checks are all there is, and nothing is worth keeping."""
        self.plans.pop(key, None)
        while len(self.plans) >= self.plans_kept:
            del self.plans[next(iter(self.plans))]
        if plan.compiled:
            self.plans[key] = plan


def _key(step: Step) -> tuple[Any, ...]:
    """What the plan of a step is kept by. DeepSpeed steps once per group with param_groups cut to it: one for each view of the
    groups; and others where statistics are taken, for which rules have parts, or sums that scale updates.
    """
    return (step.measured, step.scaled is not None, *map(id, step.groups))


def _asks_for_states_only(plan: StepPlan, step: Step) -> bool:
    """True for a first step at lr 0 on gradients of zeros, which is how torch.distributed.checkpoint has states made. A step
    counted there spoils the bias corrections of all that follow (pytorch#164929).
    """
    gradients = {number: g for number, p in enumerate(parameters(step)) if (g := step.input_of(p)) is not None}
    return bool(plan.fresh) and plan.fresh == gradients.keys() and not any(local(g).any() for g in gradients.values())


def stands_still(rows: list[Row]) -> bool:
    """True where lr is 0, as far as the host knows."""
    return not any(_backend.on_device(row.hyper["lr"]) or row.hyper["lr"] != 0.0 for row in rows)
