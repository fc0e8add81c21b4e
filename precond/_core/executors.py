"""What updates the parameters of a step: a compiled plan for each device, Triton's kernels, the reference text. A compiled plan
compares every address with what it saw; what the other two update is checked anew at each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import reference
from ..reference.statistics import sums_of
from . import backend as _backend
from . import formats
from .checks import Checks
from .counters import counts_beside, is_counter, next_step
from .formats import Layout
from .norm import NOTHING, Clip, NormClasses, reference_part
from .rows import Control, Entry, Step
from .sharding import local
from .states import States
from .statistics import Extras, real

# Elements per chunk; 0 lets the plan choose.
_CHUNK = 0


#: Backend and device of a parameter that a plan has; None for one that joins when it gets a gradient.
Home = tuple[str, torch.device] | None


class Compiled:
    """A plan of the extension: every parameter of a device that its kernels take, in one pass."""

    measures_itself: ClassVar[bool] = True

    def __init__(
        self,
        step: Step,
        states: States,
        backend: str,
        device: torch.device,
        entries: list[Entry],
        homes: list[Home],
        layouts: dict[int, Layout],
        fresh: set[int],
        captured: list[Any],
    ) -> None:
        """``entries``, ``homes``: of all parameters; the plan takes its own. ``layouts``: by number, of those that were not found
        ready. ``fresh``: numbers of those whose states are new. ``captured``: where plans are kept that graphs were captured
        from.
        """
        assert _backend._C is not None
        self.backend, self.device = backend, device
        self._captured = captured
        self._hyper_tensors: list[Tensor] = []  # whose addresses the plan has
        used = {row.rule for row in step.rows}
        self.plan = _backend._C.Plan(
            reader=_backend.reader(),
            state_names={
                _backend.number_and_hyper(rule)[0]: [*states.names(rule), *states.scalars(rule)] for rule in used
            },
            step_name="step",
            chunk=_CHUNK,
            device=device.index or 0 if backend == "cuda" else -1,
            gradients=-1 if device.type == "cpu" else device.index or 0,
        )
        own, end = (backend, device), 0
        for index, group in enumerate(step.groups):
            begin, end = end, end + len(group["params"])
            if homes[begin:end].count(own) == end - begin > 0 and layouts.keys().isdisjoint(range(begin, end)):
                self._add_ready(step, states, index)
                continue
            for entry in entries[begin:end]:
                p = entry.param(step)
                if homes[entry.number] != own:
                    (self.plan.defer if homes[entry.number] is None else self.plan.ignore)(p, index)
                    continue
                layout = layouts.get(entry.number) or states.layout(p, group, step.rows[index].rule)
                self._add(step, states, entry, layout, fresh)
        self.plan.seal(step.state)

    @property
    def sums_on(self) -> torch.device:
        """Where statistics are written."""
        return self.device

    @property
    def newcomers(self) -> list[int]:
        """Where nothing else kept the last refresh from bringing the plan up to its step: the numbers of the parameters that it
        has deferred and that have a gradient now.
        """
        found: list[int] = self.plan.newcomers
        return found

    def _add_ready(self, step: Step, states: States, index: int) -> None:
        """Add a group whose parameters and states are all as their dtypes say."""
        group, rule = step.groups[index], step.rows[index].rule
        self.plan.add_ready(
            group["params"],
            step.state,
            group=index,
            rule=_backend.number_and_hyper(rule)[0],
            counts=states.counts(group["params"][0], rule),
            step_on_device=counts_beside(group, self.backend),
        )

    def adopt(
        self, step: Step, states: States, newcomers: list[Entry], layouts: dict[int, Layout], fresh: set[int]
    ) -> None:
        """Update parameters that were deferred from now on."""
        for entry in newcomers:
            self._add(step, states, entry, layouts[entry.number], fresh, at=entry.number)
        self.plan.seal(step.state)

    def _add(self, step: Step, states: States, entry: Entry, layout: Layout, fresh: set[int], at: int = -1) -> None:
        assert _backend._C is not None
        p, rule = entry.param(step), step.rows[entry.group].rule
        numbers = [] if layout.plain else [_backend._C.formats[name] for name in (layout.param, *layout.states)]
        self.plan.add(
            param=p,
            state=step.state.get(p),
            group=entry.group,
            rule=_backend.number_and_hyper(rule)[0],
            fresh=entry.number in fresh,
            counts=states.counts(p, rule),
            step_on_device=counts_beside(step.groups[entry.group], self.backend),
            formats=numbers,
            draws=layout.draws,
            place=layout.place,
            at=at,
        )

    def refresh(self, step: Step) -> bool:
        """Bring the plan up to a step. False where it no longer holds."""
        table, self._hyper_tensors = _backend.table_of(step.rows, self.device if self.backend == "cuda" else None)
        # Else reading .grad of a DTensor looks for __torch_function__: 0.15 of the 0.3 us that it costs more than a plain one.
        with torch._C.DisableTorchFunctionSubclass():
            return bool(self.plan.refresh(step.groups, step.state, step.inputs, table))

    def release(self) -> None:
        """Let go of what the step held: gradients, states and hyper-parameters."""
        self.plan.release()
        if not self.plan.was_captured:
            self._hyper_tensors = []

    def has_gradients(self, step: Step) -> bool:
        """True where one of the parameters is updated, by the last refresh."""
        return bool(self.plan.has_gradients)

    def set_norm_classes(self, numbers: list[int]) -> None:
        """Have norms measured for each class of parameters, given by the class of each of them."""
        self.plan.set_norm_classes(numbers)

    def norms(self, step: Step, classes: NormClasses, inf: bool) -> Iterator[Tensor]:
        """Parts of the norm: float64 numbers, one for each class."""
        count = len(classes.groups)
        part = torch.zeros(count, dtype=torch.float64, device=self.device)
        clip = NOTHING._replace(total=part, inf=inf).compiled(count)
        if self.backend == "cpu":
            self.plan.norm(clip, torch.get_num_threads())
        else:
            with _backend.current(self.device):
                self.plan.norm_cuda(clip, _backend.current_stream(self.device))
            self._keep_captured()
        yield part

    def run(self, step: Step, control: Control, clip: Clip, extras: Extras) -> bool:
        """Update the parameters. False where the norm said to skip the step."""
        if self.backend == "cpu":
            threads = torch.get_num_threads()
            measured = extras.compiled()
            updated = self.plan.run(control.grad_coef, control.clip_value, clip.compiled(), threads, measured)
            torch.autograd.graph.increment_version(updated)
            return not self.plan.skipped
        scaler = [None if t is None else t.to(self.device) for t in (control.grad_scale, control.found_inf)]
        stream = _backend.current_stream(self.device)
        addresses = [0 if t is None else t.data_ptr() for t in scaler]
        with _backend.current(self.device):
            updated = self.plan.run_cuda(
                control.grad_coef, control.clip_value, clip.compiled(), *addresses, stream, extras.compiled()
            )
        self._keep_captured()
        if _backend.is_side_stream(self.device, stream):
            # The gradients' memory may belong to another stream: not to be reused before this one has read it.
            for g in self._given(step):
                g.record_stream(torch.cuda.current_stream(self.device))
        torch.autograd.graph.increment_version(updated)
        return True

    def _given(self, step: Step) -> list[Tensor]:
        """What the parameters on the device are updated with."""
        given = (step.input_of(p) for group in step.groups for p in group["params"])
        return [local(g) for g in given if g is not None and g.device == self.device and g.layout == torch.strided]

    def _keep_captured(self) -> None:
        """Keep the plan, which has just run, if a graph was captured from it: a replay needs its memory."""
        if self.plan.was_captured and not any(self.plan is kept for kept in self._captured):
            self._captured.append(self.plan)


class InPython:
    """Parameters that no compiled plan updates: Python looks at each of them at every step."""

    backend: ClassVar[str]
    measures_itself: ClassVar[bool] = False

    def __init__(self, step: Step, entries: list[Entry], states: States, fresh: set[int]) -> None:
        """``fresh``: numbers of the parameters whose states are new in the coming step."""
        self.entries, self.states, self.fresh = entries, states, fresh
        self.device = local(entries[0].param(step)).device

    @property
    def sums_on(self) -> torch.device:
        """Where statistics are written."""
        return self.device

    def holds(self, step: Step, checks: Checks) -> bool:
        """True where every parameter that has a gradient is as it was checked."""
        return all(self._holds(step, checks, entry) for entry in self.entries)

    def _holds(self, step: Step, checks: Checks, entry: Entry) -> bool:
        p, row = entry.param(step), step.rows[entry.group]
        if step.input_of(p) is None:
            return True
        if checks.backend_of(entry.name(step), p, step, row, self.states) != self.backend or self.states.missing(
            p, row.rule
        ):
            return False
        if not self.states.counts(p, row.rule):
            return True
        beside = counts_beside(step.groups[entry.group], "triton")
        device = p.device if beside else torch.device("cpu")
        return all(is_counter(name, step.state[p][name], device) for name in ("step", *self.states.scalars(row.rule)))

    def has_gradients(self, step: Step) -> bool:
        """True where one of the parameters is updated."""
        return any(step.input_of(entry.param(step)) is not None for entry in self.entries)

    def counts_on_host(self, step: Step) -> bool:
        """True where the step moves a counter on the host."""
        return any(self._counts_on_host(step, entry) for entry in self.entries)

    def _counts_on_host(self, step: Step, entry: Entry) -> bool:
        p = entry.param(step)
        return (
            self.states.counts(p, step.rows[entry.group].rule)
            and step.input_of(p) is not None
            and not counts_beside(step.groups[entry.group], self.backend)
        )

    def _number(self, step: Step, entry: Entry, counts: bool) -> Any:
        """The number of a parameter's step: its counter, already advanced where the host does that. ``counts``: False leaves the
        counter as it is.
        """
        p = entry.param(step)
        if not self.states.counts(p, step.rows[entry.group].rule):
            return 0
        counter = step.state[p]["step"]
        if not self._counts_on_host(step, entry):
            return counter
        return next_step(counter if counts else counter.clone())

    def _scalars(self, step: Step, entry: Entry, number: int, counts: bool) -> dict[str, float]:
        """A parameter's states of one number, advanced by the host: computed in float64, and read as they were stored."""
        rule, _, hyper = step.rows[entry.group]
        found = {}
        for name in self.states.scalars(rule):
            value, advance = step.state[entry.param(step)][name], reference.RULES[rule].advance
            assert advance is not None
            found[name] = float((value if counts else value.clone()).fill_(advance(hyper, number, float(value))))
        return found


