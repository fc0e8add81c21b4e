"""Steps of several passes: one rule over tensors that some optimizer has, with hyper-parameters per tensor, by the same kernels,
formats and backends. For methods that have a matrix product or a norm between two passes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .clipping import NormClasses, combined, parts_of_norms
from .optimizer import FusedOptimizer
from .plan import Control, Row, StepPlan
from .settings import DEFAULTS
from .sharding import aligned_gradients, local, reduce, shard_groups

_NO_CONTROL = Control(1.0, None, None, math.inf)


class Job(NamedTuple):
    """A tensor that a pass updates in place: with what, its states, the hyper-parameters of its rule, the sign of what it is
    updated with, the format of a weight, and that asked for of states.
    """

    p: Tensor
    g: Tensor
    state: dict[str, Any]
    hyper: dict[str, float | Tensor]
    sign: float = 1.0
    weight_format: str | None = None
    state_format: str | torch.dtype | None = None


class Pass(FusedOptimizer):
    """An optimizer in form alone: it has a group for each tensor of the last call, and its states are dictionaries of the
    caller's, which hold everything but ``step`` already. Not copied or saved: its owner makes another.
    """

    def __init__(self, rule: str, names: tuple[str, ...], backend: str | None, counts: bool) -> None:
        self._rule, self._rule_names, self._counts_steps = rule, names, counts  # type: ignore[misc]
        self._own = {**DEFAULTS, "backend": backend}
        self.defaults = {"differentiable": False}
        self.param_groups, self.state = [], {}  # type: ignore[assignment]
        self._rebuild()

    def run(self, jobs: list[Job]) -> None:
        """Update every job's tensor in one region."""
        if jobs:
            self._take(jobs)
            self._run_rows(self._rows(jobs), _NO_CONTROL)
            self._inputs = {}

    def squared_norms(self, jobs: list[Job], classes: list[int]) -> list[Tensor]:
        """Per job the sum of squares of every ``g`` of its class, classes being numbered from 0, over all processes that have a
        piece of one: float64 numbers on the first one's device, in the order of csrc/plan/norm.h.
        """
        self._take(jobs)
        shards = [shard_groups(job.p) or {} for job in jobs]
        measured = range(len(jobs)) if any(shards) else classes  # pieces are added up over their own processes
        rows, key = self._rows(jobs), tuple(map(id, self.param_groups))
        plan = self._plans.get(key) or StepPlan(self, rows)
        if not plan.refresh(self, rows):
            plan = StepPlan(self, rows)
            if not plan.refresh(self, rows):
                raise RuntimeError("a tensor changed while its norm was measured")
        of = {job.p: number for job, number in zip(jobs, measured, strict=True)}
        plan.set_norm_classes(self, NormClasses(of, [()] * (max(measured) + 1)))
        found, *others = parts_of_norms(plan, self, inf=False)
        for part in others:
            found = combined(found, part.to(found.device), inf=False)
        plan.new = False
        self._keep(key, plan)
        self._inputs = {}
        # No index by numbers of the host, which torch would copy to the device and wait.
        parts = found.unbind()
        if not any(shards):
            return [parts[number] for number in classes]
        totals: dict[int, Tensor] = {}
        for i, (groups, number) in enumerate(zip(shards, classes, strict=True)):
            reduce(found[i : i + 1], groups.values())
            totals[number] = totals[number] + parts[i] if number in totals else parts[i]
        return [totals[number] for number in classes]

    def _take(self, jobs: list[Job]) -> None:
        if len(jobs) != len(self.param_groups) or any(
            group["params"][0] is not job.p for group, job in zip(self.param_groups, jobs, strict=True)
        ):
            self.param_groups = [{"params": [job.p]} for job in jobs]
            self._plans = {}
        for group, job in zip(self.param_groups, jobs, strict=True):
            group["weight_format"], group["state_format"] = job.weight_format, job.state_format
        self.state = {job.p: job.state for job in jobs}  # type: ignore[assignment]
        self._inputs = {job.p: job.g for job in jobs}

    def _rows(self, jobs: list[Job]) -> list[Row]:
        return [Row(self._rule, job.sign, job.hyper) for job in jobs]

    def _names(self, rule: str) -> tuple[str, ...]:
        return self._rule_names

    def _asks_for_states_only(self, plan: StepPlan, rows: list[Row]) -> bool:
        return False

    def _convert_states(self, group: dict[str, Any], index: int) -> None:
        pass  # the owner's


