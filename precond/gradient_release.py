"""Gradient release: parameters are updated inside the backward pass, and their gradients freed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._core.optimizer import FusedOptimizer
from ._core.sharding import home
from ._methods.buckets import CommHook
from ._methods.releasing import Releasing

_CLIPS = (None, "previous", "measure")


def release_gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    accumulation_steps: int = 1,
    clip: str | None = None,
    comm_hook: tuple[object, CommHook] | None = None,
) -> GradientRelease:
    """Update each parameter inside the backward pass, as soon as its gradient is complete, and free the gradient.

    Memory then has the gradients of a few layers, not of all: 5.1 bytes per parameter stay with split24 weights and int8
    states, where 7.1 are needed without. The updates are those of the ordinary step, bit for bit, except for clipping by a norm.
    The loop keeps its form: ``optimizer.step()`` after the backward pass finishes the step, and updates what has a gradient
    still. It must be called before the next step's first backward pass.

    Args:
        model: has the parameters of ``optimizer``. Modules of it may be sharded by FSDP2 (``fully_shard``), or be a
            ``DistributedDataParallel``, which then reduces gradients by a hook that updates parameters after it: give that
            wrapper, not the module inside of it.
        optimizer: a method of precond, such as ``AdamW`` or ``Grouped``, or a wrapper of it by Lightning or Accelerate.
        accumulation_steps: >= 1, backward passes for each step (default 1). Gradients are accumulated in ``.grad``, and released
            in the last pass. Under ``DistributedDataParallel`` it must be 1: the pass that reduces is the last one, and the
            others run in its ``no_sync()``.
        clip: how gradients are clipped to ``max_grad_norm`` of the optimizer: their norm is known when the last one is there.
            "previous": by the norm of the previous step's gradients; the first step is not clipped, unless it is measured.
            "measure": by their own norm, which another backward pass finds first, inside :meth:`GradientRelease.measure`; needs
            accumulation_steps=1. None (default): there is no such setting.
        comm_hook: state and hook that reduce a bucket of ``DistributedDataParallel``, such as
            ``(process_group, bf16_compress_hook)``. None (default): all-reduce, and divide by the number of processes.

    Returns:
        A :class:`GradientRelease`, which :meth:`GradientRelease.remove` ends. It is neither copied nor saved with the optimizer.

    Raises:
        TypeError: an optimizer of another library, or one that goes around another (``BNP``, ``FOP``, ``GradientRegularizer``).
        ValueError: an argument out of range, or a parameter that the model does not have.
        RuntimeError: the parameters are released already, or must have all gradients at once:
            ``DualDescent(granularity="global")``, matrices on shards, ``differentiable=True``; FSDP1. Later, from the backward
            pass: a second gradient before the step is finished, or a ``DistributedDataParallel`` that ``model`` does not have.
            From the step: ``GradScaler`` was used, which tells only after all updates whether gradients overflowed.

    Source: Lv et al., arXiv 2306.09782 (LOMO), update in the backward pass, and clip by a second one.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = precond.AdamW(model.parameters(), lr=1e-2)
        >>> release = precond.release_gradients(model, opt)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> model.weight.grad is None, int(opt.state[model.weight]["step"])
        (True, 1)
        >>> opt.step()
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, FusedOptimizer):
        why = " alone: it goes around an optimizer" if hasattr(optimizer, "base") else ""
        got = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise TypeError(f"optimizer must be a method of precond, got {got}{why}")
    if type(accumulation_steps) is not int or accumulation_steps < 1:
        raise ValueError(f"accumulation_steps must be an integer >= 1, got {accumulation_steps!r}")
    if clip not in _CLIPS:
        raise ValueError(f"clip must be None, 'previous' or 'measure', got {clip!r}")
    if clip == "measure" and accumulation_steps > 1:
        raise ValueError(f"accumulation_steps must be 1 with clip='measure', got {accumulation_steps}")
    return GradientRelease(model, optimizer, accumulation_steps, clip, comm_hook)


class GradientRelease(Releasing):
    """What :func:`precond.release_gradients` returns: takes its hooks away again, and measures norms.

    Example:
        >>> import torch, precond
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = precond.SGD(model.parameters(), lr=0.1, max_grad_norm=1.0)
        >>> release = precond.release_gradients(model, opt, clip="measure")
        >>> loss = model(torch.ones(3, 4)).sum()
        >>> with release.measure():
        ...     loss.backward(retain_graph=True)
        >>> loss.backward()
        >>> opt.step()
        >>> round(opt.grad_norm.item(), 3)
        9.487
        >>> release.remove()
    """

    __module__ = "precond"

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Within it a backward pass measures the norm of all gradients, which the next step is clipped by, and updates nothing.
        Gradients that other optimizers of the model's parameters have stay as they were.

        Raises:
            RuntimeError: the optimizer has no ``max_grad_norm``, a step has begun, gradients are accumulated, or none came.
        """
        if self._clip is None:
            raise RuntimeError("measure() needs max_grad_norm and clip='measure' or 'previous', got clip=None")
        if self._every > 1:
            raise RuntimeError(
                f"measure() needs accumulation_steps=1, got {self._every}: a norm is of one backward pass"
            )
        if self._begun is not None or any(p.grad is not None for p in self._params()):
            raise RuntimeError(
                "measure() must come before the step's first gradient: the norm is that of one backward pass"
            )
        model = self._model()
        others: list[tuple[Tensor, Tensor | None]] = [] if model is None else [(p, p.grad) for p in model.parameters()]
        for other, _ in others:
            other.grad = None
        before, self._known = self._known, None
        self._measuring, self._looked = True, False
        try:
            yield
            with self._lock, torch.no_grad():
                self._join()
                places = self._up_to_date()
                for p in self._params():  # what no hook has seen
                    if p.grad is not None:
                        self._align(p)
                        self._measure(places[id(p)])
                if self._parts is None and not any(self._norm_classes().groups):
                    raise RuntimeError("measure() must have a backward pass inside, got no gradient")
                self._known = self._total()
        except BaseException:
            self._known = before if self._clip == "previous" else None
            raise
        finally:
            self._measuring, self._parts = False, None
            for other, gradient in others:
                other.grad = gradient

    def remove(self) -> None:
        """Take the hooks away: from now on gradients stay until ``optimizer.step()``. Twice is no error."""
        optimizer = self._owner()
        if optimizer is not None and optimizer._releases is self:
            optimizer._releases = None
            optimizer._step_supports_amp_scaling = self._amp
        for handle in self._handles:
            handle.remove()
        for hook in self._bucket_hooks:
            hook.end()
        self._handles, self._bucket_hooks = [], []

    def state_dict(self) -> dict[str, Any]:
        """The norm of the last step's gradients, which a resumed run with ``clip="previous"`` begins with."""
        return {"total": self._known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the norm of another run."""
        total = state_dict["total"]
        device = home(self._optimizer.param_groups)
        self._known = None if total is None else total.detach().to(device, torch.float64, copy=True).reshape(1)

    def __reduce__(self) -> tuple[Any, ...]:
        return _ended, ()


def _ended() -> GradientRelease:
    """What a copy of a release is: one that has ended."""
    made = GradientRelease.__new__(GradientRelease)
    made._owner, made._handles, made._bucket_hooks, made._known = lambda: None, [], [], None
    return made
