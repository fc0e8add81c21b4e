"""Gradient release: parameters are updated inside the backward pass, and their gradients freed."""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._core.clipping import Begun, coefficient, report_of
from ._core.memory import Memory
from ._core.norm import NOTHING, Clip, NormClasses, combined, norm_classes, reduced
from ._core.optimizer import FusedOptimizer
from ._core.rows import Control, PartOfStep, name_among
from ._core.sharding import home, local
from ._core.single import Place, Single, places_of
from ._core.statistics import Collected
from ._methods.buckets import CommHook, release_buckets

_CLIPS = (None, "previous", "measure")


def release_gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    accumulation_steps: int = 1,
    clip: str | None = None,
    comm_hook: tuple[object, CommHook] | None = None,
) -> GradientRelease:
    """Update each parameter inside the backward pass, as soon as its gradient is complete, and free the gradient.

    Memory then has the gradients of a few layers, not of all: 5.07 bytes per parameter stay with split24 weights and int8
    states, where 7.07 are needed without. The updates are those of the ordinary step, bit for bit, except for clipping by a norm.
    The loop keeps its form: ``optimizer.step()`` after the backward pass finishes the step, and updates what has a gradient
    still. It must be called before the next backward pass.

    Args:
        model: has the parameters of ``optimizer``. Modules of it may be sharded by FSDP2 (``fully_shard``) or in
            ``DistributedDataParallel``, which then reduces gradients by a hook that updates parameters after it.
        optimizer: a method of precond, such as ``AdamW`` or ``Grouped``.
        accumulation_steps: >= 1, backward passes for each step (default 1). Gradients are accumulated in ``.grad``, and released
            in the last pass. Under ``DistributedDataParallel`` it must be 1: the pass that reduces is the last one, and the
            others run in its ``no_sync()``.
        clip: how gradients are clipped to ``max_grad_norm`` of the optimizer: their norm is known when the last one is there.
            "previous": by the norm of the previous step's gradients; the first step is not clipped, unless it is measured.
            "measure": by their own norm, which another backward pass finds first, inside :meth:`GradientRelease.measure`. None
            (default): there is no such setting.
        comm_hook: state and hook that reduce a bucket of ``DistributedDataParallel``, such as
            ``(process_group, bf16_compress_hook)``. None (default): all-reduce, and divide by the number of processes.

    Returns:
        A :class:`GradientRelease`, which :meth:`GradientRelease.remove` ends. It is neither copied nor saved with the optimizer.

    Raises:
        TypeError: an optimizer of another library, or one that goes around another (``BNP``, ``FOP``, ``GradientRegularizer``).
        ValueError: an argument out of range, or a parameter that the model does not have.
        RuntimeError: the optimizer releases already, or must see all gradients at once: ``DualDescent(granularity="global")``,
            matrices on shards, ``differentiable=True``. Later, from the backward pass: a second gradient before the step is
            finished. From the step: ``GradScaler`` was used, which tells only after all updates whether gradients overflowed.

    Source: Lv et al., arXiv 2306.09782 (LOMO), update in the backward pass, and clip by a second one.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = precond.AdamW(model.parameters(), lr=1e-2)
        >>> release = precond.release_gradients(model, opt)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> model.weight.grad is None, int(opt.state[model.weight]["step"])
        (True, 1)
        >>> opt.step()
    """
    if not isinstance(optimizer, FusedOptimizer):
        inner = " alone: it goes around an optimizer" if hasattr(optimizer, "base") else ""
        raise TypeError(f"optimizer must be a method of precond, got {type(optimizer).__name__}{inner}")
    if not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be an integer >= 1, got {accumulation_steps!r}")
    if clip not in _CLIPS:
        raise ValueError(f"clip must be None, 'previous' or 'measure', got {clip!r}")
    return GradientRelease(model, optimizer, accumulation_steps, clip, comm_hook)


