"""Updates inside the backward pass: what is done with a gradient as soon as it is complete, and how the step is finished."""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._core.clipping import Begun, coefficient, not_finite, report_of
from .._core.memory import Memory
from .._core.norm import NOTHING, Clip, NormClasses, combined, norm_classes, reduced
from .._core.optimizer import FusedOptimizer
from .._core.rows import Control, Group, PartOfStep, name_among
from .._core.sharding import aligned_gradients, local
from .._core.single import Place, Single, places_of
from .._core.statistics import Collected
from .buckets import CommHook, in_other_buckets, release_buckets


class Releasing:
    """What releases gradients of one optimizer."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: FusedOptimizer,
        accumulation_steps: int,
        clip: str | None,
        comm_hook: tuple[object, CommHook] | None,
    ) -> None:
        self._every, self._clip = accumulation_steps, clip
        # The optimizer has this object, and goes as soon as its user drops it.
        self._owner: Callable[[], FusedOptimizer | None] = weakref.ref(optimizer)
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._single = Single(optimizer)
        # Devices have a thread of the backward pass each, and communication others.
        self._lock = threading.RLock()
        self._groups: list[Group] = []
        self._count = 0
        self._places: dict[int, Place] = {}
        self._classes: NormClasses | None = None
        #: Sums of squares, or largest magnitudes, of this step's gradients; and that of all processes which clips this step.
        self._parts: Tensor | None = None
        self._known: Tensor | None = None
        self._measuring = False
        self._begun: PartOfStep | None = None
        self._coef: Tensor | None = None
        #: By the ids of parameters: how many gradients they have had since the last step, and which are updated.
        self._hits: dict[int, int] = {}
        self._released: set[int] = set()
        self._passes, self._looked = 0, False
        #: The backward passes that have brought a gradient in this step and have not come to their end: an exception keeps them.
        self._open: set[int] = set()
        #: Where a device has last worked for this step.
        self._streams: dict[torch.device, Any] = {}
        self._check(model)
        of_buckets, self._bucket_hooks = release_buckets(
            model, self._release_bucket, comm_hook, accumulates=accumulation_steps > 1
        )
        params = [p for p in optimizer._all_params() if id(p) not in of_buckets]
        #: The ids of plain parameters, until it is known that no other DistributedDataParallel has them.
        self._unseen = {id(p) for p in params if not hasattr(p, "placements")}
        hook = _Arrived(self)
        #: Of the hooks.
        self._handles = [
            p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            for p in params
            if p.requires_grad
        ]
        optimizer._releases = self
        self._amp = getattr(optimizer, "_step_supports_amp_scaling", False)
        # GradScaler then comes to the step, which can say what is wrong.
        optimizer._step_supports_amp_scaling = True

    @property
    def _optimizer(self) -> FusedOptimizer:
        optimizer = self._owner()
        if optimizer is None:
            raise RuntimeError("the optimizer of this release is gone")
        return optimizer

    # What is checked.

    def _params(self) -> list[Tensor]:
        return self._optimizer._all_params()

    def _check(self, model: nn.Module) -> None:
        optimizer, groups = self._optimizer, self._optimizer.param_groups
        if optimizer._releases is not None:
            raise RuntimeError("optimizer must not release gradients already: call remove() of that release first")
        if any(options.get("differentiable") for options in (optimizer.defaults, *groups)):
            raise RuntimeError("differentiable must be False where gradients are released, got True")
        if any(cls.__name__ == "FullyShardedDataParallel" for m in model.modules() for cls in type(m).__mro__):
            raise RuntimeError("gradients of FSDP1's flat parameters cannot be released: shard by fully_shard")
        named = {id(p) for p in model.parameters()}
        for p in self._params():
            if id(p) not in named:
                raise ValueError(f"optimizer must have parameters of the model alone, got {name_among(groups, p)}")
            if any(isinstance(hook, _Arrived) and hook.active for hook in _hooks_of(p)):
                raise RuntimeError(f"{name_among(groups, p)} must not be released by another optimizer too")
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

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _arrived(self, p: Tensor) -> None:
        """A parameter's gradient is complete."""
        with self._lock, torch.no_grad():
            if self._owner() is not None:
                self._take(p)

    def _release_bucket(self, params: list[Tensor], gradients: list[Tensor]) -> set[int]:
        """Gradients are reduced. Returns the ids of the parameters that need them no more."""
        with self._lock, torch.no_grad():
            optimizer = self._owner()
            if optimizer is None or optimizer._releases is not self:
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
        self._follow(p)
        self._align(p)
        if self._measuring:
            self._measure(place)
            p.grad = None
            return
        if id(p) in self._released:
            p.grad = None  # or the step would update it once more
            raise RuntimeError(
                f"optimizer.step() must be called after each {self._every} backward passes, got another gradient of "
                f"{place.name}, which is updated already; accumulation_steps is for several passes, and after a backward pass "
                "that failed call zero_grad() and step()"
            )
        # A parameter that missed a pass is behind the others, and they tell which pass this is.
        self._hits[id(p)] = self._hits.get(id(p), 0) + 1
        self._passes = max(self._passes, self._hits[id(p)])
        if self._passes < self._every:
            return
        part = self._begin()
        if part.control is not None:
            if self._clip == "previous":
                self._notice_pass()
                self._measure(place)
            self._single.step(place, part)
        self._released.add(id(p))
        p.grad = None

    def _notice_pass(self) -> None:
        """Learn whether this backward pass comes to its end: the norm of a part of the gradients would clip the next step."""
        compiled: Any = sys.modules.get("torch._dynamo.compiled_autograd")
        if compiled is not None and compiled.in_compiled_autograd_region:
            return  # which calls nothing back
        task = torch._C._current_graph_task_id()
        if task != -1 and task not in self._open:  # -1: where communication calls
            self._open.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._open.discard(task))

    def _of_whole_passes(self, total: Tensor) -> Tensor | None:
        """This step's norm, or the one before where an exception has ended a backward pass: on one process or another, since all
        clip alike.
        """
        self._open.discard(torch._C._current_graph_task_id())  # a pass that calls step() has all it wants
        classes = self._norm_classes()
        if not any(classes.groups):
            return self._known if self._open else total
        if self._known is None:
            return total
        ended = total.new_zeros(len(classes.groups))
        if self._open:
            for index, over in enumerate(classes.groups):
                if over:
                    ended[index].fill_(1.0)
        return torch.where(reduced(ended, classes, False) > 0.0, self._known.to(total.device), total)

    def _up_to_date(self) -> dict[int, Place]:
        """The places of all parameters, looked at once a step, and where groups were added or loaded."""
        groups = self._optimizer.param_groups
        if self._looked and self._groups is groups and self._count == len(groups):
            return self._places
        self._groups, self._count, self._looked = groups, len(groups), True
        found = [(place.group, place.index, place.position) for place in self._places.values()]
        now = [(group, i, k) for i, group in enumerate(groups) for k in range(len(group["params"]))]
        same = len(found) == len(now) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(found, now, strict=True))
        if not same or [*self._places] != [id(p) for p in self._params()]:
            self._places, self._classes = places_of(groups), None
            self._single.prepare(len(self._places))
        return self._places

    def _follow(self, p: Tensor) -> None:
        """Have a device's stream wait for the one before that worked for this step: they share norms and statistics."""
        plain = local(p)
        if plain.is_cuda:
            stream = torch.cuda.current_stream(plain.device)
            before = self._streams.get(plain.device)
            if before is not None and before != stream:
                stream.wait_stream(before)
            self._streams[plain.device] = stream
        elif getattr(getattr(p, "device_mesh", None), "device_type", "cpu") == "cuda":
            torch.cuda.current_stream().synchronize()  # FSDP2 copies a gradient to the host on this stream

    def _align(self, p: Tensor) -> None:
        """Place a gradient as its parameter, such as the partial sum of sequence parallelism, once for norm and step."""
        if hasattr(p, "placements"):
            for aligned in aligned_gradients([{"params": [p]}]).values():
                p.grad = aligned

    def _join(self) -> None:
        """Have the current streams wait for what was done on others."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        self._streams = {}

    # The step.

    def _begin(self) -> PartOfStep:
        """What this step does with gradients."""
        if self._begun is not None:
            return self._begun
        optimizer = self._optimizer
        if self._clip == "measure" and self._known is None:
            raise RuntimeError("a backward pass within measure() must come before each step's with clip='measure'")
        optimizer._check_may_step()
        if self._unseen:
            if in_other_buckets(self._unseen):
                raise RuntimeError(
                    "model must be the DistributedDataParallel, or have it: gradients are released before it reduces them"
                )
            self._unseen = set()
        own = optimizer._own
        limit = self._clip_by(self._known)
        control: Control | None = Control(
            clip_value=math.inf if own["clip_grad_value"] is None else own["clip_grad_value"]
        )
        if limit.total is not None and own["nonfinite"] != "propagate" and not limit.total.isfinite().all():
            if own["nonfinite"] == "raise":
                self._known = None
                raise not_finite(own["norm_type"])
            control = None
        self._coef = coefficient(limit)
        if control is not None and limit.total is not None and limit.total.device.type == "cpu":
            control, limit = Begun(control, limit).folded()  # once, not for each parameter: 0.1 ms
        optimizer._begin_step()
        into = Collected(optimizer.param_groups) if optimizer._measures else None
        self._begun = PartOfStep(control, limit, into)
        return self._begun

    @property
    def _inf(self) -> bool:
        """True where the norm is the largest magnitude."""
        return bool(self._optimizer._own["norm_type"] == math.inf)

    def _clip_by(self, total: Tensor | None) -> Clip:
        """How a norm clips gradients."""
        if total is None:
            return NOTHING
        return NOTHING._replace(total=total, max_norm=self._optimizer._own["max_grad_norm"], inf=self._inf)

    def _measure(self, place: Place) -> None:
        found = self._single.norms(place, self._norm_classes(), inf=self._inf)
        self._parts = found if self._parts is None else combined(self._parts, found.to(self._parts.device), self._inf)

    def _total(self) -> Tensor:
        """The sum of all processes, which all come here."""
        parts, self._parts = self._parts, None
        return reduced(parts, self._norm_classes(), self._inf).clone()

    def _norm_classes(self) -> NormClasses:
        if self._classes is None:
            optimizer = self._optimizer
            self._classes = norm_classes(optimizer.param_groups, optimizer._own["norm_process_group"])
        return self._classes

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def finish(self) -> None:
        """What ``optimizer.step()`` does: update what has a gradient still, and report."""
        with self._lock:
            try:
                if self._begun is None:  # all gradients are there, or none
                    self._finish_whole()
                else:
                    self._finish(self._begun)
            finally:
                self._optimizer._join()
                self._hits, self._released, self._passes, self._looked, self._open = {}, set(), 0, False, set()
                self._begun = self._parts = None
                if self._clip == "measure":
                    self._known = None

    def _finish_whole(self) -> None:
        """A step that no backward pass has begun."""
        optimizer = self._optimizer
        measured = any(p.grad is not None for p in self._params())
        optimizer._update_at_stated_precision()
        found = optimizer.engine.report
        if measured and self._clip == "previous" and found.found is not None and found.measured:
            self._known = found.found.total.clone()

    def _finish(self, part: PartOfStep) -> None:
        optimizer = self._optimizer
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            for name in ("grad_scale", "found_inf"):
                optimizer.__dict__.pop(name, None)  # the scaler does not come to it
            raise RuntimeError(
                "gradients must not be scaled where they are released: GradScaler tells after all updates whether they have "
                "overflowed; train in bfloat16, or with enabled=False"
            )
        self._looked = False
        places = self._up_to_date()
        rest = [p for p in self._params() if p.grad is not None]
        for p in rest:
            self._follow(p)
            self._align(p)
        if part.into is not None and not part.into.fits(optimizer.param_groups):
            # Groups have changed in the middle of the step: no statistics of it.
            part, optimizer._measures = part._replace(into=None), False
        if part.control is None:
            optimizer.skipped_steps.add_(1)
        elif rest:
            if self._clip == "previous":
                for p in rest:
                    self._measure(places[id(p)])
            self._single.rest(part)
        self._join()
        if part.into is not None and (sums := part.into.total()) is not None:
            optimizer.engine.report.note(sums, part.into.labels)
        if self._clip is not None:
            total = self._known
            if self._clip == "previous":
                total = self._total()
                self._known = self._of_whole_passes(total)
            report_of(self._clip_by(total), self._coef, optimizer.engine.report)
        optimizer._forget_strangers()


class _Arrived:
    """A hook of parameters, which does nothing once its release has ended."""

    def __init__(self, release: Releasing) -> None:
        self._release = weakref.ref(release)

    @property
    def active(self) -> bool:
        """True while the release lives and has not ended."""
        release = self._release()
        optimizer = None if release is None else release._owner()
        return optimizer is not None and optimizer._releases is release

    def __call__(self, p: Tensor) -> None:
        if (release := self._release()) is not None and self.active:
            release._arrived(p)


def _hooks_of(p: Tensor) -> list[Any]:
    return [*(getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()]
