"""From an optimizer's groups and state to what one step touches. A plan is a cache of checks: the compiled part compares
every address with what it saw and refuses to run when something changed; then a new plan is built, with every check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import backend as _backend
from . import formats as _formats
from .clipping import Clip, NormClasses, begin, norm_classes
from .sharding import local

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


# Elements per chunk; 0 lets the plan choose.
_CHUNK = 0


class Row(NamedTuple):
    """What a group asks for in this step: a rule, the sign of its gradients, and the rule's hyper-parameters.

    A hyper-parameter is a float, or a tensor of one element: on an accelerator, which reads it, or where autograd watches.
    """

    rule: str
    sign: float
    hyper: dict[str, float | Tensor]


class Control(NamedTuple):
    """What the whole step shares: a factor on all gradients, a loss scaler's tensors where they are on a device, and what a
    gradient is clamped to.
    """

    grad_coef: float
    grad_scale: Tensor | None
    found_inf: Tensor | None
    clip_value: float


def table_of(rows: list[Row], device: torch.device | None) -> tuple[list[Any], list[Tensor]]:
    """Rows as a compiled plan takes them. For a plan on a device tensors become addresses, else numbers; also returned are the
    tensors at these addresses: copies of those that are on another device.
    """
    assert _backend._C is not None
    table = []
    used = []
    for rule, sign, hyper in rows:
        known = _backend._C.rules[rule]
        values, on_device = [], []
        for index, name in enumerate(known.hyper):
            value = hyper[name]
            if device is not None and isinstance(value, Tensor):
                if value.dtype not in (torch.float32, torch.float64):
                    raise TypeError(f"{name} must be a float32 or float64 tensor, got {value.dtype}")
                used.append(value.to(device, non_blocking=True))
                on_device.append((index, used[-1].data_ptr(), value.dtype == torch.float64))
                values.append(0.0)
            else:
                values.append(float(value))
        table.append(_backend._C.Row(rule=known.number, sign=sign, hyper=values))
        for where in on_device:
            table[-1].read_from(*where)
    return table, used


def counter_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's step counter: torch's, but float32 wherever a compiled plan or Triton may count."""
    wide = torch.get_default_dtype() == torch.float64 and p.dtype not in _backend.FUSED_DTYPES
    return torch.float64 if wide else torch.float32


def is_counter(value: object, p: Tensor, device: torch.device) -> bool:
    """True for a parameter's step counter as torch keeps it, on a device."""
    return isinstance(value, Tensor) and (value.dtype, value.dim(), value.device) == (counter_dtype(p), 0, device)


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


def apart(tensor: Tensor) -> bool:
    """True where each dimension steps over all that the faster ones span, so that no two elements can meet."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def element_addresses(tensor: Tensor) -> Tensor:
    """Byte addresses of all elements; only for the layouts that need it."""
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size, device="cpu") * stride
    return (offsets * tensor.element_size() + tensor.data_ptr()).flatten()


class Span(NamedTuple):
    """The stretch of memory that a tensor's elements lie in."""

    start: int
    end: int
    name: str
    tensor: Tensor
    dense: bool


