"""From a step to what it touches. A plan is a cache of checks: the compiled part compares every address with what it saw and
refuses to run when something changed; then a new plan is built, with every check."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import Checks
from .clipping import Executor, Report, begin
from .executors import Compiled, Entry, Reference, Triton
from .memory import check_overlap
from .norm import NormClasses, local_total, norm_classes
from .rows import Step, name_of
from .sharding import local
from .states import States


class Outcome(enum.Enum):
    """What came of a step."""

    RAN = "ran"
    #: A loss scaler or the norm said so; nothing but the report changed.
    SKIPPED = "skipped"
    #: The plan no longer holds; nothing changed.
    STALE = "stale"


class StepPlan:
    """Everything that one optimizer's step updates, on every backend. Building it makes missing states."""

    def __init__(self, step: Step, states: States, checks: Checks, report: Report, captured: list[Any]) -> None:
        """``captured``: where compiled plans are kept that graphs were captured from."""
        self.states, self.checks, self.settings, self.report = states, checks, checks.settings, report
        self.rules = [row.rule for row in step.rows]
        self.formats = step.formats()
        self.has_wrappers = any(local(p) is not p for group in step.groups for p in group["params"])
        #: True until the step that it was built for has run.
        self.new = True
        #: Parameters that had no states before that step, and split weights.
        self.fresh: set[Tensor] = set()
        self.split: list[Tensor] = []
        homes, entries = self._check(step)
        wants_norm = self.settings["max_grad_norm"] is not None
        given = self.settings["norm_process_group"]
        self.norm_classes = norm_classes(step.groups, given) if wants_norm else None
        self.before = {p: dict(state) for p, state in step.state.items()}
        try:
            self._make_states(step)
            self.in_python = [
                kind(entries[kind.backend], states, self.fresh) for kind in (Reference, Triton) if entries[kind.backend]
            ]
            for executor in self.in_python:
                executor.check_formats(step)
            self.compiled = [
                Compiled(step, states, backend, device, homes, self.fresh, captured)
                for backend, device in dict.fromkeys(homes.values())
            ]
            if self.norm_classes is not None and len(self.norm_classes.groups) > 1:
                self._set_norm_classes(self.norm_classes)
        except BaseException:
            self._forget(step)
            raise
        self.executors: Sequence[Executor] = [*self.compiled, *self.in_python]

    def _check(self, step: Step) -> tuple[dict[Tensor, tuple[str, torch.device]], dict[str, list[Entry]]]:
        """Check every parameter with a gradient before anything changes. Returns backend and device of those that compiled plans
        update, and the others by backend.
        """
        homes: dict[Tensor, tuple[str, torch.device]] = {}
        entries: dict[str, list[Entry]] = {Reference.backend: [], Triton.backend: []}
        written: list[tuple[str, Tensor]] = []
        for index, (group, row) in enumerate(zip(step.groups, step.rows, strict=True)):
            for position, p in enumerate(group["params"]):
                if step.input_of(p) is None:
                    continue
                name = name_of(group, index, position)
                if group.get("fused") and p.is_meta:
                    raise RuntimeError(
                        f"`fused=True` requires all the params to be floating point Tensors with memory, got {name} on meta"
                    )
                backend = self.checks.backend_of(name, p, step, row, self.states)
                if backend in entries:
                    entries[backend].append(Entry(name, p, index))
                else:
                    homes[p] = backend, local(p).device
                written.append((name, local(p)))
                state = step.state[p] if p in step.state else {}
                written += [(f"{k} of {name}", local(t)) for k, t in state.items() if isinstance(t, Tensor) and t.dim()]
        check_overlap(written)
        return homes, entries

    def _make_states(self, step: Step) -> None:
        for index, (group, row) in enumerate(zip(step.groups, step.rows, strict=True)):
            for position, p in enumerate(group["params"]):
                if step.input_of(p) is None:
                    continue
                if self.states.ensure(name_of(group, index, position), p, group, row):
                    self.fresh.add(p)
                if p in step.state and "remainder" in step.state[p]:
                    self.split.append(p)

    def _forget(self, step: Step) -> None:
        """Take back the states that were made for a step that failed or was skipped, or the next one would not be the first."""
        for p in list(step.state):
            if p not in self.before:
                del step.state[p]
                continue
            step.state[p].clear()
            step.state[p].update(self.before[p])

    def keep_new_states(self, step: Step) -> None:
        """Leave it at having made states, for a checkpoint to fill: a step that is skipped later does not take them back."""
        self.new = False
        self.before = {p: dict(state) for p, state in step.state.items()}

    def _undo(self, step: Step) -> None:
        """Leave no trace of a step that changed nothing."""
        if self.fresh:
            self._forget(step)

    def _set_norm_classes(self, classes: NormClasses) -> None:
        self.norm_classes = classes
        for executor in self.compiled:
            executor.set_norm_classes(classes)

    def _refresh(self, step: Step) -> bool:
        """Bring the compiled plans up to a step. False where one no longer holds."""
        return all(executor.refresh(step) for executor in self.compiled)

    def norms(self, step: Step, classes: NormClasses) -> Tensor | None:
        """For each class the sum of squares of this process' gradients; None where the plan no longer holds."""
        if not self._refresh(step):
            return None
        self._set_norm_classes(classes)
        self.new = False
        return local_total(self.executors, step, classes, inf=False)

    def run(self, step: Step) -> Outcome:
        """Update everything that has a gradient."""
        if self.rules != [row.rule for row in step.rows] or self.formats != step.formats():
            return Outcome.STALE
        # A plan that was built for this step has just made these checks.
        if not self.new and not all(executor.holds(step, self.checks) for executor in self.in_python):
            return Outcome.STALE
        self.new = False
        self.states.begin(self.split)
        if not self._refresh(step):
            return Outcome.STALE
        self._check_device_control(step)
        try:
            begun = begin(self.executors, step, self.norm_classes, self.settings, self.report)
        except BaseException:
            self._undo(step)
            raise
        if begun is None:
            self._undo(step)
            return Outcome.SKIPPED
        control, clip = begun
        for i, executor in enumerate(self.executors):
            if i > 0:
                clip = clip.on(executor.device)
            if not executor.run(step, control, clip):
                self._undo(step)
                return Outcome.SKIPPED
        self.states.end(self.split)
        self.fresh.clear()
        self.before.clear()
        return Outcome.RAN

    def _check_device_control(self, step: Step) -> None:
        """Raise where a step that a device decides about needs the host."""
        triton = [executor for executor in self.in_python if isinstance(executor, Triton)]
        may_skip = step.control.found_inf is not None or self.settings["nonfinite"] == "skip"
        by_device = all(executor.backend in ("cuda", "triton") for executor in self.executors)
        if may_skip and by_device and any(executor.counts_on_host(step) for executor in triton):
            # The host would have to wait before it counts. As the CUDA backend, rather than wait in silence: a scaler hands
            # over found_inf only where fused=True was asked for, and then a group without it is an oversight.
            raise RuntimeError(
                "fused must be True in every group for a loss scaler's found_inf and for nonfinite='skip': "
                "step counters are on the host"
            )
        for executor in triton:
            executor.check_capture()
