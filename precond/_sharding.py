"""The only place that knows a parameter may be a piece of a larger one (DTensor)."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The plain tensor behind a wrapper such as DTensor, waited for if it is on its way; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    plain: Tensor = to_local()
    trigger_wait = getattr(plain, "trigger_wait", None)
    return plain if trigger_wait is None else trigger_wait()


def aligned_gradients(groups: list[dict[str, Any]]) -> dict[Tensor, Tensor]:
    """Gradients of DTensor parameters that are placed otherwise (a partial sum, say), placed as their parameter."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:  # then nobody has made a DTensor
        return {}
    aligned = {}
    for group in groups:
        for p in group["params"]:
            if not isinstance(p, module.DTensor) or not isinstance(p.grad, module.DTensor):
                continue
            if p.grad.placements != p.placements or p.grad.device_mesh != p.device_mesh:
                aligned[p] = p.grad.redistribute(p.device_mesh, p.placements)
    return aligned


def shard_groups(tensor: Tensor) -> dict[str, Any] | None:
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
            raise RuntimeError(
                f"a DTensor parameter must be placed by Shard or Replicate to have a norm, got {placement}"
            )
    return groups


def reduce(part: Tensor, groups: Iterable[Any], inf: bool = False) -> Tensor:
    """Add up a sum of squares, or find the largest magnitude, of local pieces over process groups, in place."""
    for group in groups:
        if inf:  # as bits, where NaN is the largest
            torch.distributed.all_reduce(part.view(torch.int64), torch.distributed.ReduceOp.MAX, group=group)
        else:
            torch.distributed.all_reduce(part, group=group)
    return part
