"""What the host has of parameters on a device: twins in pinned memory, and the states that are stepped beside them."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import backend as _backend
from .remainders import versions_of
from .rows import Group, Row
from .sharding import like, local
from .states import ParamStates, Recipe

#: The largest piece of gradients that is on its way at a time, in bytes; four of them are pinned.
_SLOT = 64 << 20


def why_not(p: Tensor) -> str:
    """Why the states of a parameter cannot be the host's; empty if they can."""
    device = local(p).device
    if p.dtype not in _backend.FUSED_DTYPES:
        return f"the host updates float32, bfloat16, float16 and complex64 alone, got {p.dtype}"
    if _backend.cuda_on_host():
        return ""
    if device.type != "cuda":
        return f"parameters must be on a CUDA device for that, got {device}"
    if _backend._C is None or not _backend._C.cuda:
        return _backend.why_not("cuda")
    return ""


def pinned_empty(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor in memory that a device copies to and from by itself. torch's own allocator of such memory rounds up
    to powers of two.
    """
    assert _backend._C is not None
    shape = tuple(shape)
    count = torch.Size(shape).numel()
    with torch.inference_mode(False):
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        with _backend.current(device):
            block = _backend._C.Pinned(count * dtype.itemsize)
        return torch.frombuffer(block, dtype=dtype, count=count).view(shape)


def _pinned(t: Tensor, device: torch.device) -> Tensor:
    """A tensor in pinned memory; itself if it is there, or needs none."""
    plain = local(t.detach())
    assert _backend._C is not None
    if not plain.numel() or (plain.device.type == "cpu" and _backend._C.Pinned.has(plain.data_ptr())):
        return t
    made = pinned_empty(plain.shape, plain.dtype, device)
    made.copy_(plain)
    return like(t, made, t.shape)


class Twin:
    """A parameter's copy on the host, contiguous and placed as the parameter. Of the device it keeps ``bounce`` alone."""

    __slots__ = ("bounce", "device", "host", "seen")

    def __init__(self, p: Tensor) -> None:
        plain = local(p.detach())
        self.device = plain.device
        self.host = like(p, pinned_empty(plain.shape, plain.dtype, plain.device), p.shape)
        #: Where new values arrive that the device then brings into the parameter's order; None where that is the twin's.
        self.bounce: Tensor | None = None
        #: The parameter's versions and address when the twin was last like it; None if it never was.
        self.seen: tuple[int, ...] | None = None

    def fits(self, p: Tensor) -> bool:
        """True where it can be this parameter's."""
        plain, own = local(p), local(self.host)
        return (plain.shape, plain.dtype, plain.device) == (own.shape, own.dtype, self.device) and (
            getattr(p, "placements", None) == getattr(self.host, "placements", None)
        )

    def is_up_to_date(self, p: Tensor) -> bool:
        """True where nobody else has written the parameter."""
        return self.seen == _seen(p)

    def download(self, p: Tensor) -> None:
        """Take the parameter's bits."""
        with torch.no_grad():
            local(self.host).copy_(local(p.detach()))
        self.seen = _seen(p)

    def address(self, p: Tensor) -> int:
        """Where new values go to on the device."""
        plain = local(p)
        if plain.is_contiguous():
            self.bounce = None
            return plain.data_ptr()
        if self.bounce is None:
            self.bounce = torch.empty(plain.shape, dtype=plain.dtype, device=plain.device)
        return self.bounce.data_ptr()

    def note(self, p: Tensor) -> None:
        """The twin is like the parameter, or will be when the copies that are enqueued have run."""
        self.seen = _seen(p)

    def was_written(self, p: Tensor) -> bool:
        """True where a version counter shows that somebody else has written the parameter; its memory may be another too."""
        return self.seen is None or self.seen[:2] != versions_of(p)


def _seen(p: Tensor) -> tuple[int, ...]:
    return (*versions_of(p), local(p).data_ptr())


class Twins:
    """The twins of an optimizer's parameters, and what they reach the device by."""

    def __init__(self) -> None:
        #: By the parameter's id, without a reference: Remainders says why.
        self._twins: dict[int, Twin] = {}
        #: While a step is prepared or run: its parameters and their twins, by the ids of the twins' tensors.
        self.in_step: dict[int, tuple[Tensor, Twin]] = {}
        #: True in a step of single parameters, whose gradients are freed before ``join``.
        self.partial = False
        self._links: dict[torch.device, Any] = {}
        #: Of steps whose parameters are not joined yet: those that bounce.
        self._bouncing: list[tuple[Tensor, Twin]] = []
        self._submitted: set[torch.device] = set()
        #: Of both: another thread may wait.
        self._lock = threading.Lock()

    def get(self, p: Tensor) -> Twin | None:
        """A parameter's, if it has one that fits."""
        twin = self._twins.get(id(p))
        return twin if twin is not None and twin.fits(p) else None

    def make(self, p: Tensor) -> Twin:
        """A parameter's twin, as the parameter was."""
        twin = self._twins[id(p)] = Twin(p)
        return twin

    def drop(self, p: Tensor) -> Tensor | None:
        """A parameter has none any more. Returns the one it had, fitting or not."""
        twin = self._twins.pop(id(p), None)
        return None if twin is None else twin.host

    def keep(self, alive: set[int]) -> list[Tensor]:
        """Forget those of other parameters. Returns them."""
        if self._twins.keys() <= alive:
            return []
        self.wait()
        return [self._twins.pop(key).host for key in self._twins.keys() - alive]

    def link(self, device: torch.device) -> Any:
        """What goes between the host and a device."""
        link = self._links.get(device)
        if link is None:
            assert _backend._C is not None
            with _backend.current(device):
                link = self._links[device] = _backend._C.Link(device.index or 0, _SLOT)
        return link

    def submitted(self, device: torch.device, updated: list[tuple[Tensor, Twin]]) -> None:
        """New values of these parameters are on their way."""
        with self._lock:
            for p, twin in updated:
                if twin.bounce is not None:
                    self._bouncing.append((p, twin))
                twin.note(p)
            self._submitted.add(device)

    def join(self, *, everywhere: bool = False) -> None:
        """Have each device's current stream wait for the parameters that are on their way to it; or every stream, by waiting for
        that one. A parameter that somebody has written meanwhile stays as it is.
        """
        with self._lock:
            for device in self._submitted:
                with _backend.current(device):
                    self._links[device].join(_backend.current_stream(device))
            for p, twin in self._bouncing:
                if twin.bounce is not None and twin.is_up_to_date(p):
                    with torch.no_grad():
                        local(p.detach()).copy_(twin.bounce)
                    twin.note(p)
            if everywhere and not _backend.cuda_on_host():
                for device in self._submitted:
                    torch.cuda.current_stream(device).synchronize()
            self._submitted, self._bouncing = set(), []

    def wait(self) -> None:
        """Until the host has done its part; raises what went wrong."""
        for link in self._links.values():
            link.wait()


class HostStates(ParamStates):
    """The states of twins: those of their parameters, the same dictionaries, in pinned memory."""

    def __init__(
        self, recipe: Recipe, seed: int, twins: Twins, key_of: Callable[[], Callable[[Tensor], int] | None]
    ) -> None:
        """``key_of``: a weak reference to what names the random bits of a parameter."""
        super().__init__(recipe, seed)
        self.twins, self._key_of = twins, key_of
        #: Of twins.
        self.own: dict[Tensor, dict[str, Any]] = collections.defaultdict(dict)

    def keys(self, group: Group, rule: str) -> None:
        """None: gradients are elsewhere, so that each twin is looked at."""

    def key_of(self, p: Tensor) -> int:
        """What names the stream of random bits of a twin: its parameter's."""
        key_of = self._key_of()
        assert key_of is not None
        return key_of(self.twins.in_step[id(p)][0])

    def ensure(self, name: str, p: Tensor, group: Group, row: Row) -> bool:
        """Bring what exists to the host, make what is missing and convert what is stored otherwise than asked."""
        device, names = self.twins.in_step[id(p)][1].device, self.stored(row.rule)
        if self.missing(p, row.rule) or not _is_on_host(self.state[p], names):
            self._settle()
            if p in self.state:
                to_host(self.state[p], names, device)
        fresh = super().ensure(name, p, group, row)
        if p in self.state:
            to_host(self.state[p], names, device)
        return fresh

    def _settle(self) -> None:
        self.twins.wait()

    def end(self, split: Iterable[Tensor]) -> None:
        """Split weights are, or will be, as the step leaves them."""
        split = list(split)
        if self.remainders.written(split):  # whose bits are kept
            self._settle()
        super().end(split)


def _is_on_host(state: dict[str, Any], names: frozenset[str]) -> bool:
    """True where these states of a parameter are in pinned memory."""
    has = _backend._C.Pinned.has  # type: ignore[union-attr]
    tensors = [local(t) for name, t in state.items() if name in names and isinstance(t, Tensor)]
    return all(t.device.type == "cpu" and (not t.numel() or has(t.data_ptr())) for t in tensors)


def to_host(state: dict[str, Any], names: frozenset[str], device: torch.device) -> None:
    """Bring these states of a parameter, from a device or anywhere, into pinned memory of the host."""
    for name in names & state.keys():
        if isinstance(state[name], Tensor):
            state[name] = _pinned(state[name], device)


def to_device(state: dict[str, Any], names: frozenset[str], device: torch.device) -> None:
    """Bring these states of a parameter back to its device. Where its counter lies, the next step decides."""
    for name in names & state.keys():
        if isinstance(t := state[name], Tensor):
            state[name] = like(t, local(t.detach()).to(device, copy=True), t.shape)


def contiguous(g: Tensor) -> Tensor:
    """A gradient in the order in which twins are."""
    plain = local(g)
    if plain.layout != torch.strided or (plain.is_contiguous() and not plain.is_neg() and not plain.is_conj()):
        return g
    return like(g, plain.detach().resolve_neg().resolve_conj().contiguous(), g.shape)
