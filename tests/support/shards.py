"""Optimizers on shards, as a rank of a gloo group: what the scenarios of several methods share."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

STEPS = 3
F32, BF16 = torch.float32, torch.bfloat16


class Scenarios:
    """Functions that every rank of a group calls, by their names."""

    def __init__(self) -> None:
        self._functions: dict[str, tuple[tuple[int, ...], Callable[[], None]]] = {}

    def __call__(self, *ranks: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """For these numbers of ranks."""

        def add(function: Callable[[], None]) -> Callable[[], None]:
            self._functions[function.__name__] = ranks, function
            return function

        return add

    @property
    def cases(self) -> list[tuple[str, int]]:
        """Each scenario with each number of ranks."""
        return [(name, number) for name, (ranks, _) in self._functions.items() for number in ranks]

    def run(self, folder: str) -> None:
        """All of this number of ranks; the errors of each rank are the results."""
        ranks = dist.get_world_size()
        torch.set_num_threads(1)
        found = {}
        for name, (among, function) in self._functions.items():
            if ranks in among:
                try:
                    function()
                    found[name] = ""
                except BaseException:
                    found[name] = traceback.format_exc()
        torch.save(found, f"{folder}/{ranks}-{dist.get_rank()}.pt")


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def square(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names or ("replicate", "shard"))


def values(shapes, seed: int, dtype=F32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(make, shapes, place, dtype=F32, steps=STEPS, update=None) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """``place(i, t)`` puts the i-th parameter, and its gradients, on a mesh; ``update`` is called before each step."""
    params = [nn.Parameter(place(i, t)) for i, t in enumerate(values(shapes, 5, dtype))]
    optimizer = make(params)
    for step in range(steps):
        for i, (p, g) in enumerate(zip(params, values(shapes, 100 + step, dtype), strict=True)):
            p.grad = place(i, g)
        if update is not None:
            update(optimizer)
        optimizer.step()
    return [whole(p.detach()) for p in params], optimizer


def check_against_whole(make, mesh, placements, shapes, **options: Any) -> torch.optim.Optimizer:
    """The unsharded run, bit for bit; ``placements`` of all parameters, or one list each. Returns the sharded optimizer."""
    each = placements if isinstance(placements[0], list) else [placements] * len(shapes)
    expected, _ = train(make, shapes, lambda i, t: t, **options)
    found, optimizer = train(
        make, shapes, lambda i, t: distribute_tensor(t, mesh, each[i], src_data_rank=None), **options
    )
    for shape, p, q in zip(shapes, found, expected, strict=True):
        assert torch.equal(p, q), (placements, shape, (p - q).abs().max())
    return optimizer


def exchanges(optimizer) -> list[Any]:
    """What its ranks have agreed on."""
    return [exchange for _, exchange in optimizer.agreements.exchanges(optimizer._members(optimizer.param_groups))]


class CountedBytes:
    """While it lasts the bytes that all-to-alls send to other ranks are counted."""

    def __enter__(self) -> CountedBytes:
        self.bytes, self._all_to_all = 0, dist.all_to_all_single
        torch.distributed.all_to_all_single = self.all_to_all
        return self

    def __exit__(self, *_: object) -> None:
        torch.distributed.all_to_all_single = self._all_to_all

    def all_to_all(self, out, sent, out_sizes, sizes, group=None, async_op=False):
        self.bytes += sent.numel() * sent.element_size()
        assert sizes[dist.get_rank(group)] == 0
        assert async_op
        return self._all_to_all(out, sent, out_sizes, sizes, group=group, async_op=True)


def everywhere(value: float) -> list[float]:
    """The numbers of all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def raises(function: Callable[[], object], *said: str) -> None:
    """An error on all ranks, with these words."""
    try:
        function()
        message = "nothing"
    except (RuntimeError, TypeError, ValueError) as error:
        message = str(error)
    messages = everywhere(message)
    assert all(word in each for each in messages for word in said), messages
