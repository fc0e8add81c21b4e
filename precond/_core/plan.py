"""From a step to what it touches. A plan is a cache of checks: the compiled part compares every address with what it saw and
refuses to run when something changed; then a new plan is built, with every check."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import formats
from .checks import Checks
from .clipping import Executor, Report, begin
from .executors import Compiled, Entry, Home, Reference, Triton, parameters
from .formats import is_half
from .memory import Memory
from .norm import NormClasses, local_total, norm_classes
from .rows import Group, Row, Step, name_of
from .sharding import local
from .states import States, counts_beside


class Outcome(enum.Enum):
    """What came of a step."""

    RAN = "ran"
    #: A loss scaler or the norm said so; nothing but the report changed.
    SKIPPED = "skipped"
    #: The plan no longer holds; nothing changed.
    STALE = "stale"


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
        homes, entries = self._check(step)
        #: The class of each parameter's norm, and the process groups of each class; None where the step has no norm.
        self.norm_classes: tuple[list[int], list[tuple[Any, ...]]] | None = None
        if self.settings["max_grad_norm"] is not None:
            of, over = norm_classes(step.groups, self.settings["norm_process_group"])
            self.norm_classes = [of[p] for p in parameters(step)], over
        try:
            number = 0
            for index, (group, row) in enumerate(zip(step.groups, step.rows, strict=True)):
                for position, p in enumerate(group["params"]):
                    if homes[number] is not None:
                        self._make_states(step, number, name_of(group, index, position), p, group, row)
                    number += 1
            self._note_made(step)
            self.in_python = [
                kind(step, entries[kind.backend], states, self.fresh)
                for kind in (Reference, Triton)
                if entries[kind.backend]
            ]
            self.compiled = [
                Compiled(step, states, *home, homes, self.fresh, captured)
                for home in dict.fromkeys(homes)
                if home is not None and home[0] not in entries
            ]
            if self.norm_classes is not None and len(self.norm_classes[1]) > 1:
                for compiled in self.compiled:
                    compiled.set_norm_classes(self.norm_classes[0])
        except BaseException:
            self._forget(step)
            raise
        self.executors: list[Executor] = [*self.compiled, *self.in_python]

    def _check(self, step: Step) -> tuple[list[Home], dict[str, list[Entry]]]:
        """Check every parameter that has a gradient, or could be updated as soon as it has one, before anything changes. Returns
        the homes of all, and by backend those that no compiled plan updates.
        """
        homes: list[Home] = []
        entries: dict[str, list[Entry]] = {Reference.backend: [], Triton.backend: []}
        names: list[str] = []
        tensors: list[Tensor] = []
        owners: list[tuple[int, str]] = []
        moving: set[int] = set()
        for index, (group, row) in enumerate(zip(step.groups, step.rows, strict=True)):
            for position, p in enumerate(group["params"]):
                number, name = len(homes), name_of(group, index, position)
                names.append(name)
                has_gradient = step.input_of(p) is not None
                if has_gradient:
                    moving.add(number)
                elif not self._is_ready(step, p, group, row):
                    homes.append(None)
                    continue
                try:
                    home = self._home(step, name, p, group, row)
                    if not has_gradient:
                        self._check_formats(step, name, p, group, row)
                    homes.append(home)
                except (RuntimeError, TypeError):
                    if has_gradient:
                        raise
                    # Whatever is wrong with it is an error of the step in which it gets a gradient.
                    homes.append(None)
                    continue
                self._add_written(step, number, p, group, row, home, tensors, owners)
        for number in self._memory.check(tensors, owners, moving, names.__getitem__):
            homes[number] = None
        number = 0
        for index, group in enumerate(step.groups):
            for position in range(len(group["params"])):
                kept = homes[number]
                if kept is not None and kept[0] in entries:
                    entries[kept[0]].append(Entry(number, index, position, names[number]))
                number += 1
        return homes, entries

    def _home(self, step: Step, name: str, p: Tensor, group: Group, row: Row) -> tuple[str, torch.device]:
        """Backend and device of a parameter, which is checked."""
        if group.get("fused") and p.is_meta:
            raise RuntimeError(
                f"`fused=True` requires all the params to be floating point Tensors with memory, got {name} on meta"
            )
        return self.checks.backend_of(name, p, step, row, self.states), local(p).device

    def _check_formats(self, step: Step, name: str, p: Tensor, group: Group, row: Row) -> None:
        """Raise where states are not what their formats say: a checkpoint can bring anything."""
        layout = self.states.layout(p, group, row.rule)
        if not layout.plain:
            formats.check(name, p, step.state[p], self.states.names(row.rule), layout)

    def _add_written(
        self,
        step: Step,
        number: int,
        p: Tensor,
        group: Group,
        row: Row,
        home: tuple[str, torch.device],
        tensors: list[Tensor],
        owners: list[tuple[int, str]],
    ) -> None:
        """Add what a step of a parameter writes, of what exists, and whose it is."""
        tensors.append(local(p))
        owners.append((number, ""))
        beside = counts_beside(group, home[0])
        # Parameters may share a counter on the host, which counts one after the other.
        shared = () if beside else ("step", *self.states.scalars(row.rule))
        for key, t in step.state.get(p, {}).items():
            if isinstance(t, Tensor) and (t.dim() or beside) and key not in shared:
                tensors.append(local(t))
                owners.append((number, key))

    def _is_ready(self, step: Step, p: Tensor, group: Group, row: Row) -> bool:
        """True for a parameter that has all the states that its first gradient would make, or needs none."""
        if self.states.missing(p, row.rule):
            return False
        return group.get("weight_format") is None or not is_half(p) or bool(step.state.get(p))

    def _make_states(self, step: Step, number: int, name: str, p: Tensor, group: Group, row: Row) -> None:
        state = step.state.get(p)
        self._before.append((p, None if state is None else dict(state)))
        if self.states.ensure(name, p, group, row) and step.input_of(p) is not None:
            self.fresh.add(number)
        self._check_formats(step, name, p, group, row)
        if "remainder" in step.state.get(p, ()):
            self.split.append(number)

    def _note_made(self, step: Step) -> None:
        """What was made is written too: a parameter that joins later must not share its memory."""
        made = []
        for p, before in self._before:
            for key, t in step.state.get(p, {}).items():
                if isinstance(t, Tensor) and t.dim() and (before is None or before.get(key) is not t):
                    made.append(local(t))
        if made:
            self._memory.meeting(made)

    def _forget(self, step: Step) -> None:
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
            self._forget(step)

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
        found: list[tuple[int, int, str, Tensor]] = []
        number = 0
        for index, group in enumerate(step.groups):
            for position, p in enumerate(group["params"]):
                if number in numbers:
                    found.append((number, index, name_of(group, index, position), p))
                number += 1
        tensors: list[Tensor] = []
        for number, index, name, p in found:
            home = self._home(step, name, p, step.groups[index], step.rows[index])
            if home != (compiled.backend, compiled.device):
                return False
            self._add_written(step, number, p, step.groups[index], step.rows[index], home, tensors, [])
        if self._memory.meeting(tensors):
            return False
        try:
            for number, index, name, p in found:
                self._make_states(step, number, name, p, step.groups[index], step.rows[index])
            self._note_made(step)
            compiled.adopt(step, self.states, [(number, index, p) for number, index, _, p in found], self.fresh)
        except BaseException:
            self._forget(step)
            raise
        if self._refresh(step):
            return True
        self._forget(step)
        return False

    def norms(self, step: Step, classes: NormClasses) -> Tensor | None:
        """For each class the sum of squares of this process' gradients; None where the plan no longer holds."""
        try:
            if not self._refresh(step):
                return None
            self.new = False
            for executor in self.compiled:
                executor.set_norm_classes([classes.of[p] for p in parameters(step)])
            return local_total(self.executors, step, classes, inf=False)
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
        control, clip = begun
        for i, executor in enumerate(executors):
            if i > 0:
                clip = clip.on(executor.device)
            if not executor.run(step, control, clip):
                self._undo(step)
                return Outcome.SKIPPED
        self.states.end(split)
        self.fresh.clear()
        return Outcome.RAN

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
        return step.control.found_inf is not None or self.settings["nonfinite"] == "skip"

    def _first_step_differs(self, step: Step) -> bool:
        """True where the host must know whether this step is skipped, and so wait for the device, because the next one is then
        another formula: once in a training, before states exist.
        """
        if not self.fresh:
            return False
        number = 0
        for group, row in zip(step.groups, step.rows, strict=True):
            name = reference.RULES[row.rule].first_differs
            numbers = range(number, number := number + len(group["params"]))
            if name is not None and row.hyper[name] != 0.0 and not self.fresh.isdisjoint(numbers):
                # A step that is being captured cannot wait; torch asks for warm-up steps before.
                return not any(p.is_cuda for p in group["params"]) or not torch.cuda.is_current_stream_capturing()
        return False

    def _check_device_control(self, step: Step, executors: list[Executor]) -> None:
        """Raise where a step that a device decides about needs the host."""
        by_device = all(executor.backend in ("cuda", "triton") for executor in executors)
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
