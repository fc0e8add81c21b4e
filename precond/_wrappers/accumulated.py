"""Gradients that were there before a closure ran, and whether the closure added to them or dropped them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .._core.sharding import local


def unshared(g: Tensor | None) -> Tensor | None:
    """A gradient in memory that the next backward pass does not write: DistributedDataParallel may keep views of its buckets."""
    return g.clone() if g is not None and g._is_view() else g


class Earlier:
    """The gradients of some parameters as they are now. A closure is handed copies, so that they can be restored."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._before = {p: unshared(p.grad) for p in params}
        self._watches: dict[Tensor, _Watch] = {}

    @contextlib.contextmanager
    def handed_out(self) -> Iterator[None]:
        """While a closure runs: watch what becomes of the gradients that are there."""
        try:
            for p, grad in self._before.items():
                if grad is not None:
                    p.grad = grad.detach().clone()
                    self._watches[p] = _Watch(p, grad)
            yield
        finally:
            for watch in self._watches.values():
                watch.end()

    def kept(self) -> list[Tensor]:
        """The parameters whose gradient has the earlier one in it still, unless that is 0. If there are none, earlier ones are
        freed: nothing will have to be restored.
        """
        kept = [p for p, watch in self._watches.items() if watch.kept() and not _is_zero(self._before[p])]
        self._watches = {}
        if not kept:
            self._before = {}
        return kept

    def hand_out_again(self, params: Iterable[Tensor]) -> None:
        """Set gradients to copies of the earlier ones."""
        for p in params:
            before = self._before[p]
            p.grad = None if before is None else before.detach().clone()

    def restore(self) -> None:
        """Set all gradients to what they were."""
        for p, grad in self._before.items():
            p.grad = grad


class _Watch:
    """Sees whether backward passes accumulate into the very gradient that a parameter has now, with nobody writing it before."""

    def __init__(self, p: Tensor, before: Tensor) -> None:
        """``before``: the values of that gradient."""
        assert p.grad is not None
        self._p, self._grad, self._versions, self._values = p, p.grad, _versions_of(p.grad), before
        #: Whether the gradient was as it was handed out when the first pass came, and was never dropped since.
        self._kept: bool | None = None
        self._hooks = []
        if p.requires_grad and p.is_leaf:
            before_pass = p.register_hook(self._before)  # type: ignore[no-untyped-call]
            after_pass = p.register_post_accumulate_grad_hook(self._after)  # type: ignore[no-untyped-call]
            self._hooks = [before_pass, after_pass]
        #: What ``_before`` saw; None where it was not called.
        self._seen: bool | None = None

    def _is_untouched(self) -> bool:
        grad = self._p.grad
        if grad is self._grad:
            return _versions_of(grad) == self._versions
        # DistributedDataParallel has moved it into a bucket.
        return grad is not None and grad._is_view() and torch.equal(grad, self._values)

    def _before(self, _: Tensor) -> None:
        # DistributedDataParallel writes or replaces a gradient after each pass: only None drops what is there.
        self._seen = self._is_untouched() if self._kept is None else self._p.grad is not None

    def _after(self, p: Tensor) -> None:
        seen = self._seen
        if seen is None:
            # FSDP2 accumulates itself, in place in the local tensor, and calls this hook alone.
            seen = p.grad is self._grad
            if self._kept is None:
                seen = seen and sum(_versions_of(self._grad)) == sum(self._versions) + 1
        self._kept = seen and self._kept is not False
        self._seen = None

    def kept(self) -> bool:
        """True where the gradient that was there is part of the one that is there now."""
        return self._is_untouched() if self._kept is None else self._kept and self._p.grad is not None

    def end(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


def _versions_of(t: Tensor) -> tuple[int, ...]:
    plain = local(t)
    # Those of inference mode have none, and are never accumulated into.
    return tuple(0 if each.is_inference() else each._version for each in ((t,) if plain is t else (t, plain)))


def _is_zero(t: Tensor | None) -> bool:
    return t is None or torch.equal(t, torch.zeros_like(t))
