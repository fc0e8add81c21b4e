"""Clipping by the norm of a step's gradients: what a step multiplies them with, and what is reported.

Where one compiled plan has all gradients, it does everything in its own pass. Where several backends share the step, or
processes the parameters, their parts are put together here, on the device; the host reads the norm only where it updates
parameters itself or has to raise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..reference import clamped
from ..reference.statistics import SUMS
from .norm import NOTHING, Clip, Measures, NormClasses, total
from .rows import Control, Group, Step
from .sharding import home, like, local
from .statistics import Extras, Labels

_ELEMENTS = SUMS.index("elements")


class Begun(NamedTuple):
    """What a step of several passes does with its gradients: found before the first pass, and given to each."""

    control: Control = Control()
    #: The norm, where a device reads it.
    clip: Clip = NOTHING

    @property
    def changes(self) -> bool:
        """True where the host multiplies or clips gradients."""
        return (
            self.control.grad_coef != 1.0 or self.control.grad_scale is not None or self.control.clip_value != math.inf
        )

    def of_results(self) -> Begun:
        """For a pass over what an earlier one has made of gradients: it is skipped where that one is."""
        return Begun(Control(found_inf=self.control.found_inf))

    def folded(self) -> Begun:
        """With the coefficient of the norm as a number, for what the host updates. Waits for the device."""
        if self.clip.total is None:
            return self
        _, coef = _finished(self.clip.total.cpu(), self.control, self.clip)
        return Begun(self.control._replace(grad_coef=float(_fp32(self.control.grad_coef) * coef)))

    def applied(self, g: Tensor) -> Tensor:
        """A gradient as the step takes it, at least in float32, where the host knows how; itself where that changes nothing."""
        coef, scale, found_inf, clip_value = self.control
        assert found_inf is None
        assert self.clip is NOTHING
        if not self.changes:
            return g
        values = local(g)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        values = (values * (coef if scale is None else coef / scale)).contiguous()
        parts = torch.view_as_real(values) if values.is_complex() else values
        parts = clamped(parts, clip_value)
        return like(g, torch.view_as_complex(parts) if values.is_complex() else parts)


class Found(NamedTuple):
    """What steps write, on a device."""

    total: Tensor
    grad_norm: Tensor
    clip_coef: Tensor
    skipped: Tensor


class Report:
    """What an optimizer's steps found: tensors on the device of its parameters, written in place."""

    def __init__(self) -> None:
        self.found: Found | None = None
        #: True once a norm was measured.
        self.measured = False
        #: The sums of the last step that took statistics, and of each of its groups the names and the number of parameters.
        self.sums: Tensor | None = None
        self.labels: Labels = []

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients; None where none was measured."""
        return self.found.grad_norm if self.found is not None and self.measured else None

    @property
    def clip_coef(self) -> Tensor | None:
        """What the last step multiplied its gradients with to clip them; None where no norm was measured."""
        return self.found.clip_coef if self.found is not None and self.measured else None

    def on(self, device: torch.device) -> Found:
        """The tensors on a device, which go on with what was counted elsewhere."""
        before = self.found
        if before is not None and before.total.device == device:
            return before
        # Tensors of an inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.found = Found(
                torch.zeros(1, dtype=torch.float64, device=device),
                torch.zeros((), dtype=torch.float32, device=device),
                torch.ones((), dtype=torch.float32, device=device),
                torch.zeros((), dtype=torch.int64, device=device),
            )
        self.measured = False
        if before is not None:
            self.found.skipped.copy_(before.skipped)
        return self.found

    def sums_on(self, device: torch.device, rows: int) -> Tensor:
        """Where a step puts the sums of so many parameters. The same tensor, unless it must be another."""
        if self.sums is None or self.sums.device != device or len(self.sums) != rows:
            with torch.inference_mode(False):
                self.sums = torch.zeros(rows, len(SUMS), dtype=torch.float64, device=device)
        return self.sums

    def note(self, found: Tensor, labels: Labels) -> None:
        """The sums of a step. One that a device has skipped has not even elements, and leaves what is there."""
        sums = self.sums_on(found.device, len(found))
        sums.copy_(torch.where(found[:, _ELEMENTS].sum() > 0, found, sums))
        self.labels = labels

    def skipped_steps(self, groups: list[Group]) -> Tensor:
        """How many steps were skipped; of a report that has no device yet, on that of the parameters."""
        return (self.found or self.on(home(groups))).skipped


class Executor(Measures, Protocol):
    """What updates some of the parameters of a step."""

    @property
    def backend(self) -> str:
        """What runs here."""

    @property
    def device(self) -> torch.device:
        """Where the first parameter lies."""

    @property
    def sums_on(self) -> torch.device:
        """Where it writes statistics, and reads what scales updates."""

    @property
    def measures_itself(self) -> bool:
        """True where it can measure the norm of its gradients in the pass that updates its parameters."""

    def has_gradients(self, step: Step) -> bool:
        """True where one of its parameters is updated."""

    def run(self, step: Step, control: Control, clip: Clip, extras: Extras) -> bool:
        """Update the parameters. False where the norm said to skip the step."""


def device_decides(executors: Sequence[Executor]) -> bool:
    """True where all read the norm and a scaler's verdict on their device."""
    return all(executor.backend in ("cuda", "triton", "offload") for executor in executors)


