"""An optimizer of one rule that only methods of several passes run."""

from __future__ import annotations

from precond._core.optimizer import FusedOptimizer
from precond._core.rows import Row


class Alone(FusedOptimizer):
    """A rule of which some method has a pass."""

    def __init__(self, params, rule, numbers, lr=0.1, weight_decay=0.0, maximize=False, state_format=None, **settings):
        defaults = dict(rule=rule, numbers=numbers, lr=lr, weight_decay=weight_decay, maximize=maximize)
        defaults |= dict(state_format=state_format, foreach=None, differentiable=False, fused=None)
        super().__init__(params, defaults, settings=settings)

    def _check_defaults(self, defaults) -> None:
        pass

    @classmethod
    def _initial(cls, p, group) -> float:
        """What a caller gives for states: what is divided by one, or taken from p, is more than nothing."""
        return 0.5

    def _row(self, group) -> Row:
        return Row(group["rule"], -1.0 if group["maximize"] else 1.0, {"lr": group["lr"], **group["numbers"]})
