"""Clipping by the norm of a step's gradients: who measures it, how parts are put together, and what it comes to.

Where one compiled plan has all gradients, it does everything in its own pass. Where several backends share the step, or
processes the parameters, their parts are put together here, on the device; the host reads the norm only where it updates
parameters itself or has to raise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import backend as _backend
from .settings import LOST
from .sharding import local, reduce, shard_groups

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer
    from .plan import Control, StepPlan


class Clip(NamedTuple):
    """What a backend on a device does with the norm; csrc/plan/norm.h. Tensors are None where it has nothing to read or write."""

    total: Tensor | None  # sum of squares, or largest magnitude, of the stored gradients
    grad_norm: Tensor | None
    clip_coef: Tensor | None
    skipped: Tensor | None
    max_norm: float
    inf: bool
    skip_nonfinite: bool
    measure: bool = False

    def on(self, device: torch.device) -> Clip:
        """The same for another backend of the step: it reads the norm and writes no result."""
        total = None if self.total is None else self.total.to(device)
        return self._replace(total=total, grad_norm=None, clip_coef=None, skipped=None, measure=False)

    def compiled(self, classes: int = 1) -> Any:
        """As the compiled plans take it."""
        assert _backend._C is not None
        addresses = {name: 0 if t is None else t.data_ptr() for name, t in zip(self._fields[:4], self[:4], strict=True)}
        return _backend._C.Clip(
            **addresses,
            max_norm=self.max_norm,
            classes=classes,
            inf=self.inf,
            skip_nonfinite=self.skip_nonfinite,
            measure=self.measure,
        )


NOTHING = Clip(None, None, None, None, 0.0, False, False)


class Report:
    """What an optimizer's steps found: tensors on the device of its parameters, written in place."""

    def __init__(self, device: torch.device) -> None:
        # Tensors of an inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.total = torch.zeros(1, dtype=torch.float64, device=device)
            self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
            self.clip_coef = torch.ones((), dtype=torch.float32, device=device)
            self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.measured = False

    @classmethod
    def on(cls, device: torch.device, before: Report | None) -> Report:
        """The report on a device, which goes on with what was counted elsewhere."""
        if before is not None and before.total.device == device:
            return before
        report = cls(device)
        if before is not None:
            report.skipped.copy_(before.skipped)
        return report


class NormClasses(NamedTuple):
    """Parameters whose norms are added up over the same process groups, and those groups."""

    of: dict[Tensor, int]
    groups: list[tuple[Any, ...]]


def norm_classes(optimizer: FusedOptimizer) -> NormClasses:
    """The classes of all parameters, with a gradient or without: every process must come to the same list."""
    given = optimizer._own["norm_process_group"]
    if isinstance(given, str) and given == LOST:
        raise RuntimeError("norm_process_group must be set again: a process group is neither copied nor pickled")
    of: dict[Tensor, int] = {}
    groups: list[tuple[Any, ...]] = [() if given is None else (given,)]
    names: list[tuple[str, ...]] = [("plain",)]
    for group in optimizer.param_groups:
        for p in group["params"]:
            shards = shard_groups(p)
            if shards is None:
                if given is None and _is_flat_shard(p):
                    raise RuntimeError(
                        "norm_process_group must be given with max_grad_norm where parameters are flat shards (FSDP1): "
                        "the norm of the local shard is not the global one"
                    )
                of[p] = 0
                continue
            name = tuple(sorted(shards))
            if name not in names:
                names.append(name)
                groups.append(tuple(shards[key] for key in name))
            of[p] = names.index(name)
    return NormClasses(of, groups)


def _is_flat_shard(p: Tensor) -> bool:
    """True for a flat parameter of FSDP1 that other processes have the rest of."""
    if not (getattr(p, "_is_flat_param", False) or type(p).__name__ == "FlatParameter"):
        return False
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def begin(plan: StepPlan, optimizer: FusedOptimizer, control: Control) -> tuple[Control, Clip] | None:
    """What the step multiplies gradients with, and what it does with their norm on a device; None skips it.

    Raises for a norm that is not finite where that was asked for. Nothing but the optimizer's report has changed then.
    """
    own = optimizer._own
    wanted = own["max_grad_norm"] is not None
    if not wanted and control.found_inf is None:
        return control, NOTHING
    executors = plan.executors()
    # Where nobody has a gradient, nobody would write the report.
    has_gradients = bool(plan.compiled) or any(optimizer._input_of(slow.param) is not None for slow in plan.slow)
    by_device = has_gradients and all(backend in ("cuda", "triton") for backend, _ in executors)
    report = optimizer._report = Report.on(executors[0][1] if executors else home(optimizer), optimizer._report)
    if not by_device:
        # Parameters that neither of them takes share the step: the host must know, and waits.
        if control.found_inf is not None and control.found_inf.item():
            report.skipped += 1
            return None
        if control.grad_scale is not None:
            control = control._replace(grad_coef=control.grad_coef / float(control.grad_scale), grad_scale=None)
        control = control._replace(found_inf=None)
    if not wanted:
        return control, NOTHING._replace(skipped=report.skipped)

    report.measured = True
    clip = Clip(
        report.total,
        report.grad_norm,
        report.clip_coef,
        report.skipped,
        own["max_grad_norm"],
        own["norm_type"] == math.inf,
        own["nonfinite"] == "skip",
    )
    assert plan.norm_classes is not None
    raises = own["nonfinite"] == "raise"
    alone = len(plan.compiled) == 1 and not plan.slow and plan.norm_classes.groups == [()]
    if alone and not raises:
        return control, clip._replace(measure=True)
    report.total.copy_(_total(plan, optimizer, clip.inf))
    if by_device and not raises:
        return control, clip
    norm, coef = _finished(report.total, control, clip)
    if raises and not norm.isfinite() and (control.found_inf is None or not control.found_inf.item()):
        raise RuntimeError(
            f"The total norm of order {own['norm_type']} for the gradients is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, set nonfinite='propagate'"
        )
    if by_device:
        return control, clip
    report.grad_norm.copy_(norm)
    report.clip_coef.copy_(coef)
    if clip.skip_nonfinite and not norm.isfinite():
        report.skipped += 1
        return None
    return control._replace(grad_coef=float(_fp32(control.grad_coef) * coef)), NOTHING


