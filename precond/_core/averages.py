"""What every optimizer of precond can do with an average of the weights that its steps make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from . import formats, parts
from .rows import Row
from .sharding import local
from .states import ParamStates
from .swapped import Swapped


class ShowsAverages:
    """The part of an optimizer that reads averages and shows them in the parameters."""

    param_groups: list[dict[str, Any]]
    state: Any
    #: True inside of averaged().
    _shows_averages: bool = False

    @property
    def states(self) -> ParamStates:
        """What makes, reads and converts the states of parameters."""
        raise NotImplementedError

    def _row(self, group: dict[str, Any]) -> Row:
        """The rule and the hyper-parameters of a group in this step."""
        raise NotImplementedError

    def averages(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The average of a parameter's weights that its state has, of the local shape."""
        rule = parts.with_parts(self._row(group), group).rule
        return local(self.states.decoded(p, group, rule, formats.EMA))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Show the average of the weights in the parameters while a ``with`` block runs; afterwards they have their old bits.

        The averages are those that ``ema_decay`` asks for; parameters without one keep their weights. While they are shown, a
        copy of each parameter is kept in its own dtype, and a step is an error. In a model whose parameters are sharded all
        ranks enter and leave together.

        Raises:
            RuntimeError: no parameter has an average, or averages are shown already.

        Example:
            >>> import torch, precond
            >>> w = torch.nn.Parameter(torch.tensor([0.0]))
            >>> opt = precond.SGD([w], lr=1.0, ema_decay=0.5)
            >>> for _ in range(3):
            ...     w.grad = torch.ones(1)
            ...     opt.step()
            >>> with opt.averaged():
            ...     print(w.item())
            -2.25
            >>> w.item()
            -3.0
        """
        self._check_shows_weights("averaged() must not be called")
        states = self.states
        asked = [group for group in self.param_groups if group.get("ema_decay") is not None]
        found = [(p, group) for group in asked for p in group["params"] if formats.EMA in self.state.get(p, ())]
        if not found:
            raise RuntimeError("averaged() needs ema_decay in a group, and a step that has made an average")
        states.begin([p for p, _ in found])
        swapped = Swapped("weights")
        self._shows_averages = True
        try:
            swapped.show(states, ((p, group, self.averages(p, group)) for p, group in found))
            yield
        finally:
            self._shows_averages = False
            swapped.restore(self.states, written_too=True)

    def _check_shows_weights(self, what: str) -> None:
        """Raise where averages are shown."""
        if self._shows_averages:
            raise RuntimeError(f"{what} while averaged() shows other weights")
