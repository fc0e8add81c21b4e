"""The passes of a step over what updates its parameters: the one that updates, and before it, where updates are scaled by what
all of a tensor come to, one that writes nothing.
"""

from __future__ import annotations

from torch import Tensor

from .clipping import Begun, Executor, Report
from .rows import Step, parameters
from .statistics import NO_EXTRAS, Extras, Shared, factors_of, labels_of, put_together, sums_for


def run(
    step: Step, executors: list[Executor], begun: Begun, report: Report, shared: Shared | None, *, whole: bool
) -> bool:
    """Update everything that has a gradient, and report statistics. False where the norm said to skip the step.

    ``shared``: whose sums are added up over processes; ``whole``: a single compiled plan has all parameters.
    """
    factors = None if step.scaled is None else factors_of(step, _sums(step, executors, begun, shared))
    measured = step.measured and any(executor.has_gradients(step) for executor in executors)
    alone = whole and step.into is None
    before, extras = report.sums, []
    for executor in executors:
        sums = None
        if measured and alone:
            sums = report.sums_on(executor.sums_on, len(parameters(step)))
        elif step.measured:
            sums = sums_for(step, executor.sums_on)
        of_device = None if factors is None else factors.to(executor.sums_on)
        extras.append(NO_EXTRAS if sums is None and of_device is None else Extras(sums, of_device))
    if not _run_each(step, executors, begun, extras):
        report.sums = before
        return False
    if step.measured and step.into is not None:
        step.into.add(parameters(step), put_together(step, extras))
    elif step.measured and not alone:
        report.note(_together(step, extras, shared), labels_of(step.groups))
    elif measured:
        report.labels = labels_of(step.groups)
    return True


def _run_each(step: Step, executors: list[Executor], begun: Begun, extras: list[Extras]) -> bool:
    control, clip = begun
    for i, (executor, extra) in enumerate(zip(executors, extras, strict=True)):
        if i > 0:
            clip = clip.on(executor.device)
        if not executor.run(step, control, clip, extra):
            return False
    return True


def _sums(step: Step, executors: list[Executor], begun: Begun, shared: Shared | None) -> Tensor:
    """What statistics a step would have, by a pass that updates nothing. Whether it is skipped, the next pass counts."""
    extras = [Extras(sums_for(step, executor.sums_on), only=True) for executor in executors]
    _run_each(step, executors, begun._replace(clip=begun.clip._replace(skipped=None)), extras)
    return _together(step, extras, shared)


def _together(step: Step, extras: list[Extras], shared: Shared | None) -> Tensor:
    """The sums of all parameters, of all processes."""
    sums = put_together(step, extras)
    if shared is not None:
        shared.reduce(sums)
    return sums
