"""The only place that knows a parameter may be a piece of a larger one (DTensor)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The plain tensor behind a wrapper such as DTensor; any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def reduce(square_sum: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Add up a sum of squares of local pieces over every mesh that ``tensors`` are sharded on.

    Tensors that are not sharded are whole everywhere: nothing is added up for them.
    """
    groups = {}
    for tensor in tensors:
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is None:
            continue
        for dim, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            if placement.is_shard():
                group = mesh.get_group(dim)
                groups[group.group_name] = group
    for group in groups.values():
        torch.distributed.all_reduce(square_sum, group=group)
    return square_sum
