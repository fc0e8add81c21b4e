"""Parameters that are pieces of larger ones (DTensor): local tensors, process groups, positions in the whole. Methods check the
placements that they cannot take themselves.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


@functools.cache
def slots_of(kind: type) -> tuple[str, str] | None:
    """The slots in which a type of wrappers has what ``local`` gives, and how that is placed; None without. Four calls of
    ``to_local`` for each parameter are 10 ms in a step of 1000.
    """
    module = sys.modules.get("torch.distributed.tensor")
    names = ("_local_tensor", "_spec")
    return names if module is not None and kind is module.DTensor and {*names} <= kind.__dict__.keys() else None


def local(tensor: Tensor) -> Tensor:
    """The plain tensor behind a wrapper such as DTensor, waited for if it is on its way; any other tensor itself."""
    if type(tensor) in _PLAIN_TYPES:  # nearly all; what has no such attribute takes long to say so
        return tensor
    if not torch.is_grad_enabled() and slots_of(type(tensor)) is not None:
        held: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
        if type(held) in _PLAIN_TYPES:  # what to_local gives but for a view of it, of a parameter
            return held
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    plain: Tensor = to_local()
    trigger_wait = getattr(plain, "trigger_wait", None)
    return plain if trigger_wait is None else trigger_wait()


def home(groups: list[dict[str, Any]]) -> torch.device:
    """Where the first parameter lies."""
    first = next((p for group in groups for p in group["params"]), None)
    return torch.device("cpu") if first is None else local(first).device


def place_of(p: Tensor, name: str = "a parameter") -> tuple[int, int, int]:
    """Where a local tensor's elements are in the unsharded one: the first, and if rows are cut, a row's length and the step
    from row to row. For formats that number elements; raise where a mesh cuts otherwise.
    """
    if not hasattr(p, "placements"):
        return 0, 0, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    cut = [placement for placement in p.placements if not placement.is_replicate()]
    if any(not placement.is_shard() or placement.dim > 1 or type(placement).__name__ != "Shard" for placement in cut):
        raise RuntimeError(
            f"a format below float32 must have placements Shard(0), Shard(1) or Replicate for {name}, got {p.placements}"
        )
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)  # type: ignore[attr-defined]
    if p.dim() < 2:
        return (offset[0] if offset else 0), 0, 0
    inner = math.prod(p.shape[2:])
    row, row_step = shape[1] * inner, p.shape[1] * inner
    return (
        offset[0] * row_step + offset[1] * inner,
        (row if row != row_step else 0),
        (row_step if row != row_step else 0),
    )


def zeros_per_row(p: Tensor, per: int, dtype: torch.dtype, name: str = "a parameter") -> Tensor:
    """Zeros, one for so many elements of a row, placed as the parameter: shape (rows, elements of a row / per)."""
    if p.dim() < 2:
        return torch.zeros(-(-p.numel() // per), dtype=dtype, device=p.device)
    rows, row = p.shape[0], math.prod(p.shape[1:])
    plain = local(p)
    local_rows, local_row = plain.shape[0], math.prod(plain.shape[1:])
    for dim, placement in enumerate(getattr(p, "placements", ())):
        if placement.is_shard(1) and (local_row % per or p.shape[1] % p.device_mesh.size(dim)):  # type: ignore[attr-defined]
            raise RuntimeError(
                f"state_format with codes must have shards of rows of a multiple of {per} elements for {name}, "
                f"got {local_row} of {row}"
            )
    zeros = torch.zeros(local_rows, local_row // per, dtype=dtype, device=plain.device)
    return like(p, zeros, torch.Size((rows, row // per)))


def like(p: Tensor, plain: Tensor, shape: torch.Size | None = None, placements: Sequence[Any] | None = None) -> Tensor:
    """A contiguous local tensor, placed as the parameter; ``shape`` of the whole and ``placements`` where these are others."""
    if not hasattr(p, "placements"):
        return plain
    from torch.distributed.tensor import DTensor

    shape = p.shape if shape is None else shape
    stride = torch.empty(shape, device="meta").stride()
    placements = p.placements if placements is None else placements
    if plain.device.type != p.device_mesh.device_type and not plain.is_meta:  # type: ignore[attr-defined]
        # from_local would bring it to the mesh's device: it is the host's, as FSDP2's CPUOffloadPolicy has parameters.
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        meta = TensorMeta(shape, stride, plain.dtype)
        spec = DTensorSpec(p.device_mesh, tuple(placements), tensor_meta=meta)  # type: ignore[attr-defined]
        return DTensor(plain, spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return DTensor.from_local(plain, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)  # type: ignore[attr-defined]


def aligned_gradients(groups: list[dict[str, Any]]) -> dict[Tensor, Tensor]:
    """Gradients of DTensor parameters that are placed otherwise (a partial sum, say), placed as their parameter."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:  # then nobody has made a DTensor
        return {}
    found: list[tuple[str, Any]] = []
    for group in groups:
        names = group.get("param_names", ())
        for i, p in enumerate(group["params"]):
            if not isinstance(p, module.DTensor) or not isinstance(p.grad, module.DTensor):
                continue
            if p.grad.placements != p.placements or p.grad.device_mesh != p.device_mesh:
                found.append((names[i] if i < len(names) else "", p))
    if all(name for name, _ in found):
        found.sort(
            key=operator.itemgetter(0)
        )  # ranks may have named parameters in different orders, and each takes part
    return {p: p.grad.redistribute(p.device_mesh, p.placements) for _, p in found}


def shard_groups(tensor: Tensor, name: str = "a DTensor parameter") -> dict[str, Any] | None:
    """The process groups that a DTensor's shards are spread over, by name; None for a plain tensor."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return None
    groups = {}
    for dim, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if placement.is_shard() or type(placement).__name__ == "_StridedShard":
            group = mesh.get_group(dim)
            groups[group.group_name] = group
        elif not placement.is_replicate():
            raise RuntimeError(f"{name} must be placed by Shard or Replicate to have a norm, got {placement}")
    return groups


def reduce(part: Tensor, groups: Iterable[Any], inf: bool = False) -> Tensor:
    """Add up a sum of squares, or find the largest magnitude, of local pieces over process groups, in place."""
    for group in groups:
        if inf:  # as bits, where NaN is the largest
            torch.distributed.all_reduce(part.view(torch.int64), torch.distributed.ReduceOp.MAX, group=group)
        else:
            torch.distributed.all_reduce(part, group=group)
    return part


def agreed(asked: bool, groups: Sequence[Any], device: torch.device) -> bool:
    """True if every process asks, also those that only others share a group with."""
    flag = torch.tensor([int(asked)], device=device)
    for group in [*groups] * len(groups):
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=group)
    return bool(flag.item())
