"""Tensors that methods keep for parameters between steps, in no checkpoint."""

from __future__ import annotations

from torch import Tensor


class OfParameters:
    """A tensor for each of some parameters. It has their ids alone: it keeps none alive, and a tensor that has weak references
    could not be swapped (torch.utils.swap_tensors). ``keep`` drops the tensors of those that are gone; what another one finds
    that gets the id before is scratch memory of some shape.
    """

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._held)

    def get(self, p: Tensor) -> Tensor | None:
        """That of a parameter."""
        return self._held.get(id(p))

    def put(self, p: Tensor, tensor: Tensor) -> None:
        """Hold it for a parameter."""
        self._held[id(p)] = tensor

    def drop(self, p: Tensor) -> None:
        """Forget a parameter's."""
        self._held.pop(id(p), None)

    def of(self, params: list[Tensor]) -> list[Tensor]:
        """Those of parameters that have one."""
        return [self._held[id(p)] for p in params if id(p) in self._held] if self._held else []

    def keep(self, params: list[Tensor]) -> None:
        """Forget the tensors of other parameters."""
        if len(self._held) > len(params):
            alive = set(map(id, params))
            self._held = {key: tensor for key, tensor in self._held.items() if key in alive}