class Reference(InPython):
    """The reference text, tensor by tensor."""

    backend: ClassVar[str] = "reference"

    def norms(self, step: Step, classes: NormClasses, inf: bool) -> Iterator[Tensor]:
        """Parts of the norm: float64 numbers, one for each class."""
        for entry in self.entries:
            p = entry.param(step)
            if (g := step.input_of(p)) is None:
                continue
            part = torch.zeros(len(classes.groups), dtype=torch.float64, device=local(p).device)
            part[classes.of[p]] = reference_part(local(g), inf)
            yield part

    def run(self, step: Step, control: Control, clip: Clip, extras: Extras) -> bool:
        """Update the parameters. The host has already folded the clip coefficient into ``control.grad_coef``."""
        measures = extras.of_reference
        for entry in self.entries:
            p = entry.param(step)
            if (g := step.input_of(p)) is None:
                continue
            rule, sign, hyper = step.rows[entry.group]
            number = self._number(step, entry, counts=not extras.only)
            layout = self.states.layout(p, step.groups[entry.group], rule)
            # Where autograd watches, a tensor lr stays one.
            numbers = hyper if torch.is_grad_enabled() else {name: float(value) for name, value in hyper.items()}
            scalars = self._scalars(step, entry, number, counts=not extras.only)
            if extras.factors is not None:
                scalars["factor"] = float(extras.factors[entry.number])
            arguments = (
                {**numbers, **scalars},
                number,
                entry.number in self.fresh,
                sign * control.grad_coef,
                control.clip_value,
            )
            if not layout.plain:
                seen, after = formats.update(
                    rule, p, local(g), step.state[p], self.states.names(rule), layout, *arguments, measures
                )
            else:
                states, after = [local(t) for t in self.states.present(p, rule).values()], local(p)
                if g.is_sparse:
                    reference.update_sparse(rule, local(p), local(g), states, *arguments)
                    continue
                seen = reference.update(rule, local(p), local(g), states, *arguments, measures)
            if seen is not None and extras.sums is not None:
                extras.sums[entry.number] = sums_of(seen, seen.before if extras.only else real(after.detach()))
        return True