def not_finite(norm_type: float) -> RuntimeError:
    """What ``nonfinite="raise"`` raises: torch's text."""
    return RuntimeError(
        f"The total norm of order {norm_type} for the gradients is non-finite, so it cannot be clipped. To disable this error "
        "and scale the gradients by the non-finite norm anyway, set nonfinite='propagate'"
    )


def begin(
    executors: Sequence[Executor],
    step: Step,
    classes: NormClasses | None,
    settings: Mapping[str, Any],
    report: Report,
    *,
    host_must_know: bool = False,
    apart: bool = False,
) -> Begun | None:
    """What the step multiplies gradients with, and what it does with their norm on a device; None skips it. ``executors`` have
    gradients; where nobody has, they are the compiled plans. ``classes`` are those of the step's norm, None where it has none.
    ``host_must_know``: whether the step is skipped. ``apart``: the executors do not run the step; the norm is measured now, and
    everything is reported.

    Raises for a norm that is not finite where that was asked for. Nothing but the report has changed then.
    """
    control = step.control
    if classes is None and control.found_inf is None:
        return Begun(control)
    # Without executors nobody would write the report.
    by_device = bool(executors) and device_decides(executors) and not host_must_know
    found = report.on(executors[0].device if executors else home(step.groups))
    if not by_device:
        # Parameters that neither of them takes share the step: the host must know, and waits.
        if control.found_inf is not None and control.found_inf.item():
            found.skipped.add_(1)
            return None
        if control.grad_scale is not None:
            control = control._replace(grad_coef=control.grad_coef / float(control.grad_scale), grad_scale=None)
        control = control._replace(found_inf=None)
    if classes is None:
        if apart and control.found_inf is not None:
            found.skipped.add_((control.found_inf != 0).to(found.skipped).reshape(()))
            return Begun(control)
        return Begun(control, NOTHING._replace(skipped=found.skipped))

    report.measured = True
    skips, raises = (settings["nonfinite"] == name for name in ("skip", "raise"))
    clip = Clip(
        **found._asdict(),
        max_norm=settings["max_grad_norm"],
        inf=settings["norm_type"] == math.inf,
        skip_nonfinite=skips,
    )
    by_itself = len(executors) == 1 and executors[0].measures_itself and classes.groups == [()]
    if by_itself and not raises and not host_must_know and not apart:
        return Begun(control, clip._replace(measure=True))
    found.total.copy_(total(executors, step, classes, clip.inf))
    if by_device and not raises:
        return _on_device(found, control, clip) if apart else Begun(control, clip)
    norm, coef = _finished(found.total.cpu(), control, clip)
    if raises and not norm.isfinite() and (control.found_inf is None or not control.found_inf.item()):
        raise not_finite(settings["norm_type"])
    if by_device:
        return _on_device(found, control, clip) if apart else Begun(control, clip)
    found.grad_norm.copy_(norm)
    found.clip_coef.copy_(coef)
    if clip.skip_nonfinite and not norm.isfinite():
        found.skipped.add_(1)
        return None
    return Begun(control._replace(grad_coef=float(_fp32(control.grad_coef) * coef)))


def report_of(clip: Clip, coef: Tensor | None, report: Report) -> None:
    """Report a norm that was measured while gradients came, and the coefficient that they were multiplied with; None: 1."""
    assert clip.total is not None
    found = report.on(clip.total.device)
    report.measured = True
    found.total.copy_(clip.total)
    found.grad_norm.copy_(_finished(clip.total, Control(), clip)[0])
    found.clip_coef.copy_(_fp32(1.0) if coef is None else coef)


def coefficient(clip: Clip) -> Tensor | None:
    """What a norm that lies on a device has gradients multiplied with; None where there is no norm."""
    return None if clip.total is None else _finished(clip.total, Control(), clip)[1]


def _on_device(found: Found, control: Control, clip: Clip) -> Begun:
    """Report a norm that lies on a device, without waiting for it, and say by ``found_inf`` whether the step is skipped."""
    norm, coef = _finished(found.total, control, clip)
    found.grad_norm.copy_(norm)
    found.clip_coef.copy_(coef)
    if control.found_inf is not None or clip.skip_nonfinite:
        skip = ~norm.isfinite() if clip.skip_nonfinite else torch.zeros_like(norm, dtype=torch.bool)
        if control.found_inf is not None:
            skip = skip | (control.found_inf.to(norm.device).reshape(()) != 0)
        found.skipped.add_(skip.to(found.skipped.dtype))
        control = control._replace(found_inf=skip.float().reshape(1))
    return Begun(control, clip.on(found.total.device)._replace(skip_nonfinite=False))


def _fp32(value: float, device: torch.device | str = "cpu") -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


def _finished(total: Tensor, control: Control, clip: Clip) -> tuple[Tensor, Tensor]:
    """The norm and the coefficient where the total is: finish() in csrc/plan/norm.h."""
    total, device = total.reshape(()), total.device
    unscale = _fp32(control.grad_coef, device)
    if control.grad_scale is not None:
        unscale = (1.0 / control.grad_scale.to(device).reshape(()).double()).float() * unscale
    norm = ((total if clip.inf else total.sqrt()) * unscale.double()).float()
    coef = _fp32(clip.max_norm, device) / (norm + _fp32(1e-6, device))
    one = _fp32(1.0, device)
    return norm, one if clip.max_norm == math.inf else torch.where(coef > one, one, coef)