class MultiPass(FusedOptimizer):
    """A method whose step, or that of some groups, has several passes. It takes gradients as they are: a ``GradScaler`` unscales
    them before the step, and clipping is torch's.
    """

    #: Why the settings that need one pass are refused.
    _why_not_one_pass: ClassVar[str]
    _passes: dict[tuple[str, int], Pass]
    #: Tensors that a pass writes and the next one reads, by parameter: memory that no checkpoint has.
    _buffers: dict[Tensor, Tensor]
    #: Copies of step counters, for a pass that draws after the one that counts.
    _counters: dict[Tensor, Tensor]

    def _rebuild(self) -> None:
        super()._rebuild()
        self._passes, self._buffers, self._counters = {}, {}, {}

    def _step_in_one_pass(self, groups: list[dict[str, Any]]) -> None:
        """The one-pass step of some of the groups."""
        everything = self.param_groups
        for p in (p for group in everything for p in group["params"]):
            if p not in self._stream_names:
                self._key(p)  # by its place among all
        self.param_groups = groups
        try:
            FusedOptimizer._update(self)
        finally:
            self.param_groups = everything

    def _only_makes_states(self, rows: list[Row], gradients: dict[Tensor, Tensor]) -> bool:
        """What ``_asks_for_states_only`` says of a plan."""
        if any(isinstance(row.hyper["lr"], Tensor) or row.hyper["lr"] != 0.0 for row in rows):
            return False
        return not any(self.state.get(p) or bool(local(g).any()) for p, g in gradients.items())

    def _buffer(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        made = self._buffers.get(p)
        if made is None or (made.dtype, made.shape, made.device) != (dtype, p.shape, p.device):
            self._buffers[p] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        return self._buffers[p]

    def _job(
        self,
        p: Tensor,
        target: Tensor,
        g: Tensor,
        names: tuple[str, ...],
        hyper: dict[str, float | Tensor],
        sign: float = 1.0,
        weight_format: str | None = None,
        state_format: str | torch.dtype | None = None,
    ) -> Job:
        """A job with the states of these names that a parameter has, and what random bits need. Each pass that draws counts a
        step of the parameter, so that no two draw alike; where the method counts them itself, a later pass has a copy to count.
        """
        state = self.state[p] if p in self.state else {}
        given = {name: state[name] for name in names if name in state}
        if "key" in state:
            given["key"] = state["key"]
            if self._counts_steps and "step" not in names:
                given["step"] = self._counters.setdefault(p, state["step"].clone()).copy_(state["step"])
            else:
                given["step"] = state["step"]
        return Job(target, g, given, hyper, sign, weight_format, state_format)

    def _pass(self, rule: str, names: tuple[str, ...] = (), *, of: int = 0, counts: bool = False) -> Pass:
        """The pass of a rule, for those who call it once per group: of a group."""
        if (rule, of) not in self._passes:
            self._passes[rule, of] = Pass(rule, names, self._own["backend"], counts)
            self._passes[rule, of]._captured = self._captured
        return self._passes[rule, of]

    def _gradients(self, group: dict[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
        """Name, parameter and gradient of each parameter that has one, checked; raise for settings that need one pass."""
        for name in ("max_grad_norm", "clip_grad_value"):
            if self._own[name] is not None:
                raise RuntimeError(
                    f"{name} must be None {self._why_not_one_pass}, got {self._own[name]}: "
                    "call torch.nn.utils.clip_grad_norm_ or clip_grad_value_ before the step"
                )
        for name in ("fused", "differentiable", "capturable"):
            # By its default a GradScaler leaves all gradients as they are.
            if group.get(name) or self.defaults.get(name):
                raise RuntimeError(f"{name} must be False {self._why_not_one_pass}")
        index = next(i for i, other in enumerate(self.param_groups) if other is group)
        aligned = aligned_gradients([group])
        found = []
        row = Row("sgdw", 1.0, {})
        for position, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            name = f"parameter {position} of group {index}"
            self._backend_of(name, p, row)
            found.append((name, p, aligned.get(p, p.grad)))
        return found


def plain_step(lr: float | Tensor, weight_decay: float | Tensor) -> dict[str, float | Tensor]:
    """Hyper-parameters of the rule "sgdw" for a tensor."""
    return {"lr": lr, "weight_decay": weight_decay, "l1_decay": 0.0, "momentum": 0.0, "dampening": 0.0}