class Triton(InPython):
    """Triton's kernels: one launch for those that share a rule, formats and a device."""

    backend: ClassVar[str] = "triton"

    def norms(self, step: Step, classes: NormClasses, inf: bool) -> Iterator[Tensor]:
        """Parts of the norm: float64 numbers, one for each class, on each device."""
        from .. import triton_kernels  # type: ignore[attr-defined]

        by_device: dict[torch.device, list[tuple[Tensor, Tensor, int]]] = {}
        for entry in self.entries:
            p = entry.param(step)
            if (g := step.input_of(p)) is not None:
                by_device.setdefault(local(p).device, []).append((real(p), real(g), classes.of[p]))
        for items in by_device.values():
            yield triton_kernels.norm(items, len(classes.groups), inf)

    def check_capture(self, step: Step) -> None:
        """Raise where the step is being captured into a graph."""
        if any(entry.param(step).is_cuda for entry in self.entries) and torch.cuda.is_current_stream_capturing():
            # A replay would upload its tables again, from memory that is somebody else's by then.
            raise RuntimeError("backend='triton' must not be captured into a graph")

    def run(self, step: Step, control: Control, clip: Clip, extras: Extras) -> bool:
        """Update the parameters."""
        from .. import triton_kernels  # type: ignore[attr-defined]

        items = []
        for entry in self.entries:
            p = entry.param(step)
            if (g := step.input_of(p)) is None:
                continue
            rule, sign, hyper = step.rows[entry.group]
            layout = self.states.layout(p, step.groups[entry.group], rule)
            state = step.state.get(p, {})
            number = self._number(step, entry, counts=not extras.only)
            # A counter on the device is advanced there, and so is a state of one number.
            scalars = self._scalars(step, entry, number, not extras.only) if isinstance(number, int) else state
            scales = [state.get(f"{name}_scale") for name in self.states.names(rule)]
            item = triton_kernels.Item(
                rule=rule,
                p=real(p),
                g=real(g),
                states=[real(t) for t in self.states.present(p, rule).values()],
                hyper=hyper,
                step=number,
                fresh=entry.number in self.fresh,
                sign=sign,
                layout=layout,
                beside=[None if t is None else local(t) for t in (state.get("remainder"), None, *scales)],
                key=state["key"] if layout.draws else 0,
                number=entry.number,
            )
            for name in self.states.scalars(rule):
                item = item._replace(scalar_state=scalars[name])
            items.append(item)
        if items:
            triton_kernels.update(items, **control._asdict(), clip=clip, extras=extras)
            if extras.only:
                return True
            torch.autograd.graph.increment_version([item.p for item in items])
        return True
