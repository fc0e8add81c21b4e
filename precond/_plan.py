"""From an optimizer's groups and state to what one step touches. A plan is a cache of checks: the compiled part compares
every address with what it saw and refuses to run when something changed; then a new plan is built, with every check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _backend, reference
from ._sharding import local

if TYPE_CHECKING:
    from ._optimizer import FusedOptimizer


# Elements per chunk; 0 lets the plan choose.
_CHUNK = 0


class Row(NamedTuple):
    """What a group asks for in this step: a rule, the sign of its gradients, and the rule's hyper-parameters."""

    rule: str
    sign: float
    hyper: dict[str, float]


class Slow(NamedTuple):
    """A parameter that no compiled plan updates."""

    name: str
    param: Tensor
    group: int
    backend: str


def dense(tensor: Tensor) -> bool:
    """True where the elements fill one stretch of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def element_offsets(tensor: Tensor) -> Tensor:
    """Byte addresses of all elements; only for the layouts that need it."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return (offsets * tensor.element_size() + tensor.data_ptr()).flatten()


def check_overlap(tensors: list[tuple[str, Tensor]]) -> None:
    """Raise if two of the tensors that a step writes share memory, or one shares it with itself."""
    spans = []
    for name, tensor in tensors:
        if tensor.numel() == 0:
            continue
        is_dense = dense(tensor)
        if not is_dense and torch.unique(element_offsets(tensor)).numel() != tensor.numel():
            raise RuntimeError(
                f"{name} must not overlap itself, got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        spans.append((start, start + (last + 1) * tensor.element_size(), name, tensor, is_dense))
    spans.sort(key=lambda span: span[:2])
    reach = 0  # index of the span that ends last so far
    for i in range(1, len(spans)):
        _, end, first_name, first, first_dense = spans[reach]
        start, _, name, tensor, is_dense = spans[i]
        if start < end and (
            (first_dense and is_dense) or torch.isin(element_offsets(first), element_offsets(tensor)).any()
        ):
            raise RuntimeError(f"{first_name} and {name} must not share memory: a step writes both")
        if spans[i][1] > end:
            reach = i


class StepPlan:
    """Everything that one optimizer's step updates, on every backend. Building it makes missing states."""

    def __init__(self, optimizer: FusedOptimizer, rows: list[Row]) -> None:
        self.rules = [row.rule for row in rows]
        self.slow: list[Slow] = []
        self.compiled: Any = None
        fast = self._check(optimizer, rows)
        self.fresh = {
            p
            for group, row in zip(optimizer.param_groups, rows, strict=True)
            for p in group["params"]
            if optimizer._input_of(p) is not None and optimizer._init_state(p, group, row.rule)
        }
        if fast:
            self._compile(optimizer, rows, fast)

    def _check(self, optimizer: FusedOptimizer, rows: list[Row]) -> set[Tensor]:
        """Check every parameter with a gradient before anything changes; return those for the compiled plan."""
        fast: set[Tensor] = set()
        written: list[tuple[str, Tensor]] = []
        for index, (group, row) in enumerate(zip(optimizer.param_groups, rows, strict=True)):
            for position, p in enumerate(group["params"]):
                if optimizer._input_of(p) is None:
                    continue
                name = f"parameter {position} of group {index}"
                backend = optimizer._backend_of(name, p, row.rule)
                if backend == "cpu":
                    fast.add(p)
                else:
                    self.slow.append(Slow(name, p, index, backend))
                written.append((name, local(p)))
                written += [(f"{key} of {name}", local(t)) for key, t in optimizer._states(p, row.rule).items()]
        check_overlap(written)
        return fast

    def _compile(self, optimizer: FusedOptimizer, rows: list[Row], fast: set[Tensor]) -> None:
        assert _backend._C is not None
        rules = _backend._C.rules
        step_name = "step" if optimizer._counts_steps else ""
        plan = _backend._C.Plan(_backend.reader(), list(optimizer._state_names), step_name, _CHUNK)
        for index, (group, row) in enumerate(zip(optimizer.param_groups, rows, strict=True)):
            for p in group["params"]:
                if p in fast:
                    plan.add(p, optimizer.state.get(p), index, rules[row.rule][0], p in self.fresh)
                elif optimizer._input_of(p) is None:
                    plan.defer(p)
                else:
                    plan.ignore(p)
        plan.seal(optimizer.state)
        self.compiled = plan

    def run(self, optimizer: FusedOptimizer, rows: list[Row], grad_coef: float) -> bool:
        """Update everything. False, and nothing changed, where the plan no longer holds."""
        if self.rules != [row.rule for row in rows]:
            return False
        for name, p, group, backend in self.slow:
            if optimizer._input_of(p) is not None and (
                optimizer._backend_of(name, p, rows[group].rule) != backend
                or optimizer._missing_states(p, rows[group].rule)
            ):
                return False
        if self.compiled is not None:
            assert _backend._C is not None
            rules = _backend._C.rules
            table = []
            for rule, sign, hyper in rows:
                number, _, names = rules[rule]
                table.append((number, sign, tuple([hyper[name] for name in names])))
            updated = self.compiled.step(
                optimizer.param_groups,
                optimizer.state,
                optimizer._inputs,
                table,
                grad_coef,
                0.0,
                torch.get_num_threads(),
            )
            if updated is None:
                return False
            torch.autograd.graph.increment_version(updated)
        self._run_slow(optimizer, rows, grad_coef)
        self.fresh.clear()
        return True

    def _run_slow(self, optimizer: FusedOptimizer, rows: list[Row], grad_coef: float) -> None:
        for_triton = []
        for _, p, group, backend in self.slow:
            g = optimizer._input_of(p)
            if g is None:
                continue
            row = rows[group]
            step = 0
            if optimizer._counts_steps:
                optimizer.state[p]["step"] += 1
                step = int(optimizer.state[p]["step"].item())
            states = [local(t) for t in optimizer._states(p, row.rule).values()]
            item = (row.rule, local(p), local(g), states, row.hyper, step, p in self.fresh, row.sign * grad_coef)
            if backend == "triton":
                for_triton.append(item)
            else:
                reference.update(*item)
        if for_triton:
            from . import triton_kernels  # type: ignore[attr-defined]

            triton_kernels.update([triton_kernels.Item(*item) for item in for_triton])
            torch.autograd.graph.increment_version([item[1] for item in for_triton])