def home(optimizer: FusedOptimizer) -> torch.device:
    """Where an optimizer's first parameter lies."""
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    return torch.device("cpu") if first is None else local(first).device


def _fp32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _finished(total: Tensor, control: Control, clip: Clip) -> tuple[Tensor, Tensor]:
    """The norm and the coefficient on the host: finish() in csrc/plan/norm.h."""
    total = total.cpu().reshape(())
    unscale = _fp32(control.grad_coef)
    if control.grad_scale is not None:
        unscale = _fp32(1.0 / float(control.grad_scale)) * unscale
    norm = ((total if clip.inf else total.sqrt()) * unscale.double()).float()
    coef = _fp32(clip.max_norm) / (norm + _fp32(1e-6))
    one = _fp32(1.0)
    return norm, one if clip.max_norm == math.inf else torch.where(coef > one, one, coef)


def _total(plan: StepPlan, optimizer: FusedOptimizer, inf: bool) -> Tensor:
    """The sum of squares, or the largest magnitude, of all gradients of all processes."""
    assert plan.norm_classes is not None
    groups = plan.norm_classes.groups
    parts = list(parts_of_norms(plan, optimizer, inf))
    first = parts[0] if parts else torch.zeros(len(groups), dtype=torch.float64)
    total = first.clone()
    for part in parts[1:]:
        total = combined(total, part.to(total.device), inf)
    for index, over in enumerate(groups):
        reduce(total[index : index + 1], over, inf)
    norm = total[:1]
    for index in range(1, len(groups)):
        norm = combined(norm, total[index : index + 1], inf)
    return norm


def combined(a: Tensor, b: Tensor, inf: bool) -> Tensor:
    """Two parts of a norm as one. Magnitudes are compared as bits, where NaN is the largest."""
    return torch.maximum(a.view(torch.int64), b.view(torch.int64)).view(torch.float64) if inf else a + b


def parts_of_norms(plan: StepPlan, optimizer: FusedOptimizer, inf: bool) -> Iterable[Tensor]:
    """Per backend and device, a float64 number for each class."""
    assert plan.norm_classes is not None
    count = len(plan.norm_classes.groups)
    for backend, device, compiled in plan.compiled:
        part = torch.zeros(count, dtype=torch.float64, device=device)
        clip = NOTHING._replace(total=part, inf=inf).compiled(count)
        if backend == "cpu":
            compiled.norm(clip, torch.get_num_threads())
        else:
            with _backend.current(device):
                compiled.norm_cuda(clip, _backend.current_stream(device))
            optimizer._keep_captured(compiled)
        yield part
    for_triton: dict[torch.device, list[tuple[Tensor, Tensor, int]]] = {}
    for slow in plan.slow:
        g = optimizer._input_of(slow.param)
        if g is None:
            continue
        p, g, of = local(slow.param), local(g), plan.norm_classes.of[slow.param]
        if slow.backend == "triton":
            p, g = (torch.view_as_real(t) if t.is_complex() else t for t in (p, g))
            for_triton.setdefault(p.device, []).append((p, g, of))
            continue
        part = torch.zeros(count, dtype=torch.float64, device=p.device)
        part[of] = reference_part(g, inf)
        yield part
    if for_triton:
        from .. import triton_kernels  # type: ignore[attr-defined]

        for items in for_triton.values():
            yield triton_kernels.norm(items, count, inf)


@torch.no_grad()
def reference_part(g: Tensor, inf: bool) -> Tensor:
    """The sum of squares, or the largest magnitude, of any gradient, in float64."""
    values = g.coalesce().values() if g.is_sparse else g.resolve_conj()
    values = (torch.view_as_real(values) if values.is_complex() else values).double()
    if not inf:
        return values.square().sum()
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=g.device)
    most = values.abs().amax()
    return torch.where(most.isnan(), math.nan, most)
