"""The base class of wrappers: an optimizer around another one, with the other one's groups and states."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .._core.backend import on_device
from .._core.checkpoint import states_as_saved
from .._core.optimizer import FusedOptimizer
from .._core.rows import name_among
from .._core.scales import lr_of
from .._core.sharding import local
from .entries import Own, add_prefix, is_entry

T = TypeVar("T")


class Wrapper(torch.optim.Optimizer):
    """Base class. ``param_groups``, ``defaults`` and ``state`` are those of ``base``, so schedulers, ``GradScaler`` and
    ``torch.distributed.checkpoint`` work on either.

    What a subclass keeps per parameter stands among the states of ``base``, with ``_prefix`` before the names; ``own`` shows it
    without.
    """

    #: Stands before the names of entries.
    _prefix: ClassVar[str]
    #: True where a step needs a closure.
    _needs_closure: ClassVar[bool] = False

    base: torch.optim.Optimizer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        add_prefix(cls._prefix)

    def __init__(self, base: torch.optim.Optimizer) -> None:
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        self.base = base
        self._set_up()

    def _set_up(self) -> None:
        torch.optim.Optimizer.__setstate__(self, {})  # makes the dictionaries of hooks, and `step` call them
        inside = sum(wrapper._prefix == self._prefix for wrapper in self._wrappers_inside())
        #: How the names of this wrapper's entries begin.
        self._start = f"{self._prefix}_" if inside == 0 else f"{self._prefix}{inside + 1}_"

    def _wrappers_inside(self) -> Iterator[Wrapper]:
        base = self.base
        while isinstance(base, Wrapper):
            yield base
            base = base.base

    def _check_steps_alone(self) -> None:
        """Raise for a base whose step needs a closure: there is one gradient to hand to it."""
        base = self.base
        closure = inspect.signature(type(base).step).parameters.get("closure")
        needed = closure is not None and closure.default is inspect.Parameter.empty
        if needed or (isinstance(base, Wrapper) and base._needs_closure):
            raise TypeError(f"base must be an optimizer that steps without a closure, got {type(base).__name__}")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of ``base``."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of ``base``."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    @property
    def state(self) -> Any:
        """The states of ``base``, with the entries of wrappers."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def own(self) -> Own:
        """What this class keeps per parameter: a view of ``state``, with names without the prefix."""
        return Own(self.state, self._params, self._start)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop or zero all gradients."""
        self.base.zero_grad(set_to_none)

    def eval(self) -> None:
        """Call ``eval`` of ``base`` where it has that, as :class:`precond.ScheduleFreeAdamW`."""
        if (switch := getattr(self.base, "eval", None)) is not None:
            switch()

    def train(self) -> None:
        """Call ``train`` of ``base`` where it has that."""
        if (switch := getattr(self.base, "train", None)) is not None:
            switch()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Show the averages of the weights that ``base`` has in the parameters, as its own ``averaged`` does."""
        return self._fused("averaged").averaged()

    def wait(self) -> None:
        """Wait until the host has done its part of all steps so far, where ``base`` has ``offload="cpu"``."""
        inner = self._innermost()
        inner = getattr(inner, "optim", inner)  # of ZeroRedundancyOptimizer
        if isinstance(inner, FusedOptimizer):
            inner.wait()

    def move(self, p: Tensor, to: str | torch.device) -> None:
        """Move the states of a parameter to the host's memory or back to its device, as the method ``move`` of ``base`` does."""
        self._fused("move").move(p, to)

    def _fused(self, call: str) -> FusedOptimizer:
        if not isinstance(inner := self._innermost(), FusedOptimizer):
            raise RuntimeError(f"{call}() needs an optimizer of precond inside, got {type(inner).__name__}")
        return inner

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to ``base``."""
        self.base.add_param_group(param_group)

    def _params(self) -> list[Tensor]:
        """Every parameter, at the position by which a checkpoint knows it."""
        return [p for group in self.param_groups for p in group["params"]]

    def _name_of(self, p: Tensor) -> str:
        """What errors call a parameter."""
        return name_among(self.param_groups, p)

    def _lr_of(self, group: dict[str, Any]) -> Any:
        """The learning rate of a group's steps; None where it has none. torch's optimizers do not know ``lr_scale``."""
        return lr_of(group) if isinstance(self._innermost(), FusedOptimizer) else group.get("lr")

    def _innermost(self) -> torch.optim.Optimizer:
        """The optimizer inside all wrappers."""
        base = self.base
        while isinstance(base, Wrapper):
            base = base.base
        return base

    def _make_entries(self) -> None:
        """Make the entries that a first step makes."""

    def _join_states(self) -> None:
        """Make entries beside the states that ``base`` has already: where there are any, ``torch.distributed.checkpoint`` takes
        them for all, and loads no others.
        """
        if any(self.state.values()):
            with torch.no_grad():
                self._make_entries()

    # Checkpoints.

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> dict[str, Any]:
        """The checkpoint of ``base``, whose states have the entries of wrappers."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        params = self._params()
        self._forget_strangers(params)
        saved = self.base.state_dict()
        entries = {i: _entries_of(self.state[p]) for i, p in enumerate(params) if p in self.state}
        if any(entries.values()):
            # torch.distributed.checkpoint takes states for all trained parameters, or for none.
            states: dict[int, dict[str, Any]] = {i: {} for i, p in enumerate(params) if p.requires_grad}
            states |= saved["state"]
            for i, of in entries.items():
                if of and not of.keys() <= states.get(i, {}).keys():  # ZeroRedundancyOptimizer saves none but its own
                    states[i] = {**states.get(i, {}), **of}
            saved = {**saved, "state": states}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, saved)
            saved = saved if changed is None else changed
        return saved

    def _forget_strangers(self, params: list[Tensor]) -> None:
        """Drop the entries of parameters that are in no group any more: torch saves no state of theirs."""
        for p in self.state.keys() - set(params):
            if isinstance(p, Tensor) and self.state[p] and all(map(is_entry, self.state[p])):
                del self.state[p]

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class; one of ``base`` alone starts without entries."""
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        if isinstance(self.base, (Wrapper, FusedOptimizer)):  # which keep dtypes
            self.base.load_state_dict(state_dict)
        else:
            entries = {i: _entries_of(state) for i, state in state_dict["state"].items() if isinstance(state, dict)}
            with states_as_saved(self.base, is_entry):
                self.base.load_state_dict(state_dict)
            self._load_lost(entries, [i for group in state_dict["param_groups"] for i in group["params"]])
        for p in filter(self.state.get, self._params()):
            # {} is what torch.distributed.checkpoint makes of a state that a flat checkpoint does not have.
            for name in [n for n, value in self.state[p].items() if is_entry(n) and isinstance(value, dict)]:
                del self.state[p][name]
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_lost(self, entries: dict[Any, dict[str, Any]], saved_ids: list[Any]) -> None:
        """Load the entries that ``base`` did not: ZeroRedundancyOptimizer loads none but its own."""
        for i, p in zip(saved_ids, self._params(), strict=True):
            for name, value in entries.get(i, {}).items():
                if not self.state.get(p) or name not in self.state[p]:
                    copied = value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else value
                    self.state[p] = {**(self.state.get(p) or {}), name: copied}

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep. Hooks are lost, as in torch, and so is a scheduler's wrapper of ``step``."""
        lost = ("step", "_hooks", "_profile_name")
        return {name: value for name, value in self.__dict__.items() if not name.endswith(lost)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what ``__getstate__`` kept."""
        state = dict(state)
        own = state.pop("own", {})  # of a pickle from when entries were no states
        self.__dict__.update(state)
        self._set_up()
        self.own.update(own)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"

    # The step.

    @staticmethod
    def _evaluated(closure: Callable[[], T] | None) -> T | None:
        """The value of a closure, evaluated with gradients enabled."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _asked_for_states_only(self) -> bool:
        """True for a first step at lr 0 on gradients of zeros, which is how torch.distributed.checkpoint has states made."""
        if any(self.state.values()):
            return False
        rates = [self._lr_of(group) for group in self.param_groups]
        if any(lr is None or on_device(lr) or float(lr) != 0.0 for lr in rates):
            return False
        gradients = [p.grad for p in self._params() if p.grad is not None]
        return bool(gradients) and not any(g.layout != torch.strided or local(g).any() for g in gradients)

    def _step_base(self) -> None:
        """Step ``base``, from which entries are hidden: torch's optimizers take an empty ``state[p]`` for a first step. Those of
        precond look for names.
        """
        if isinstance(self.base, (Wrapper, FusedOptimizer)):
            self.base.step()
            return
        hidden: dict[Tensor, dict[str, Any]] = {}
        for p, state in list(self.state.items()):
            entries = _entries_of(state)
            if entries:
                hidden[p] = entries
                for name in entries:
                    del state[name]
                if not state:
                    del self.state[p]
        try:
            self.base.step()
        finally:
            for p, entries in hidden.items():
                self.state.setdefault(p, {}).update(entries)

    def _with_gradients(self, gradients: dict[Tensor, Tensor]) -> None:
        """Step ``base`` on other gradients, of the dtypes of those that are there, and restore ``.grad``."""
        before = {p: p.grad for p in gradients}
        try:
            for p, g in gradients.items():
                grad = before[p]
                p.grad = g if grad is None else g.to(grad.dtype)
            self._step_base()
        finally:
            for p, grad in before.items():
                p.grad = grad


def _entries_of(state: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (state or {}).items() if is_entry(name)}
