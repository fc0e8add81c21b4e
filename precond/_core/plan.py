"""From a step to what it touches. A plan is a cache of checks: the compiled part compares every address with what it saw and
refuses to run when something changed; then a new plan is built, with every check.

One class of 400 lines: what is checked before anything changes, what is made, and what is taken back share one order.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import backend as _backend
from . import formats, updates
from .checks import Checks
from .clipping import Begun, Executor, Report, begin, device_decides
from .counters import counts_beside
from .executors import Compiled, Home, Reference, Triton
from .formats import Layout, is_half
from .memory import Memory
from .norm import NormClasses, local_total, norm_classes
from .offloaded import OFFLOADED, Offloaded
from .rows import Entry, Row, Step, entries_of, parameters
from .sharding import local
from .states import States
from .statistics import Shared


class Outcome(enum.Enum):
    """What came of a step."""

    RAN = "ran"
    #: A loss scaler or the norm said so; nothing but the report changed.
    SKIPPED = "skipped"
    #: The plan no longer holds; nothing changed.
    STALE = "stale"


#: What runs the plans of a backend where that is not the backend's own executor.
_COMPILED: dict[str, type[Compiled]] = {OFFLOADED: Offloaded}


def first_differs(row: Row) -> bool:
    """True where a parameter's first step is another formula."""
    name = reference.RULES[row.rule].first_differs
    return name is not None and bool(row.hyper[name] != 0.0)


