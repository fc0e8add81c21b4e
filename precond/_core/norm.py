"""The norm of a step's gradients: over which processes it is added up, and how the parts of several backends are put together."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import backend as _backend
from .rows import Group, Step, name_of
from .settings import LOST
from .sharding import reduce, shard_groups


class Clip(NamedTuple):
    """What a backend on a device does with the norm; csrc/plan/norm.h. Tensors are None where it has nothing to read or write.
    Triton takes it as it is.
    """

    total: Tensor | None  # sum of squares, or largest magnitude, of the stored gradients
    grad_norm: Tensor | None
    clip_coef: Tensor | None
    skipped: Tensor | None
    max_norm: float
    inf: bool
    skip_nonfinite: bool
    measure: bool = False

    def to(self, device: torch.device) -> Clip:
        """The same with the norm on a device."""
        return self if self.total is None else self._replace(total=self.total.to(device))

    def on(self, device: torch.device) -> Clip:
        """The same for another backend of the step: it reads the norm and writes no result."""
        return self.to(device)._replace(grad_norm=None, clip_coef=None, skipped=None, measure=False)

    def compiled(self, classes: int = 1) -> Any:
        """As the compiled plans take it: addresses in place of tensors, and how many classes of parameters have a norm each."""
        return _compiled_nothing() if self is NOTHING else _compiled(self, classes)


def _compiled(clip: Clip, classes: int = 1) -> Any:
    assert _backend._C is not None
    return _backend._C.Clip(
        total=_address(clip.total),
        grad_norm=_address(clip.grad_norm),
        clip_coef=_address(clip.clip_coef),
        skipped=_address(clip.skipped),
        max_norm=clip.max_norm,
        classes=classes,
        inf=clip.inf,
        skip_nonfinite=clip.skip_nonfinite,
        measure=clip.measure,
    )


@functools.cache
def _compiled_nothing() -> Any:
    """Made once: every step without a norm takes the same."""
    return _compiled(NOTHING)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


NOTHING = Clip(total=None, grad_norm=None, clip_coef=None, skipped=None, max_norm=0.0, inf=False, skip_nonfinite=False)


class NormClasses(NamedTuple):
    """Parameters whose sums are added up over the same process groups, and those groups."""

    of: dict[Tensor, int]
    groups: list[tuple[Any, ...]]


def shard_classes(param_groups: list[Group]) -> NormClasses:
    """The classes of all parameters, with a gradient or without: every process must come to the same list. Plain tensors are in
    the first, which is added up over nothing. The others are in the order of the names of their mesh dimensions: ranks may have
    parameters in different orders.
    """
    class_of: dict[Tensor, tuple[str, ...]] = {}
    groups: dict[tuple[str, ...], tuple[Any, ...]] = {(): ()}
    dims: dict[tuple[str, ...], tuple[str, ...]] = {(): ()}
    for index, group in enumerate(param_groups):
        for position, p in enumerate(group["params"]):
            shards = shard_groups(p, name_of(group, index, position))
            if shards is None:
                class_of[p] = ()
                continue
            name = ("mesh", *sorted(shards))
            class_of[p] = name
            if name not in groups:
                groups[name] = tuple(shards[key] for key in name[1:])
                of_mesh = p.device_mesh.mesh_dim_names or ()
                placed = zip(of_mesh, p.placements, strict=False)
                dims[name] = tuple(dim for dim, placement in placed if not placement.is_replicate())
    order = [(), *sorted([name for name in groups if name], key=dims.__getitem__)]
    number = {name: i for i, name in enumerate(order)}
    return NormClasses({p: number[name] for p, name in class_of.items()}, [groups[name] for name in order])


def norm_classes(param_groups: list[Group], given: Any) -> NormClasses:
    """The classes of a norm. ``given`` is the setting ``norm_process_group``, over which plain tensors are added up."""
    if isinstance(given, str) and given == LOST:
        raise RuntimeError("norm_process_group must be set again: a process group is neither copied nor pickled")
    classes = shard_classes(param_groups)
    if given is not None:
        classes.groups[0] = (given,)
        return classes
    for index, group in enumerate(param_groups):
        for position, p in enumerate(group["params"]):
            if classes.of[p] == 0 and _is_flat_shard(p):
                raise RuntimeError(
                    "norm_process_group must be given with max_grad_norm where parameters are flat shards (FSDP1): "
                    f"the norm of the local shard of {name_of(group, index, position)} is not the global one"
                )
    return classes


def sharder_among_callers() -> torch.optim.Optimizer | None:
    """The optimizer that is making this one for its share of whole parameters: torch's ZeroRedundancyOptimizer or fairscale's
    OSS. Nothing about a parameter tells that other processes have the rest, and neither hands over its process group.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    frame = sys._getframe(1).f_back
    while frame is not None:
        owner = frame.f_locals.get("self")
        if (
            isinstance(owner, torch.optim.Optimizer)
            and "optim" not in vars(owner)
            and group_of_sharder(owner) is not None
        ):
            return owner
        frame = frame.f_back
    return None


def group_of_sharder(owner: torch.optim.Optimizer) -> Any:
    """The processes that a sharding optimizer splits parameters over."""
    names = {cls.__name__ for cls in type(owner).__mro__}
    attribute = "process_group" if "ZeroRedundancyOptimizer" in names else "group" if "OSS" in names else ""
    return getattr(owner, attribute, None)


def _is_flat_shard(p: Tensor) -> bool:
    """True for a flat parameter of FSDP1 that other processes have the rest of."""
    if not (getattr(p, "_is_flat_param", False) or type(p).__name__ == "FlatParameter"):
        return False
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class Measures(Protocol):
    """What updates some of the parameters of a step, and can measure their gradients."""

    def norms(self, step: Step, classes: NormClasses, inf: bool) -> Iterable[Tensor]:
        """Parts of the norm: float64 numbers, one for each class, on some device."""


def total(executors: Iterable[Measures], step: Step, classes: NormClasses, inf: bool) -> Tensor:
    """The sum of squares, or the largest magnitude, of all gradients of all processes."""
    return reduced(local_total(executors, step, classes, inf), classes, inf)


def reduced(found: Tensor | None, classes: NormClasses, inf: bool) -> Tensor:
    """The same from what this process has of each class; None where it has nothing."""
    if found is None:  # a process may have no gradient, or no parameter; the others wait for its part
        found = torch.zeros(len(classes.groups), dtype=torch.float64, device=_device_of(classes))
    for index, over in enumerate(classes.groups):
        reduce(found[index : index + 1], over, inf)
    norm = found[:1]
    for index in range(1, len(classes.groups)):
        norm = combined(norm, found[index : index + 1], inf)
    return norm


def _device_of(classes: NormClasses) -> torch.device:
    """Where the process groups can add."""
    backends = {torch.distributed.get_backend(group) for over in classes.groups for group in over}
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in backends else torch.device("cpu")


def local_total(executors: Iterable[Measures], step: Step, classes: NormClasses, inf: bool) -> Tensor | None:
    """For each class what this process has of it, on the device of the first part. None where nothing has a gradient."""
    found = None
    for executor in executors:
        for part in executor.norms(step, classes, inf):
            found = part if found is None else combined(found, part.to(found.device), inf)
    return found


def combined(a: Tensor, b: Tensor, inf: bool) -> Tensor:
    """Two parts of a norm as one. Magnitudes are compared as bits, where NaN is the largest."""
    return torch.maximum(a.view(torch.int64), b.view(torch.int64)).view(torch.float64) if inf else a + b


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
