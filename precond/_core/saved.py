"""What copies, pickles and checkpoints of an optimizer have, and how it takes them over."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from . import formats, parts
from .checkpoint import KeptOptions, states_as_saved
from .rows import Row, name_of
from .settings import DEFAULTS, LOST
from .states import ParamStates


class Saved(torch.optim.Optimizer):
    """The part of an optimizer that others save and load."""

    _own: dict[str, Any]
    _states: ParamStates
    #: Group options that torch does not have, with their defaults.
    _group_options: ClassVar[dict[str, Any]]
    #: Options that groups of older checkpoints may lack, with what they were then. A drop-in's are in torch's ``__setstate__``.
    _older_options: ClassVar[dict[str, Any]] = {
        "foreach": None,
        "maximize": False,
        "differentiable": False,
        "fused": None,
    }

    @property
    def states(self) -> ParamStates:
        """What makes, reads and converts the states of parameters."""
        raise NotImplementedError

    def _row(self, group: dict[str, Any]) -> Row:
        """The rule and the hyper-parameters of a group in this step."""
        raise NotImplementedError

    def _moved_params(self) -> list[tuple[Tensor, bool]]:
        """What copies know of moves."""
        raise NotImplementedError

    def _names_away(self) -> dict[int, frozenset[str]]:
        """Of each parameter whose states the host has, by its id, their names."""
        raise NotImplementedError

    def _rebuild(self) -> None:
        """Make everything private that follows from the public state."""
        raise NotImplementedError

    def _check_shows_weights(self, what: str) -> None:
        """Raise while averages are shown."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: torch's dictionaries, our own settings, and the split weights that others write."""
        self._prepare_to_save()
        lost = {} if self._own["norm_process_group"] is None else {"norm_process_group": LOST}
        written = self._states.written(self._all_params())
        kept: dict[str, Any] = {"_written": written} if written else {}
        if moved := self._moved_params():
            kept["_moved_states"] = moved
        return {**super().__getstate__(), "_own": self._own | lost, **kept}

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _prepare_to_save(self) -> None:
        """Drop stale remainders, since one that is loaded is trusted, and settings that a sharding optimizer left in groups.
        Renew codes of version 0.1 that no step has seen. Raise while averages are shown.
        """
        self._check_shows_weights("an optimizer must not be saved or copied")
        formats.renew(self.state.items())
        self.states.begin(self._all_params())
        for group in self.param_groups:
            drop_settings(group, self.defaults)

    def state_dict(self) -> dict[str, Any]:
        """The states and groups, as torch has them. What one rank holds for others is cut into shards, by all ranks together."""
        self._prepare_to_save()
        placed = self._states_to_save()
        held = {p: self.state.get(p) for p in placed}
        self.state.update(placed)
        try:
            return super().state_dict()
        finally:
            for p, state in held.items():
                if state is None:
                    del self.state[p]
                else:
                    self.state[p] = state

    def _states_to_save(self) -> dict[Tensor, dict[str, Any]]:
        """What checkpoints have in place of the states of some parameters."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled optimizer, or the groups and states of a checkpoint."""
        super().__setstate__(state)
        self._own = {**DEFAULTS, **self.__dict__.get("_own", {})}
        if "defaults" in state:  # a copy, or a pickle; of a checkpoint ``load_state_dict`` renews what it keeps
            formats.renew(self.state.items(), thorough=True)
        for group in self.param_groups:
            for name, value in self._older_options.items():
                if name not in self._group_options:  # which is not there where it has its default
                    group.setdefault(name, value)
        self._rebuild()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch's.

        Unlike torch, states keep the dtype they were saved in, and a tensor ``lr`` of this optimizer stays the same
        tensor and takes the loaded value. Options that torch does not have keep this optimizer's values where the
        checkpoint has none.
        """
        self._check_shows_weights("load_state_dict() must not be called")
        kept = KeptOptions(self.param_groups, self._states.recipe.options)
        with states_as_saved(self, away=self._names_away()):
            super().load_state_dict(state_dict)
        kept.restore(self.param_groups)
        formats.renew(self.state.items(), thorough=True)
        states = self.states
        for index, group in enumerate(self.param_groups):
            if group.get("state_format") is not None or group.get("ema_format") is not None:
                rule = parts.with_parts(self._row(group), group).rule
                for position, p in enumerate(group["params"]):
                    states.convert(name_of(group, index, position), p, group, rule)
        self._rebuild()


def drop_settings(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Take out of a group what concerns the whole step, unless a subclass has an option of that name."""
    for name in DEFAULTS:
        if name in group and name not in defaults:
            del group[name]
