"""What every optimizer of precond can do with states in the host's memory: move them there and back, and wait for its steps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import backend as _backend
from . import parts
from .engine import Engine
from .offload import Offload
from .rows import Row, name_among
from .sharding import local
from .states import ParamStates
from .twins import why_not


class MovesStates:
    """The part of an optimizer that knows whose states the host has."""

    param_groups: list[dict[str, Any]]
    state: Any
    _own: dict[str, Any]
    _engine: Engine
    _states: ParamStates
    #: By the ids of parameters that were moved, whether their states are the host's.
    _where: dict[int, bool]

    @property
    def states(self) -> ParamStates:
        """What makes, reads and converts the states of parameters."""
        raise NotImplementedError

    def _row(self, group: dict[str, Any]) -> Row:
        """The rule and the hyper-parameters of a group in this step."""
        raise NotImplementedError

    def _why_not_away(self, group: dict[str, Any]) -> str:
        """Why the states of a group's parameters cannot be the host's; empty if they can."""
        return ""

    def wait(self) -> None:
        """Wait until the host has done its part of all steps so far, with ``offload="cpu"``; raise what went wrong there.

        ``step()`` returns before that. Work that follows it on its streams waits for the new parameters by itself, and so do
        ``state_dict``, copies and the next step; call this before you read or replace what is in ``optimizer.state``, and,
        where gradients are released, before you read or write a parameter between the backward pass and ``step()``.

        Example:
            >>> import torch, precond
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> opt = precond.AdamW([w], offload="cpu")
            >>> w.grad = torch.ones(2)
            >>> opt.step()
            >>> opt.wait()
            >>> opt.state[w]["step"].item()
            1.0
        """
        if self._engine.offload is not None:
            self._engine.offload.deliver()

    def move(self, p: Tensor, to: str | torch.device) -> None:
        """Move the states of a parameter to the host's memory or back to its device; its next steps have the same bits there.

        Args:
            p: a parameter of this optimizer, on a CUDA device.
            to: "cpu", or the parameter's device. It overrules the setting ``offload`` for this parameter, in copies and pickles
                too; checkpoints do not have it. "cpu" once more has the host read the parameter again: call it after a write
                that no version counter shows, such as one through ``.data``.

        Raises:
            ValueError: p is not a parameter of this optimizer, or ``to`` is neither.
            RuntimeError: its states cannot be the host's.

        Example:
            >>> import torch, precond
            >>> model = torch.nn.Linear(8, 8)
            >>> if torch.cuda.is_available():
            ...     model.cuda()
            ...     opt = precond.AdamW(model.parameters())
            ...     opt.move(model.weight, "cpu")
        """
        group = next((group for group in self.param_groups if any(p is q for q in group["params"])), None)
        if group is None:
            raise ValueError("p must be a parameter of this optimizer")
        name, device = name_among(self.param_groups, p), local(p).device
        home = torch.device("cuda") if _backend.cuda_on_host() else device
        if home.type == "cpu":
            raise RuntimeError(f"{name} must be on a CUDA device for its states to be moved, got {device}")
        wanted = torch.device(to)
        if wanted.type not in ("cpu", home.type) or (
            wanted.type == home.type and wanted.index not in (None, home.index)
        ):
            raise ValueError(f"to must be 'cpu' or {str(home)!r}, the device of {name}, got {str(to)!r}")
        away = wanted.type == "cpu"
        if away and (reason := why_not(p) or self._why_not_away(group)):
            raise RuntimeError(f"{name} must keep its states on {device}: {reason}")
        if not away and not self._is_away(p):
            self._where[id(p)] = away
            return
        self.states.begin([p])  # where they are; what others write from now on is noticed where they will be
        self._where[id(p)] = away
        if self._engine.offload is None:
            self._set_offload(())
        assert self._engine.offload is not None
        self._engine.offload.moved(p, self.state.get(p), self._names_of(group))
        self._engine.forget_plans()

    def _is_away(self, p: Tensor) -> bool:
        """True where the states of a parameter are the host's."""
        if not self._where.get(id(p), self._own["offload"] is not None):
            return False
        return self._own["backend"] == "cuda" if _backend.cuda_on_host() else not p.is_cpu

    def _names_of(self, group: dict[str, Any]) -> frozenset[str]:
        """What a step of a group has among the states of a parameter. Others, such as a wrapper's, stay where they are."""
        return self._states.stored(parts.with_parts(self._row(group), group).rule)

    def _names_away(self) -> dict[int, frozenset[str]]:
        """The same for each parameter whose states are the host's, by its id."""
        found = {}
        for group in self.param_groups:
            away = [p for p in group["params"] if self._is_away(p)]
            if away:
                found.update(dict.fromkeys(map(id, away), self._names_of(group)))
        return found

    def _join(self) -> None:
        """Have the current streams wait for what the host updates in this step."""
        if self._engine.offload is not None:
            self._engine.offload.join()

    def _keep_on_host(self) -> None:
        """Drop what is kept about parameters that are no longer there."""
        if self._engine.offload is None:
            return
        alive = {id(p) for group in self.param_groups for p in group["params"]} | {*map(id, self.state)}
        self._engine.offload.keep(alive)
        self._where = {key: away for key, away in self._where.items() if key in alive}

    def _moved_params(self) -> list[tuple[Tensor, bool]]:
        """What copies know of moves."""
        params = (p for group in self.param_groups for p in group["params"])
        return [(p, self._where[id(p)]) for p in params if id(p) in self._where]

    def _take_over_moves(self, written: Iterable[Tensor]) -> None:
        """Of a copied optimizer, or this one before; ``written``: split weights that others are known to write."""
        copied = self.__dict__.pop("_moved_states", None)
        self._where = self.__dict__.get("_where", {}) if copied is None else {id(p): away for p, away in copied}
        if self._own["offload"] is not None or self._where:
            self._set_offload(written)

    def _set_offload(self, written: Iterable[Tensor]) -> None:
        own = weakref.ref(self)

        def away(p: Tensor) -> bool:
            found = own()
            return found is not None and found._is_away(p)

        offload = Offload(self._engine, self._states, self._own["seed"], away, written)
        self._engine.offload = self._states.elsewhere = offload
