"""Gradients of ``DistributedDataParallel``, as soon as a bucket of them is reduced."""

from __future__ import annotations

import gc
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
#: Given parameters and their reduced gradients, the ids of those that need them no more.
Release = Callable[[list[Tensor], list[Tensor]], set[int]]


def release_buckets(
    model: nn.Module, release: Release, comm_hook: tuple[object, CommHook] | None, *, accumulates: bool
) -> tuple[set[int], list[ReduceAndRelease]]:
    """Hand reduced gradients to ``release``, a method. Returns the ids of the parameters that are reduced so, and the hooks."""
    found: set[int] = set()
    modules = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if comm_hook is not None and not modules:
        raise ValueError("comm_hook must be None without DistributedDataParallel in the model")
    if accumulates and modules:
        raise ValueError(
            "accumulation_steps must be 1 under DistributedDataParallel: run all passes but the last one in its no_sync()"
        )
    hooks = []
    for module in modules:
        if module.find_unused_parameters:
            raise ValueError(
                "find_unused_parameters must be False where gradients are released, got True: a bucket does not tell a parameter "
                "without a gradient from one with zeros"
            )
        registered = [hook for hook, _ in getattr(module, "_comm_hooks", [])]
        own = [hook for hook in registered if isinstance(hook, ReduceAndRelease)]
        if registered and not own:
            raise RuntimeError(
                "DistributedDataParallel must have no communication hook yet, since it takes one: give yours as comm_hook="
            )
        if own and own[0].active:
            raise RuntimeError(
                "DistributedDataParallel must have one optimizer that releases its gradients: call remove() of the other one"
            )
        hooks.append(own[0] if own else ReduceAndRelease())
    for module, hook in zip(modules, hooks, strict=True):
        if not any(hook is known for known, _ in module._comm_hooks):
            # DDP else makes gradients of its buckets again, at the end of the backward pass.
            reducer: Any = module.reducer
            reducer._set_optimizer_in_backward()
            module.register_comm_hook(None, hook)
        hook.begin(module, release, (module.process_group, _mean) if comm_hook is None else comm_hook)
        found.update(map(id, module.parameters()))
    return found, hooks


def in_other_buckets(ids: set[int]) -> bool:
    """True where a ``DistributedDataParallel`` of this process reduces one of these parameters. Looks at every object: 0.1 s."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    modules = [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]
    return any(id(p) in ids for module in modules for p in module.parameters())


class ReduceAndRelease:
    """A communication hook, which reduces alone where its release has ended. So does one that was copied or loaded."""

    __name__ = "reduce_and_release"  # which DDP logs

    def __init__(self) -> None:
        self.__qualname__ = self.__name__
        self._module: Callable[[], Any] = _nothing
        self._release: Callable[[], Release | None] = _nothing
        self._state: object = None
        self._hook: CommHook | None = None

    def begin(self, module: nn.Module, release: Release, comm_hook: tuple[object, CommHook]) -> None:
        """Hand what is reduced to a method, as long as its object lives."""
        self._module, self._release = weakref.ref(module), weakref.WeakMethod(release)
        self._state, self._hook = comm_hook

    def end(self) -> None:
        """Reduce alone from now on."""
        self._release = _nothing

    @property
    def active(self) -> bool:
        """True while reduced gradients are handed on."""
        return self._release() is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return ReduceAndRelease, ()

    def __call__(self, state: object, bucket: Bucket) -> torch.futures.Future[Any]:
        module = self._module()
        if module is not None and module._join_config.enable and self._release() is not None:
            raise RuntimeError("DistributedDataParallel.join() must not be used where gradients are released")
        if self._hook is None:
            return _mean(dist.group.WORLD, bucket)

        def after(future: torch.futures.Future[Any]) -> Tensor:
            value = future.value()
            reduced = value[0] if isinstance(value, list) else value
            buffer: Tensor = bucket.buffer()
            if reduced.data_ptr() != buffer.data_ptr():
                buffer.copy_(reduced)
            params, gradients = bucket.parameters(), bucket.gradients()
            release = self._release()
            done = set() if release is None else release(params, gradients)
            for p, g in zip(params, gradients, strict=True):
                if id(p) in done:
                    continue
                if p.grad is None:
                    p.grad = g.clone()
                elif p.grad.data_ptr() != g.data_ptr():
                    p.grad.copy_(g)
            return buffer

        return self._hook(self._state, bucket).then(after)

    __call__.__annotations__ = {}  # DDP takes the class of a bucket itself or nothing, not its name


def _nothing() -> None:
    return None


def _mean(group: Any, bucket: Bucket) -> torch.futures.Future[Any]:
    """What DDP does without a hook, with its bits: torch's ``allreduce_hook`` divides instead."""
    work = dist.all_reduce(bucket.buffer().mul_(1.0 / group.size()), group=group, async_op=True)
    future: torch.futures.Future[Any] = work.get_future()
    return future