def check_overlap(tensors: list[tuple[str, Tensor]]) -> None:
    """Raise if two of the tensors that a step writes share memory, or one shares it with itself."""
    spans = []
    for name, tensor in tensors:
        if tensor.numel() == 0 or not _backend.has_plain_memory(tensor):
            continue
        if not apart(tensor) and torch.unique(element_addresses(tensor)).numel() != tensor.numel():
            raise RuntimeError(
                f"{name} must not overlap itself, got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        spans.append(Span(start, start + (last + 1) * tensor.element_size(), name, tensor, dense(tensor)))
    open_spans: list[Span] = []
    for span in sorted(spans, key=lambda span: span[:2]):
        open_spans = [other for other in open_spans if other.end > span.start]
        for other in open_spans:
            both_dense = other.dense and span.dense
            if both_dense or torch.isin(element_addresses(other.tensor), element_addresses(span.tensor)).any():
                raise RuntimeError(f"{other.name} and {span.name} must not share memory: a step writes both")
        open_spans.append(span)


class Compiled(NamedTuple):
    """A compiled plan and where it runs."""

    backend: str
    device: torch.device
    plan: Any


def _formats_of(optimizer: FusedOptimizer) -> list[tuple[Any, Any]]:
    return [(group.get("state_format"), group.get("weight_format")) for group in optimizer.param_groups]


class StepPlan:
    """Everything that one optimizer's step updates, on every backend. Building it makes missing states."""

    def __init__(self, optimizer: FusedOptimizer, rows: list[Row]) -> None:
        self.new = True
        self.rules = [row.rule for row in rows]
        self.formats = _formats_of(optimizer)
        self.slow: list[Slow] = []
        self.compiled: list[Compiled] = []
        self.hyper_tensors: list[Tensor] = []  # whose addresses the compiled plans have
        self.has_wrappers = any(local(p) is not p for group in optimizer.param_groups for p in group["params"])
        self.fast = fast = self._check(optimizer, rows)
        wants_norm = optimizer._own["max_grad_norm"] is not None
        self.norm_classes: NormClasses | None = norm_classes(optimizer) if wants_norm else None
        self.fresh: set[Tensor] = set()
        self.split: list[Tensor] = []
        self.before = {p: dict(state) for p, state in optimizer.state.items()}
        try:
            for index, (group, row) in enumerate(zip(optimizer.param_groups, rows, strict=True)):
                optimizer._convert_states(group, index)
                for p in group["params"]:
                    if optimizer._input_of(p) is None:
                        continue
                    if optimizer._init_state(p, group, row.rule):
                        self.fresh.add(p)
                    if p in optimizer.state and "remainder" in optimizer.state[p]:
                        self.split.append(p)
            for slow in self.slow:
                group, names = optimizer.param_groups[slow.group], optimizer._names(rows[slow.group].rule)
                layout = optimizer._layout(slow.param, group, rows[slow.group].rule)
                if not layout.plain:
                    _formats.check(slow.name, slow.param, optimizer.state[slow.param], names, layout)
            for where in dict.fromkeys(fast.values()):
                self._compile(optimizer, rows, fast, *where)
            if self.norm_classes is not None and len(self.norm_classes.groups) > 1:
                self.set_norm_classes(optimizer, self.norm_classes)
        except BaseException:
            self._forget(optimizer)
            raise

    def _forget(self, optimizer: FusedOptimizer) -> None:
        """Take back the states that were made for a step that failed or was skipped, or the next one would not be the first."""
        for p in list(optimizer.state):
            if p not in self.before:
                del optimizer.state[p]
                continue
            optimizer.state[p].clear()
            optimizer.state[p].update(self.before[p])

    def executors(self) -> list[tuple[str, torch.device]]:
        """The backends and devices that share the step."""
        return [(backend, device) for backend, device, _ in self.compiled] + [
            (slow.backend, local(slow.param).device) for slow in self.slow
        ]

    def _check(self, optimizer: FusedOptimizer, rows: list[Row]) -> dict[Tensor, tuple[str, torch.device]]:
        """Check every parameter with a gradient before anything changes; return where compiled plans update them."""
        fast: dict[Tensor, tuple[str, torch.device]] = {}
        written: list[tuple[str, Tensor]] = []
        for index, (group, row) in enumerate(zip(optimizer.param_groups, rows, strict=True)):
            for position, p in enumerate(group["params"]):
                if optimizer._input_of(p) is None:
                    continue
                name = f"parameter {position} of group {index}"
                if group.get("fused") and p.is_meta:
                    raise RuntimeError(
                        f"`fused=True` requires all the params to be floating point Tensors with memory, got {name} on meta"
                    )
                backend = optimizer._backend_of(name, p, row)
                if backend in ("cpu", "cuda"):
                    fast[p] = backend, local(p).device
                else:
                    self.slow.append(Slow(name, p, index, backend))
                written.append((name, local(p)))
                state = optimizer.state[p] if p in optimizer.state else {}
                written += [(f"{k} of {name}", local(t)) for k, t in state.items() if isinstance(t, Tensor) and t.dim()]
        check_overlap(written)
        return fast

    def _compile(
        self,
        optimizer: FusedOptimizer,
        rows: list[Row],
        fast: dict[Tensor, tuple[str, torch.device]],
        backend: str,
        device: torch.device,
    ) -> None:
        assert _backend._C is not None
        rules = _backend._C.rules
        plan = _backend._C.Plan(
            reader=_backend.reader(),
            state_names={rules[row.rule].number: optimizer._names(row.rule) for row in rows},
            step_name="step",
            chunk=_CHUNK,
            device=-1 if backend == "cpu" else device.index or 0,
        )
        for index, (group, row) in enumerate(zip(optimizer.param_groups, rows, strict=True)):
            on_device = optimizer._step_on_device(group, backend)
            for p in group["params"]:
                if fast.get(p) == (backend, device):
                    self._add(plan, optimizer, p, index, row, on_device)
                elif optimizer._input_of(p) is None:
                    plan.defer(p, index)
                else:
                    plan.ignore(p, index)
        plan.seal(optimizer.state)
        self.compiled.append(Compiled(backend, device, plan))

    def _add(self, plan: Any, optimizer: FusedOptimizer, p: Tensor, index: int, row: Row, on_device: bool) -> None:
        assert _backend._C is not None
        group = optimizer.param_groups[index]
        layout = optimizer._layout(p, group, row.rule)
        formats = [] if layout.plain else [_backend._C.formats[name] for name in (layout.param, *layout.states)]
        plan.add(
            p,
            optimizer.state.get(p),
            group=index,
            rule=_backend._C.rules[row.rule].number,
            fresh=p in self.fresh,
            counts=optimizer._counts(p),
            step_on_device=on_device,
            formats=formats,
            draws=layout.draws,
            place=layout.place,
        )

    def set_norm_classes(self, optimizer: FusedOptimizer, classes: NormClasses) -> None:
        """Have norms measured for each class of parameters."""
        self.norm_classes = classes
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for backend, device, plan in self.compiled:
            plan.set_norm_classes([classes.of[p] for p in params if self.fast.get(p) == (backend, device)])

    def refresh(self, optimizer: FusedOptimizer, rows: list[Row]) -> bool:
        """Bring the compiled plans up to this step. False where one no longer holds."""
        self.hyper_tensors = []
        for backend, device, plan in self.compiled:
            table, used = table_of(rows, device if backend == "cuda" else None)
            self.hyper_tensors += used
            if not plan.refresh(optimizer.param_groups, optimizer.state, optimizer._inputs, table):
                return False
        return True

    def run(self, optimizer: FusedOptimizer, rows: list[Row], control: Control) -> bool:
        """Update everything. False, and nothing changed, where the plan no longer holds."""
        if self.rules != [row.rule for row in rows] or self.formats != _formats_of(optimizer):
            return False
        # A plan that was built for this step has just made these checks.
        if not self.new and not all(self._holds(optimizer, rows, slow) for slow in self.slow):
            return False
        self.new = False
        optimizer._drop_stale_remainders(self.split)
        if not self.refresh(optimizer, rows):
            return False

        backends = {backend for backend, _ in self.executors()}
        may_skip = control.found_inf is not None or optimizer._own["nonfinite"] == "skip"
        if backends <= {"cuda", "triton"} and may_skip and any(self._counted_by_host(optimizer, s) for s in self.slow):
            # The host would have to wait before it counts. As the CUDA backend, rather than wait in silence: a scaler hands
            # over found_inf only where fused=True was asked for, and then a group without it is an oversight.
            raise RuntimeError(
                "fused must be True in every group for a loss scaler's found_inf and for nonfinite='skip': "
                "step counters are on the host"
            )

        on_gpu = any(slow.backend == "triton" and slow.param.is_cuda for slow in self.slow)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            # A replay would upload its tables again, from memory that is somebody else's by then.
            raise RuntimeError("backend='triton' must not be captured into a graph")

        try:
            begun = begin(self, optimizer, control)
        except BaseException:
            self._undo(optimizer)
            raise
        if begun is None:
            self._undo(optimizer)
            return True
        control, clip = begun

        updated: list[Tensor] = []
        for i, (backend, device, plan) in enumerate(self.compiled):
            if i > 0:
                clip = clip.on(device)
            if backend == "cpu":
                updated += plan.run(control.grad_coef, control.clip_value, clip.compiled(), torch.get_num_threads())
                if plan.skipped:
                    self._undo(optimizer)
                    return True
            else:
                scaler = [None if t is None else t.to(device) for t in (control.grad_scale, control.found_inf)]
                stream = _backend.current_stream(device)
                addresses = [0 if t is None else t.data_ptr() for t in scaler]
                with _backend.current(device):
                    updated += plan.run_cuda(control.grad_coef, control.clip_value, clip.compiled(), *addresses, stream)
                optimizer._keep_captured(plan)
                if _backend.is_side_stream(device, stream):
                    # The gradients' memory may belong to another stream: not to be reused before this one has read it.
                    for p in optimizer._given(device):
                        p.record_stream(torch.cuda.current_stream(device))
        torch.autograd.graph.increment_version(updated)
        if self.slow:
            self._run_slow(optimizer, rows, control, clip)
        optimizer._note_versions(self.split)
        self.fresh.clear()
        self.before.clear()
        return True

    def _undo(self, optimizer: FusedOptimizer) -> None:
        """Leave no trace of a step that changed nothing."""
        if self.fresh:
            self._forget(optimizer)

    def _holds(self, optimizer: FusedOptimizer, rows: list[Row], slow: Slow) -> bool:
        """True where a parameter that has a gradient is as it was checked."""
        name, p, group, backend = slow
        if optimizer._input_of(p) is None:
            return True
        row = rows[group]
        if optimizer._backend_of(name, p, row) != backend or optimizer._missing_states(p, row.rule):
            return False
        if not optimizer._counts(p):
            return True
        beside = optimizer._step_on_device(optimizer.param_groups[group], "triton")
        return is_counter(optimizer.state[p]["step"], p, p.device if beside else torch.device("cpu"))

    def _counted_by_host(self, optimizer: FusedOptimizer, slow: Slow) -> bool:
        """True where a step of this parameter moves a counter on the host."""
        return (
            optimizer._counts(slow.param)
            and optimizer._input_of(slow.param) is not None
            and not optimizer._step_on_device(optimizer.param_groups[slow.group], slow.backend)
        )

    def _run_slow(self, optimizer: FusedOptimizer, rows: list[Row], control: Control, clip: Clip) -> None:
        for_triton = []
        for slow in self.slow:
            _, p, group, backend = slow
            g = optimizer._input_of(p)
            if g is None:
                continue
            rule, sign, hyper = rows[group]
            step: Any = optimizer.state[p]["step"] if optimizer._counts(p) else 0
            if self._counted_by_host(optimizer, slow):
                step += 1
                step = int(step.item())
            tensors = [local(t) for t in (p, g, *optimizer._states(p, rule).values())]
            fresh = p in self.fresh
            layout = optimizer._layout(p, optimizer.param_groups[group], rule)
            if backend == "triton":
                state = optimizer.state[p] if p in optimizer.state else {}
                scales = [state.get(f"{name}_scale") for name in optimizer._names(rule)]
                beside = [None if t is None else local(t) for t in (state.get("remainder"), None, *scales)]
                p, g, *states = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
                key = state["key"] if layout.draws else 0
                for_triton.append((rule, p, g, states, hyper, step, fresh, sign, layout, beside, key))
                continue
            # Where autograd watches, a tensor lr stays one.
            numbers = hyper if torch.is_grad_enabled() else {name: float(value) for name, value in hyper.items()}
            arguments = numbers, step, fresh, sign * control.grad_coef, control.clip_value
            if not layout.plain:
                _formats.update(rule, p, tensors[1], optimizer.state[p], optimizer._names(rule), layout, *arguments)
                continue
            update = reference.update_sparse if g.is_sparse else reference.update
            update(rule, tensors[0], tensors[1], tensors[2:], *arguments)
        if for_triton:
            from .. import triton_kernels  # type: ignore[attr-defined]

            if self.compiled:
                clip = clip.on(for_triton[0][1].device)
            given = triton_kernels.Clip(*clip[:-1])
            triton_kernels.update([triton_kernels.Item(*item) for item in for_triton], *control, given)
            torch.autograd.graph.increment_version([item[1] for item in for_triton])
