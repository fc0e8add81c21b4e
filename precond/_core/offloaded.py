"""What updates on the host parameters of a device, by their twins: what it takes, and the plan that enqueues its work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import backend as _backend
from .checks import Checks
from .executors import Compiled
from .norm import Clip
from .rows import Control, Row, Step
from .sharding import local
from .states import States
from .statistics import Extras
from .twins import HostStates

OFFLOADED = "offload"


class HostChecks(Checks):
    """What the host takes: twins with their states, and gradients of a device."""

    def backend_of(self, name: str, p: Tensor, step: Step, row: Row, states: States) -> str:
        """Check a twin, its states and its gradient."""
        assert isinstance(states, HostStates)
        own, _ = states.twins.in_step[id(p)]
        if (g := step.input_of(p)) is not None:
            self._check_layouts(name, own, g, row, False)
            if g.device != own.device:
                raise RuntimeError(f"{name} must have its gradient on {own.device}, got {g.device}")
            if g.shape != p.shape or g.is_complex() != p.is_complex():
                raise RuntimeError(
                    f"{name} must have a gradient of shape {tuple(p.shape)} and of its kind, got {tuple(g.shape)} of {g.dtype}"
                )
        if torch.is_grad_enabled():
            raise RuntimeError("offload must be None for a step that is differentiable")
        values = [local(own)] if g is None else [local(own), local(g)]
        if any(t.dtype not in _backend.FUSED_DTYPES or not _backend.has_plain_memory(t) for t in values):
            kinds = ", ".join(f"a {type(t).__name__} of {t.dtype}" for t in values)
            raise RuntimeError(
                f"offload must get float32, bfloat16, float16 or complex64 tensors that lie in memory as their strides say, got "
                f"{kinds} for {name}; move(p, {str(own.device)!r}) keeps its states on its device"
            )
        super().backend_of(name, p, step._replace(inputs={}), row, states)
        return OFFLOADED

    def device_of(self, p: Tensor, states: States) -> torch.device:
        """The device that has the parameter of a twin."""
        assert isinstance(states, HostStates)
        return states.twins.in_step[id(p)][1].device


class Offloaded(Compiled):
    """A plan of the host for twins whose parameters are on one device."""

    measures_itself: ClassVar[bool] = False

    def __init__(self, step: Step, states: States, *rest: Any) -> None:
        assert isinstance(states, HostStates)
        self._twins = states.twins
        super().__init__(step, states, *rest)

    @property
    def sums_on(self) -> torch.device:
        """Where statistics are written."""
        return torch.device("cpu")

    def run(self, step: Step, control: Control, clip: Clip, extras: Extras) -> bool:
        """Enqueue the update. Whether a norm that the device may still be measuring says to skip it, the host's threads see."""
        twins = self._twins
        link = twins.link(self.device)
        given = [(h, step.input_of(h)) for group in step.groups for h in group["params"]]
        updating = [
            (h, g, *twins.in_step[id(h)])
            for h, g in given
            if g is not None and twins.in_step[id(h)][1].device == self.device
        ]
        addresses = [twin.address(p) for _, _, p, twin in updating]
        clip = clip.to(self.device)
        scaler = [None if t is None else t.to(self.device) for t in (control.grad_scale, control.found_inf)]
        # Gradients are the allocator's to keep, but for the emulated device, whose memory knows no streams. One flat list: the
        # garbage collector looks at all that each new tuple makes it.
        held: list[Any] = [*scaler, clip.total]
        for h, g, p, _ in updating:
            held += (h, p, g) if _backend.cuda_on_host() else (h, p)
            held += step.state.get(h, {}).values()
        with _backend.current(self.device):
            updated = self.plan.submit(
                link,
                addresses,
                grad_coef=control.grad_coef,
                clip_value=control.clip_value,
                clip=clip._replace(grad_norm=None, clip_coef=None, skipped=None).compiled(),
                grad_scale=0 if scaler[0] is None else scaler[0].data_ptr(),
                found_inf=0 if scaler[1] is None else scaler[1].data_ptr(),
                stream=_backend.current_stream(self.device),
                threads=torch.get_num_threads(),
                extras=extras.compiled(),
                held=held,
            )
            if not _backend.cuda_on_host():
                self._record(link.reads, ((p, g) for _, g, p, _ in updating))
        if not extras.only:
            torch.autograd.graph.increment_version(updated)
            torch.autograd.graph.increment_version([p for _, _, p, _ in updating])
            twins.submitted(self.device, [(p, twin) for _, _, p, twin in updating])
        return True

    def _record(self, reads: int, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Tell the allocator which streams gradients are used on besides their own. The current stream waits for their copies at
        the end of the step: one that is freed later can be used again at once.
        """
        own = torch.cuda.ExternalStream(reads, device=self.device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(self.device)
        is_side = _backend.is_side_stream(self.device, current.cuda_stream)
        for p, g in gradients:
            if self._twins.partial or g is not p.grad:
                local(g).record_stream(own)
            elif is_side:
                local(g).record_stream(current)