class GradientRelease:
    """What :func:`precond.release_gradients` returns: takes its hooks away again, and measures norms.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = precond.SGD(model.parameters(), lr=0.1, max_grad_norm=1.0)
        >>> release = precond.release_gradients(model, opt, clip="measure")
        >>> loss = model(torch.ones(3, 4)).sum()
        >>> with release.measure():
        ...     loss.backward(retain_graph=True)
        >>> loss.backward()
        >>> opt.step()
        >>> round(opt.grad_norm.item(), 3)
        9.487
        >>> release.remove()
    """

    __module__ = "precond"

    def __init__(
        self,
        model: nn.Module,
        optimizer: FusedOptimizer,
        accumulation_steps: int,
        clip: str | None,
        comm_hook: tuple[object, CommHook] | None,
    ) -> None:
        self._optimizer, self._every, self._clip = optimizer, accumulation_steps, clip
        self._single = Single(optimizer)
        # Devices have a thread of the backward pass each, and communication others.
        self._lock = threading.RLock()
        self._places: dict[int, Place] = {}
        self._classes: NormClasses | None = None
        #: Sums of squares, or largest magnitudes, of this step's gradients; of what this step is clipped by all processes' norm.
        self._parts: Tensor | None = None
        self._known: Tensor | None = None
        self._measuring = False
        self._begun: PartOfStep | None = None
        self._coef: Tensor | None = None
        #: By the ids of parameters: how many gradients they have had since the last step, and which are updated.
        self._hits: dict[int, int] = {}
        self._released: set[int] = set()
        self._passes, self._looked = 0, False
        self._check(model)
        of_buckets = release_buckets(model, self._release_bucket, comm_hook, accumulates=accumulation_steps > 1)
        own = weakref.WeakMethod(self._arrived)

        def arrived(p: Tensor) -> None:
            if (method := own()) is not None:
                method(p)

        #: Of the hooks.
        self._handles = [
            p.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
            for p in self._params()
            if p.requires_grad and id(p) not in of_buckets
        ]
        optimizer._releases = self
        self._amp = getattr(optimizer, "_step_supports_amp_scaling", False)
        # GradScaler then comes to the step, which can say what is wrong.
        optimizer._step_supports_amp_scaling = True

    # What is checked.

    def _params(self) -> list[Tensor]:
        return self._optimizer._all_params()

    def _check(self, model: nn.Module) -> None:
        optimizer, groups = self._optimizer, self._optimizer.param_groups
        if optimizer._releases is not None:
            raise RuntimeError("optimizer must not release gradients already: call remove() of that release first")
        if optimizer.defaults.get("differentiable"):
            raise RuntimeError("differentiable must be False where gradients are released, got True")
        named = {id(p) for p in model.parameters()}
        for p in self._params():
            if id(p) not in named:
                raise ValueError(f"optimizer must have parameters of the model alone, got {name_among(groups, p)}")
        for group in groups:
            if reason := optimizer.why_not_alone(group):
                raise RuntimeError(f"gradients cannot be released {reason}")
        norm, nonfinite = (optimizer._own[name] for name in ("max_grad_norm", "nonfinite"))
        if (norm is None) != (self._clip is None):
            raise ValueError(
                f"clip must be 'previous' or 'measure' with max_grad_norm, and None without, got {self._clip!r} and {norm}"
            )
        if self._clip == "previous" and nonfinite != "propagate":
            raise ValueError(
                f"nonfinite must be 'propagate' with clip='previous', got {nonfinite!r}: a step's norm is known after its updates"
            )
        params = self._params()
        Memory().check(
            [local(p) for p in params],
            [(i, "") for i in range(len(params))],
            lambda i: (name_among(groups, params[i]), True),
        )

    # Gradients that are complete.

    def _arrived(self, p: Tensor) -> None:
        """A parameter's gradient is complete."""
        with self._lock, torch.no_grad():
            self._take(p)

    def _release_bucket(self, params: list[Tensor], gradients: list[Tensor]) -> set[int]:
        """Gradients are reduced. Returns the ids of the parameters that need them no more."""
        with self._lock, torch.no_grad():
            if self._optimizer._releases is not self:
                return set()
            known = self._up_to_date()
            for p, g in zip(params, gradients, strict=True):
                if id(p) in known:
                    p.grad = g
                    self._take(p)
            return {id(p) for p in params if id(p) in known}

    def _take(self, p: Tensor) -> None:
        place = self._up_to_date().get(id(p))
        if place is None or p.grad is None:
            return
        if self._measuring:
            self._measure(place)
            p.grad = None
            return
        if id(p) in self._released:
            raise RuntimeError(
                f"optimizer.step() must be called after each {self._every} backward passes, got another gradient of "
                f"{place.name}, which is updated already; accumulation_steps is for several passes"
            )
        # A parameter that missed a pass is behind the others, and they tell which pass this is.
        self._hits[id(p)] = self._hits.get(id(p), 0) + 1
        self._passes = max(self._passes, self._hits[id(p)])
        if self._passes < self._every:
            return
        part = self._begin()
        if part.control is not None:
            if self._clip == "previous":
                self._measure(place)
            self._single.step(place, part)
        self._released.add(id(p))
        p.grad = None

    def _up_to_date(self) -> dict[int, Place]:
        """The places of all parameters, looked at once a step."""
        if not self._looked:
            groups, self._looked = self._optimizer.param_groups, True
            found = [(place.group, place.index, place.position) for place in self._places.values()]
            now = [(group, i, k) for i, group in enumerate(groups) for k in range(len(group["params"]))]
            same = len(found) == len(now) and all(
                a[0] is b[0] and a[1:] == b[1:] for a, b in zip(found, now, strict=True)
            )
            if not same or [*self._places] != [id(p) for p in self._params()]:
                self._places, self._classes = places_of(groups), None
                self._single.prepare(len(self._places))
        return self._places

    # The step.

    def _begin(self) -> PartOfStep:
        """What this step does with gradients."""
        if self._begun is not None:
            return self._begun
        optimizer = self._optimizer
        if self._clip == "measure" and self._known is None:
            raise RuntimeError("a backward pass within measure() must come before each step's with clip='measure'")
        own = optimizer._own
        limit = self._limit()
        control: Control | None = Control(clip_value=own["clip_grad_value"] or math.inf)
        if limit.total is not None and own["nonfinite"] != "propagate" and not limit.total.isfinite().all():
            if own["nonfinite"] == "raise":
                self._known = None
                raise RuntimeError(
                    f"The total norm of order {own['norm_type']} for the gradients is non-finite, so it cannot be clipped. To "
                    "disable this error and scale the gradients by the non-finite norm anyway, set nonfinite='propagate'"
                )
            control = None
        self._coef = coefficient(limit)
        if control is not None and limit.total is not None and limit.total.device.type == "cpu":
            control, limit = Begun(control, limit).folded()  # once, not for each parameter: 0.1 ms
        optimizer._begin_step()
        into = Collected(optimizer.param_groups) if optimizer._measures else None
        self._begun = PartOfStep(control, limit, into)
        return self._begun

    def _limit(self) -> Clip:
        """How the known norm clips gradients."""
        own = self._optimizer._own
        if self._known is None:
            return NOTHING
        inf = own["norm_type"] == math.inf
        return NOTHING._replace(total=self._known, max_norm=own["max_grad_norm"], inf=inf)

    def _measure(self, place: Place) -> None:
        own = self._optimizer._own
        if self._classes is None:
            self._classes = norm_classes(self._optimizer.param_groups, own["norm_process_group"])
        inf = own["norm_type"] == math.inf
        found = self._single.norms(place, self._classes, inf=inf)
        self._parts = found if self._parts is None else combined(self._parts, found.to(self._parts.device), inf)

    def _total(self) -> Tensor:
        """The sum of all processes, which all come here."""
        own = self._optimizer._own
        if self._classes is None:
            self._classes = norm_classes(self._optimizer.param_groups, own["norm_process_group"])
        parts, self._parts = self._parts, None
        return reduced(parts, self._classes, own["norm_type"] == math.inf).clone()

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Within it a backward pass measures the norm of all gradients, which the next step is clipped by, and updates nothing.

        Raises:
            RuntimeError: the optimizer has no ``max_grad_norm``, a step has begun, or gradients are accumulated already.
        """
        if self._clip is None:
            raise RuntimeError("measure() needs max_grad_norm and clip='measure' or 'previous', got clip=None")
        if self._begun is not None or any(p.grad is not None for p in self._params()):
            raise RuntimeError(
                "measure() must come before the step's first gradient: the norm is that of one backward pass"
            )
        self._measuring, self._looked = True, False
        try:
            yield
            with torch.no_grad():
                self._known = self._total()
        finally:
            self._measuring, self._parts = False, None

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def finish(self) -> None:
        """What ``optimizer.step()`` does: update what has a gradient still, and report."""
        with self._lock:
            if self._begun is None:  # all gradients are there, or none
                self._hits, self._passes, self._looked = {}, 0, False
                self._optimizer._update_at_stated_precision()
                found = self._optimizer.engine.report
                if self._clip == "previous" and found.found is not None and found.measured:
                    self._known = found.found.total.clone()
                return
            try:
                self._finish(self._begun)
            finally:
                self._hits, self._released, self._passes, self._looked = {}, set(), 0, False
                self._begun = self._parts = None
                if self._clip == "measure":
                    self._known = None

    def _finish(self, part: PartOfStep) -> None:
        optimizer = self._optimizer
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "gradients must not be scaled where they are released: GradScaler tells after all updates whether they have "
                "overflowed; train in bfloat16, or with enabled=False"
            )
        rest = [p for p in self._params() if p.grad is not None]
        if part.control is None:
            optimizer.skipped_steps.add_(1)
        elif rest:
            if self._clip == "previous":
                for p in rest:
                    self._measure(self._up_to_date()[id(p)])
            self._single.rest(part)
        if part.into is not None and (sums := part.into.total()) is not None:
            optimizer.engine.report.note(sums, part.into.labels)
        if self._clip is not None:
            total = self._total() if self._clip == "previous" else self._known
            assert total is not None
            inf = optimizer._own["norm_type"] == math.inf
            clip = NOTHING._replace(max_norm=optimizer._own["max_grad_norm"], inf=inf)
            report_of(total, self._coef, clip, optimizer.engine.report)
            self._known = total
        optimizer._forget_strangers()

    # Its own life.

    def remove(self) -> None:
        """Take the hooks away: from now on gradients stay until ``optimizer.step()``. Twice is no error."""
        if self._optimizer._releases is self:
            self._optimizer._releases = None
            self._optimizer._step_supports_amp_scaling = self._amp
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """The norm of the last step's gradients, which a resumed run with ``clip="previous"`` begins with."""
        return {"total": self._known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the norm of another run."""
        total = state_dict["total"]
        device = home(self._optimizer.param_groups)
        self._known = None if total is None else total.detach().to(device, torch.float64, copy=True).reshape(1)
