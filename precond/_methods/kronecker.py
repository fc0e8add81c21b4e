"""The basis of a parameter: a Kronecker eigenbasis of a matrix, kept in its state block by block, or a basis that is given.

Called by SOAP and GaussNewton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import bases
from .._core.sharding import like, local


def as_matrix(t: Tensor) -> Tensor:
    """Dimension 0 by all others."""
    return t.reshape(t.shape[0], -1)


def is_matrix(p: Tensor) -> bool:
    """True for a parameter that has a basis on either side; a vector has none."""
    return p.dim() > 1 and p.numel() > max(p.shape[0], 1)


def check_matrix(name: str, p: Tensor) -> None:
    """Raise for a parameter that cannot have a basis: complex, or sharded."""
    if p.is_complex():
        raise RuntimeError(f"{name} must be real to have a basis, got {p.dtype}")
    check_whole(name, p)


def check_whole(name: str, p: Tensor) -> None:
    """Raise for a sharded parameter."""
    for placement in getattr(p, "placements", ()):
        if not placement.is_replicate():
            raise RuntimeError(f"{name} must be whole or replicated to have a basis, got placement {placement}")


class Kronecker:
    """The bases of one matrix parameter: a pair of orthogonal matrices for each block, from running means of G G^T and G^T G."""

    def __init__(self, name: str, p: Tensor, state: dict[str, Any], max_size: int) -> None:
        """``name``: what errors call the parameter."""
        self.name = name
        self.shape = (p.shape[0], p.shape[1:].numel())
        self.blocks = bases.blocks(self.shape, max_size)
        self.state = state
        for side, (rows, columns), left in self._sides():
            size = (rows if left else columns).stop - (rows if left else columns).start
            for what in (f"factor_{side}", f"basis_{side}"):
                if what in state and (state[what].shape != (size, size) or state[what].device != p.device):
                    raise RuntimeError(
                        f"{what} of {name} must have shape {(size, size)} on {p.device}, "
                        f"got {tuple(state[what].shape)} on {state[what].device}"
                    )

    def _sides(self) -> Iterator[tuple[str, tuple[slice, ...], bool]]:
        """Each side of each block that is longer than 1; True for the left one."""
        for k, block in enumerate(self.blocks):
            rows, columns = (part.stop - part.start for part in block)
            if rows > 1:
                yield f"left_{k}", block, True
            if columns > 1:
                yield f"right_{k}", block, False

    @property
    def ready(self) -> bool:
        """True once a gradient has made the bases."""
        return bool(self.state.get("basis_step", 0) > 0)

    def make_states(self, like: Tensor) -> None:
        """Make states that a checkpoint can be loaded into; otherwise the first gradient replaces them."""
        self.update_factors(torch.zeros_like(like), 0.0)
        self.refresh("", "")
        self.state["basis_step"] = 0

    def update_factors(self, g: Tensor, beta: float) -> None:
        """Average G G^T and G^T G into the factors, with weight 1 - beta."""
        for side, block, left in self._sides():
            part = g[block]
            square = part @ part.mT if left else part.mT @ part
            factor = self.state.get(f"factor_{side}")
            if factor is None:
                self.state[f"factor_{side}"] = square * (1 - beta)
            else:
                factor.lerp_(square.to(factor.dtype), 1 - beta)

    def learn(self, g: Tensor, beta: float, frequency: int, mean: str, square: str) -> None:
        """Fold a gradient into the factors; the first one, and every ``frequency``-th after it, refreshes the bases."""
        self.update_factors(g, beta)
        count = self.state.get("basis_step", 0)
        if count % frequency == 0:
            self.refresh(mean, square)
        self.state["basis_step"] = count + 1

    def refresh(self, mean: str, square: str) -> None:
        """Compute new bases: eigenvectors at first, then one step of QR. The state ``mean`` is transformed to them. ``square`` is
        only permuted, as in SOAP: a diagonal does not determine its transform.
        """
        found = [as_matrix(local(self.state[name])) if name in self.state else None for name in (mean, square)]
        for side, block, left in self._sides():
            turn, order = self._refresh_side(side)
            m, v = (t if t is None else t[block] for t in found)
            if m is not None:
                m.copy_(turn.mT @ m.to(turn.dtype) if left else m.to(turn.dtype) @ turn)
            if v is not None and order is not None:
                v.copy_(v[order] if left else v[:, order])
        for name, t in zip((mean, square), found, strict=True):
            if t is not None:
                state = local(self.state[name])
                state.copy_(t.view(state.shape))  # a copy only where reshape made one

    def _refresh_side(self, side: str) -> tuple[Tensor, Tensor | None]:
        """Replace a side's basis. Returns the rotation from the last one, at first the identity, and the order of its columns."""
        factor, before = self.state[f"factor_{side}"], self.state.get(f"basis_{side}")
        try:
            if before is None or not self.ready:
                self.state[f"basis_{side}"] = bases.eigenbasis(factor)
                return self.state[f"basis_{side}"], None
            self.state[f"basis_{side}"], order = bases.refreshed(before, factor)
        except ValueError as error:  # what the tensor is called here, "a" there
            raise ValueError(f"factor_{side} of {self.name}: {error}") from error
        return before.mT @ self.state[f"basis_{side}"], order

    def rotate(self, m: Tensor) -> Tensor:
        """Rotate a matrix into the bases."""
        return self._each(m, bases.rotate)

    def rotate_back(self, m: Tensor) -> Tensor:
        """Rotate a matrix out of the bases."""
        return self._each(m, bases.rotate_back)

    def _each(self, m: Tensor, turn: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]) -> Tensor:
        if len(self.blocks) == 1:
            return turn(m, *self._pair(0, m))
        out = torch.empty_like(m)
        for k, block in enumerate(self.blocks):
            out[block] = turn(m[block], *self._pair(k, m))
        return out

    def _pair(self, k: int, m: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The bases of a block, as a matrix that is rotated has them: a checkpoint may bring another dtype."""
        left, right = (self.state.get(f"basis_{side}_{k}") for side in ("left", "right"))
        return None if left is None else left.to(m.dtype), None if right is None else right.to(m.dtype)

    def mean_square_norm(self) -> Tensor:
        """The running mean of the gradient's squared Frobenius norm, from the factors' traces."""
        traces = [self.state[f"factor_{side}"].diagonal().sum() for side, _, left in self._sides() if left]
        if not traces:
            traces = [self.state[f"factor_{side}"].diagonal().sum() for side, _, left in self._sides()]
        return torch.stack(traces).sum()


class Rotation:
    """The basis U of a parameter, in any of its forms; the identity without one."""

    def __init__(
        self,
        p: Tensor,
        flat: Tensor | None = None,
        pair: tuple[Tensor, Tensor] | None = None,
        kronecker: Kronecker | None = None,
    ) -> None:
        self.shape, self.flat, self.pair, self.kronecker = p.shape, flat, pair, kronecker

    @property
    def is_identity(self) -> bool:
        """True where nothing is rotated, or not yet."""
        return self.flat is None and self.pair is None and (self.kronecker is None or not self.kronecker.ready)

    def matrix(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Dimension 0 by all others."""
        return as_matrix(local(t.detach()).to(dtype))

    def rotate(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """U^T t; of a tensor that is placed on a mesh, as its parameter is."""
        return self._turned(t.detach().to(dtype), back=False)

    def rotate_back(self, t: Tensor) -> Tensor:
        """U t."""
        return self._turned(t, back=True)

    def _turned(self, t: Tensor, back: bool) -> Tensor:
        if local(t) is not t and not self.is_identity:
            return like(t, self._turned(local(t), back).contiguous())
        if self.flat is not None:
            u = self.flat.to(t)
            return ((u if back else u.mT) @ t.reshape(-1)).view(self.shape)
        if self.pair is not None:
            left, right = (u.to(t) for u in self.pair)
            m = t.reshape(left.shape[0], -1)
            return (left @ m @ right.mT if back else left.mT @ m @ right).view(self.shape)
        if self.kronecker is None or self.is_identity:
            return t
        turn = self.kronecker.rotate_back if back else self.kronecker.rotate
        return turn(as_matrix(t)).view(self.shape)


def rotation_of(
    name: str, p: Tensor, given: str | Tensor | Sequence[Tensor], state: dict[str, Any], max_size: int
) -> Rotation:
    """The basis of a parameter: given as a matrix or a pair of them, or, for "kronecker", that which its state has."""
    if isinstance(given, str) and not is_matrix(p):
        return Rotation(p)
    check_matrix(name, p)
    if isinstance(given, str):
        return Rotation(p, kronecker=Kronecker(name, p, state, max_size))
    if isinstance(given, Tensor):
        if given.shape != (p.numel(), p.numel()):
            raise RuntimeError(f"basis must have shape {(p.numel(), p.numel())} for {name}, got {tuple(given.shape)}")
        return Rotation(p, flat=given)
    rows, columns = (p.shape[0], p.shape[1:].numel()) if p.dim() > 0 else (1, 1)
    if given[0].shape != (rows, rows) or given[1].shape != (columns, columns):
        raise RuntimeError(
            f"basis must be matrices of {rows} and {columns} for {name}, "
            f"got {tuple(given[0].shape)} and {tuple(given[1].shape)}"
        )
    return Rotation(p, pair=(given[0], given[1]))