class StepPlan:
    """Everything that one optimizer's steps update, on every backend. Building it makes missing states.

    It has every parameter whose states are there, with a gradient in this step or without. It keeps numbers and addresses, no
    tensor: what a user drops is freed.
    """

    def __init__(self, step: Step, states: States, checks: Checks, report: Report, captured: list[Any]) -> None:
        """``captured``: where compiled plans are kept that graphs were captured from."""
        self.states, self.checks, self.settings, self.report = states, checks, checks.settings, report
        self.rules = [row.rule for row in step.rows]
        self.formats = step.formats()
        self.has_wrappers = any(local(p) is not p for group in step.groups for p in group["params"])
        #: True until the step that it was built for has run.
        self.new = True
        #: Numbers of the parameters that had no states before the coming step, and of split weights.
        self.fresh: set[int] = set()
        self.split: list[int] = []
        self._memory = Memory()
        # While a step runs: what the states were that it has made or converted.
        self._before: list[tuple[Tensor, dict[str, Any] | None]] = []
        entries = entries_of(step)
        homes, ready = self._check(step, entries)
        #: The class of each parameter's norm, and the process groups of each class; None where the step has no norm.
        self.norm_classes: tuple[list[int], list[tuple[Any, ...]]] | None = None
        if self.settings["max_grad_norm"] is not None:
            of, over = norm_classes(step.groups, self.settings["norm_process_group"])
            self.norm_classes = [of[p] for p in parameters(step)], over
        #: Whose statistics are added up over processes, here or where they are collected.
        adds_up = step.scaled is not None or (step.measured and step.into is None)
        self.shared = Shared(step.groups) if self.has_wrappers and adds_up else None
        try:
            looked_at = [
                (entry, home)
                for entry, home in zip(entries, homes, strict=True)
                if home is not None and entry.number not in ready
            ]
            self._renew_codes(step, [entry for entry, _ in looked_at])
            layouts = {entry.number: self._make_states(step, entry) for entry, _ in looked_at}
            self._note_made(step)
            self.in_python = []
            for kind in (Reference, Triton):
                if own := [entry for entry, home in looked_at if home[0] == kind.backend]:
                    self.in_python.append(kind(step, own, states, self.fresh))
            self.compiled = [
                _COMPILED.get(home[0], Compiled)(step, states, *home, entries, homes, layouts, self.fresh, captured)
                for home in dict.fromkeys(homes)
                if home is not None and home[0] not in (Reference.backend, Triton.backend)
            ]
            if self.norm_classes is not None and len(self.norm_classes[1]) > 1:
                for compiled in self.compiled:
                    compiled.set_norm_classes(self.norm_classes[0])
        except BaseException:
            self.forget(step)
            raise
        self.executors: list[Executor] = [*self.compiled, *self.in_python]

    def _check(self, step: Step, entries: list[Entry]) -> tuple[list[Home], set[int]]:
        """Check every parameter that has a gradient, or could be updated as soon as it has one, before anything changes. Returns
        the homes of all, and the numbers of those that have every state as it should be.
        """
        tensors: list[Tensor] = []
        owners: list[tuple[int, str]] = []
        homes = self._homes_of_ready(step, len(entries), tensors, owners)
        ready = {number for number, home in enumerate(homes) if home is not None}
        for entry in entries:
            if entry.number in ready:
                continue
            has_gradient = step.input_of(entry.param(step)) is not None
            if not has_gradient and not self._has_states(step, entry):
                continue
            try:
                home = self._home(step, entry)
                if not has_gradient:
                    self._layout(step, entry)
            except (RuntimeError, TypeError):
                if has_gradient:
                    raise
                # Whatever is wrong with it is an error of the step in which it gets a gradient.
                continue
            homes[entry.number] = home
            for key, t in self._written(step, entry, home):
                tensors.append(t)
                owners.append((entry.number, key))

        def about(number: int) -> tuple[str, bool]:
            entry = entries[number]
            return entry.name(step), step.input_of(entry.param(step)) is not None

        for number in self._memory.check(tensors, owners, about):
            homes[number] = None
        return homes, ready

    def _homes_of_ready(
        self, step: Step, count: int, tensors: list[Tensor], owners: list[tuple[int, str]]
    ) -> list[Home]:
        """The homes of the parameters that a compiled backend takes as they are, found in one call. None: look at that parameter.
        What a step writes of them is added to ``tensors``, and whose it is to ``owners``.
        """
        if _backend._C is None or torch.is_grad_enabled():
            return [None] * count
        groups: list[tuple[list[Tensor], tuple[str, ...] | None, tuple[str, ...], bool]] = []
        for group, row in zip(step.groups, step.rows, strict=True):
            names, numbers = self.states.keys(group, row.rule) or (None, ())
            groups.append((group["params"], names, numbers, counts_beside(group, "cuda")))
        found = _backend.reader().ready(groups, step.inputs, step.state, tensors, owners)
        homes = {index: _backend.home_of(self.settings["backend"], index) for index in {*found} - {None}}
        if None in homes.values():  # another backend updates those of such a device
            tensors.clear()
            owners.clear()
            return [None] * count
        return [None if index is None else homes[index] for index in found]

    def _home(self, step: Step, entry: Entry) -> tuple[str, torch.device]:
        """Backend and device of a parameter, which is checked."""
        p = entry.param(step)
        if p.is_meta and step.groups[entry.group].get("fused"):
            raise RuntimeError(
                f"`fused=True` requires all the params to be floating point Tensors with memory, got {entry.name(step)} on meta"
            )
        backend = self.checks.backend_of(entry.name(step), p, step, step.rows[entry.group], self.states)
        return backend, self.checks.device_of(p, self.states)

    def _layout(self, step: Step, entry: Entry) -> Layout:
        """The formats of a parameter and its states; raises where they are not what they say: a checkpoint can bring anything."""
        p, rule = entry.param(step), step.rows[entry.group].rule
        layout = self.states.layout(p, step.groups[entry.group], rule)
        if not layout.plain:
            formats.check(entry.name(step), p, step.state[p], self.states.names(rule), layout)
        return layout

    def _written(self, step: Step, entry: Entry, home: tuple[str, torch.device]) -> Iterator[tuple[str, Tensor]]:
        """What a step of a parameter writes, of what exists, by the names of states; its own is empty."""
        p = entry.param(step)
        yield "", local(p)
        if not (state := step.state.get(p)):
            return
        beside = counts_beside(step.groups[entry.group], home[0])
        # Parameters may share a counter on the host, which counts one after the other.
        shared = () if beside else ("step", *self.states.scalars(step.rows[entry.group].rule))
        for key, t in state.items():
            if isinstance(t, Tensor) and (t.dim() or beside) and key not in shared:
                yield key, local(t)

    def _has_states(self, step: Step, entry: Entry) -> bool:
        """True for a parameter that has all the states that its first gradient would make, or needs none."""
        p, group = entry.param(step), step.groups[entry.group]
        if self.states.missing(p, step.rows[entry.group].rule):
            return False
        weight_format = group.get("weight_format")
        if weight_format is None or not is_half(p):
            return True
        state = step.state.get(p, {})
        return formats.has_remainder(state, weight_format, p) if weight_format.startswith("split") else bool(state)

    def _renew_codes(self, step: Step, entries: list[Entry]) -> None:
        """States may come in by assignment, as ZeroRedundancyOptimizer's do: in codes of version 0.1 they mean something else."""
        params = [entry.param(step) for entry in entries]
        formats.renew((p, step.state[p]) for p in params if p in step.state)

    def _make_states(self, step: Step, entry: Entry) -> Layout:
        """Make what is missing of a parameter's states. Returns their formats."""
        p, group = entry.param(step), step.groups[entry.group]
        state = step.state.get(p)
        self._before.append((p, None if state is None else dict(state)))
        if self.states.ensure(entry.name(step), p, group, step.rows[entry.group]) and step.input_of(p) is not None:
            self.fresh.add(entry.number)
        layout = self._layout(step, entry)
        if not layout.plain and "remainder" in step.state[p]:
            self.split.append(entry.number)
        return layout

    def _note_made(self, step: Step) -> None:
        """What was made is written too: a parameter that joins later must not share its memory."""
        made = []
        for p, before in self._before:
            for key, t in step.state.get(p, {}).items():
                if isinstance(t, Tensor) and t.dim() and (before is None or before.get(key) is not t):
                    made.append(local(t))
        if made:
            self._memory.meeting(made)

    def forget(self, step: Step) -> None:
        """Take back the states that were made for a step that failed or was skipped, or the next one would not be the first."""
        for p, before in self._before:
            if before is None:
                step.state.pop(p, None)
                continue
            step.state[p].clear()
            step.state[p].update(before)
        self._before.clear()

    def keep_new_states(self) -> None:
        """Leave it at having made states, for a checkpoint to fill: a step that is skipped later does not take them back."""
        self.new = False
        self._release()

    def _undo(self, step: Step) -> None:
        """Leave no trace of a step that changed nothing."""
        if self.fresh:
            self.forget(step)

    def _release(self) -> None:
        """Let go of every tensor, whatever has come of a step."""
        self._before.clear()
        for executor in self.compiled:
            executor.release()

    def _refresh(self, step: Step) -> bool:
        """Bring the compiled plans up to a step. False where one no longer holds."""
        return all(executor.refresh(step) for executor in self.compiled)

    def _grow(self, step: Step) -> bool:
        """Take in parameters that have their first gradient where that is all that is new. False where it takes a new plan."""
        if self.in_python or len(self.compiled) != 1 or not self.compiled[0].newcomers:
            return False
        (compiled,) = self.compiled
        numbers = set(compiled.newcomers)
        found = [entry for entry in entries_of(step) if entry.number in numbers]
        tensors: list[Tensor] = []
        for entry in found:
            home = self._home(step, entry)
            if home != (compiled.backend, compiled.device):
                return False
            tensors.extend(t for _, t in self._written(step, entry, home))
        if self._memory.meeting(tensors):
            return False
        try:
            self._renew_codes(step, found)
            layouts = {entry.number: self._make_states(step, entry) for entry in found}
            self._note_made(step)
            compiled.adopt(step, self.states, found, layouts, self.fresh)
        except BaseException:
            self.forget(step)
            raise
        if self._refresh(step):
            return True
        self.forget(step)
        return False

    def holds(self, step: Step) -> bool:
        """True where a step can run by this plan as it is."""
        try:
            return self.rules == [row.rule for row in step.rows] and not self.in_python and self._refresh(step)
        finally:
            self._release()

    def norms(self, step: Step, classes: NormClasses, inf: bool) -> Tensor | None:
        """For each class the sum of squares of this process' gradients, or the largest magnitude; None where the plan no longer
        holds.
        """
        try:
            if not self._refresh(step):
                return None
            self.new = False
            for executor in self.compiled:
                executor.set_norm_classes([classes.of[p] for p in parameters(step)])
            return local_total(self.executors, step, classes, inf)
        finally:
            self._release()

    def begin(self, step: Step, *, host_must_know: bool) -> Begun | Outcome:
        """What the passes of a step do with its gradients, from their norm: the plan measures and runs nothing."""
        try:
            if not self._refresh(step):
                return Outcome.STALE
            self.new = False
            executors = [executor for executor in self.executors if executor.has_gradients(step)]
            classes = self._norm_classes(step)
            begun = begin(
                executors, step, classes, self.settings, self.report, host_must_know=host_must_know, apart=True
            )
            return Outcome.SKIPPED if begun is None else begun
        finally:
            self._release()

    def run(self, step: Step) -> Outcome:
        """Update everything that has a gradient."""
        try:
            return self._run(step)
        finally:
            self._release()

    def _run(self, step: Step) -> Outcome:
        if self.rules != [row.rule for row in step.rows] or self.formats != step.formats():
            return Outcome.STALE
        if not self._refresh(step) and not self._grow(step):
            self._undo(step)  # the next plan's states must be new to it too
            return Outcome.STALE
        # A plan that was built for this step has just made these checks.
        if not self.new and not all(executor.holds(step, self.checks) for executor in self.in_python):
            return Outcome.STALE
        self.new = False
        # Where nobody has a gradient, a compiled plan writes the report.
        executors = [executor for executor in self.executors if executor.has_gradients(step)] or [*self.compiled]
        split = self._split_weights(step)
        self.states.begin(split)
        try:
            self._check_device_control(step, executors)
            if step.clip is not None:
                given = Begun(step.control, step.clip)
                begun: Begun | None = given if device_decides(executors) else given.folded()
            else:
                begun = begin(
                    executors,
                    step,
                    self._norm_classes(step),
                    self.settings,
                    self.report,
                    host_must_know=self._may_skip(step) and self._first_step_differs(step),
                )
        except BaseException:
            self._undo(step)
            raise
        if begun is None:
            self._undo(step)
            return Outcome.SKIPPED
        # A compiled plan that has every parameter writes all rows of the statistics, at the same address.
        whole = len(self.executors) == 1 and bool(self.compiled) and self.shared is None
        if not updates.run(step, executors, begun, self.report, self.shared, whole=whole):
            self._undo(step)
            return Outcome.SKIPPED
        self.states.end(split)
        self.fresh.clear()
        return Outcome.RAN

    @property
    def notices_placements(self) -> bool:
        """True where a plan finds that a gradient is placed otherwise than its parameter, and then holds no longer."""
        return not (self.has_wrappers and self.in_python)

    @property
    def process_groups(self) -> list[Any]:
        """What the step adds sums up over."""
        of_norm = [] if self.norm_classes is None else self.norm_classes[1]
        of_statistics = [] if self.shared is None else self.shared.over
        return list({id(group): group for groups in (*of_norm, *of_statistics) for group in groups}.values())

    def _split_weights(self, step: Step) -> list[Tensor]:
        """The split weights that the step updates."""
        if not self.split:
            return []
        params = parameters(step)
        return [params[number] for number in self.split if step.input_of(params[number]) is not None]

    def _norm_classes(self, step: Step) -> NormClasses | None:
        """The classes of the step's norm; compiled plans know which parameter is in which."""
        if self.norm_classes is None:
            return None
        numbers, over = self.norm_classes
        return NormClasses(dict(zip(parameters(step), numbers, strict=True)) if self.in_python else {}, over)

    def _may_skip(self, step: Step) -> bool:
        return step.control.found_inf is not None or (step.clip is None and self.settings["nonfinite"] == "skip")

    def _first_step_differs(self, step: Step) -> bool:
        """True where the host must know whether this step is skipped, and so wait for the device, because the next one is then
        another formula: once in a training, before states exist.
        """
        if not self.fresh:
            return False
        number = 0
        for group, row in zip(step.groups, step.rows, strict=True):
            numbers = range(number, number := number + len(group["params"]))
            if first_differs(row) and not self.fresh.isdisjoint(numbers):
                # A step that is being captured cannot wait; torch asks for warm-up steps before.
                return not any(p.is_cuda for p in group["params"]) or not torch.cuda.is_current_stream_capturing()
        return False

    def _check_device_control(self, step: Step, executors: list[Executor]) -> None:
        """Raise where a step that a device decides about needs the host."""
        by_device = device_decides(executors)
        triton = [executor for executor in executors if isinstance(executor, Triton)]
        if self._may_skip(step) and by_device and any(executor.counts_on_host(step) for executor in triton):
            # The host would have to wait before it counts. As the CUDA backend, rather than wait in silence: a scaler hands
            # over found_inf only where fused=True was asked for, and then a group without it is an oversight.
            raise RuntimeError(
                "fused must be True in every group for a loss scaler's found_inf and for nonfinite='skip': "
                "step counters are on the host"
            )
        for executor in triton:
            executor.check_capture(step)
