"""Gradients of ``DistributedDataParallel``, as soon as a bucket of them is reduced."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Bucket = Any  # torch.distributed.GradBucket, which a build without distributed lacks
#: Reduces a bucket of gradients, in place.
CommHook = Callable[[Any, Bucket], "torch.futures.Future[Any]"]
#: Given parameters and their reduced gradients, what needs them no more.
Release = Callable[[list[Tensor], list[Tensor]], set[int]]


def release_buckets(
    model: nn.Module, release: Release, comm_hook: tuple[object, CommHook] | None, *, accumulates: bool
) -> set[int]:
    """Hand reduced gradients to ``release``, a method. Returns the ids of the parameters that are reduced so."""
    found: set[int] = set()
    modules = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if comm_hook is not None and not modules:
        raise ValueError("comm_hook must be None without DistributedDataParallel in the model")
    if accumulates and modules:
        raise ValueError(
            "accumulation_steps must be 1 under DistributedDataParallel: run all passes but the last one in its no_sync()"
        )
    for module in modules:
        if module.find_unused_parameters:
            raise ValueError(
                "find_unused_parameters must be False where gradients are released, got True: a bucket does not tell a parameter "
                "without a gradient from one with zeros"
            )
    for module in modules:
        # DDP else makes gradients of its buckets again, at the end of the backward pass.
        reducer: Any = module.reducer
        reducer._set_optimizer_in_backward()
        state, hook = (module.process_group, _mean) if comm_hook is None else comm_hook
        module.register_comm_hook(state, _then(hook, weakref.WeakMethod(release)))
        found.update(map(id, module.parameters()))
    return found


def _mean(group: Any, bucket: Bucket) -> torch.futures.Future[Any]:
    """What DDP does without a hook, with its bits: torch's ``allreduce_hook`` divides instead."""
    work = dist.all_reduce(bucket.buffer().mul_(1.0 / group.size()), group=group, async_op=True)
    future: torch.futures.Future[Any] = work.get_future()
    return future


def _then(hook: CommHook, release: weakref.WeakMethod[Release]) -> CommHook:
    def reduce_and_release(state: object, bucket: Bucket) -> torch.futures.Future[Any]:
        def after(future: torch.futures.Future[Any]) -> Tensor:
            value = future.value()
            reduced = value[0] if isinstance(value, list) else value
            buffer: Tensor = bucket.buffer()
            if reduced.data_ptr() != buffer.data_ptr():
                buffer.copy_(reduced)
            params, gradients = bucket.parameters(), bucket.gradients()
            update = release()
            done = set() if update is None else update(params, gradients)
            for p, g in zip(params, gradients, strict=True):
                if id(p) in done:
                    continue
                if p.grad is None:
                    p.grad = g.clone()
                elif p.grad.data_ptr() != g.data_ptr():
                    p.grad.copy_(g)
            return buffer

        return hook(state, bucket).then(after)

    reduce_and_release.__annotations__ = {}  # DDP takes the class itself or nothing, not its name
    return reduce_and_release
