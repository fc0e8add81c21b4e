"""The base class of wrappers: an optimizer around another one, with the other one's groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Wrapper(torch.optim.Optimizer):
    """Base class. ``param_groups``, ``defaults`` and ``state`` are those of ``base``, so schedulers, ``GradScaler`` and
    ``torch.distributed.checkpoint`` work on either. A subclass keeps its states per parameter in ``own``.

    ``state_dict`` saves the entries of ``own`` among a parameter's states, with ``_prefix`` before their names. They are not in
    ``state`` itself, because torch's optimizers take an empty ``state[p]`` for a first step.
    """

    #: Stands before the names of ``own`` entries in a checkpoint.
    _prefix: ClassVar[str]

    base: torch.optim.Optimizer
    own: dict[Tensor, dict[str, Any]]

    def __init__(self, base: torch.optim.Optimizer) -> None:
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        self.base, self.own = base, {}
        self._set_up()

    def _set_up(self) -> None:
        torch.optim.Optimizer.__setstate__(self, {})  # makes the dictionaries of hooks, and `step` call them

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of ``base``."""
        return self.base.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of ``base``."""
        return self.base.defaults

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The states of ``base``."""
        return self.base.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop or zero all gradients."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to ``base``."""
        self.base.add_param_group(param_group)

    def _params(self) -> list[Tensor]:
        """Every parameter, at the position by which a checkpoint knows it."""
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint of ``base``, with the entries of ``own`` among the states."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        saved = self.base.state_dict()
        state = dict(saved["state"])
        for i, p in enumerate(self._params()):
            if p in self.own:
                state[i] = {**state.get(i, {}), **{f"{self._prefix}_{name}": v for name, v in self.own[p].items()}}
        saved = {**saved, "state": state}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, saved)
            saved = saved if changed is None else changed
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class; one of ``base`` alone starts with ``own`` empty."""
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        start = f"{self._prefix}_"
        plain, own = {}, {}
        for i, state in state_dict["state"].items():
            plain[i] = {name: value for name, value in state.items() if not str(name).startswith(start)}
            own[i] = {name[len(start) :]: value for name, value in state.items() if str(name).startswith(start)}
        self.base.load_state_dict(
            {**state_dict, "state": {i: state for i, state in plain.items() if state or not own[i]}}
        )
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        self.own = {}
        for i, p in zip(saved_ids, self._params(), strict=True):
            if own.get(i):
                self.own[p] = {
                    name: value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in own[i].items()
                }
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep. Hooks are lost, as in torch, and so is a scheduler's wrapper of ``step``."""
        lost = ("step", "_hooks", "_profile_name")
        return {name: value for name, value in self.__dict__.items() if not name.endswith(lost)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what ``__getstate__`` kept."""
        self.__dict__.update(state)
        self._set_up()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"

    @staticmethod
    def _evaluated(closure: Callable[[], T] | None) -> T | None:
        """The value of a closure, evaluated with gradients enabled."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _with_gradients(self, gradients: dict[Tensor, Tensor]) -> None:
        """Step ``base`` on other gradients, and restore ``.grad``."""
        before = {p: p.grad for p in gradients}
        for p, g in gradients.items():
            p.grad = g
        try:
            self.base.step()
        finally:
            for p, grad in before.items():
                p.grad = grad
