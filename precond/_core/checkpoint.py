"""What torch's ``load_state_dict`` does to states and groups, and what precond's optimizers keep of theirs all the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .rows import Group


class _Hidden:
    """A state that torch must not bring to its parameter's device: it may not fit there."""

    def __init__(self, state: Tensor) -> None:
        self.state = state


@contextlib.contextmanager
def states_as_saved(
    optimizer: torch.optim.Optimizer,
    concerned: Callable[[object], bool] = lambda name: True,
    away: Mapping[int, Collection[str]] = MappingProxyType({}),
) -> Iterator[None]:
    """While torch loads a checkpoint: states, or those of some names, have the dtype they were saved in and memory of their own.
    torch casts and aliases them. ``away``: by the ids of parameters, which of their states are the host's.
    """
    # What torch loads is what the user's hooks made of the dictionary; ours sees it last, and mends before theirs.
    final: dict[str, Any] = {}

    def look(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any] | None:
        final.update(loaded)
        params = (p for group in optimizer.param_groups for p in group["params"])
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        hosts = {i: away[id(p)] for i, p in zip(ids, params, strict=False) if id(p) in away}
        if not hosts:
            return None
        states = {i: _hidden(state, hosts.get(i, ())) for i, state in loaded["state"].items()}
        return {**loaded, "state": states}

    def restore(_: torch.optim.Optimizer) -> None:
        saved_ids = [i for group in final["param_groups"] for i in group["params"]]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for saved_id, p in zip(saved_ids, params, strict=True):
            for name, saved in (final["state"].get(saved_id) or {}).items():
                if not concerned(name):
                    continue
                if isinstance(saved, Tensor) and name == "step":
                    optimizer.state[p][name] = optimizer.state[p][name].clone()
                elif isinstance(saved, Tensor):
                    optimizer.state[p][name] = saved.detach().to(
                        "cpu" if name in away.get(id(p), ()) else p.device, copy=True
                    )

    hooks = [
        optimizer.register_load_state_dict_pre_hook(look),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hidden(state: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: _Hidden(t) if isinstance(t, Tensor) and name in names else t for name, t in state.items()}


class KeptOptions:
    """What groups keep when a checkpoint is loaded: a tensor stays the same tensor and takes the loaded value, an option that
    torch does not have stays what it is where the checkpoint has none.
    """

    def __init__(self, groups: list[Group], own: Callable[[Group], Iterable[str]]) -> None:
        self._own = [{name: group[name] for name in own(group) if name in group} for group in groups]
        self._tensors = [
            {name: value for name, value in group.items() if isinstance(value, Tensor) and value.numel() == 1}
            for group in groups
        ]

    def restore(self, groups: list[Group]) -> None:
        """Bring them into the groups that were loaded."""
        for group, tensors, own in zip(groups, self._tensors, self._own, strict=True):
            for name, tensor in tensors.items():
                if name in group:
                    tensor.data.fill_(float(group[name]))
                    group[name] = tensor
            group.update({name: value for name, value in own.items() if name not in group})
