"""The basis of a parameter: a Kronecker eigenbasis of a matrix, kept in its state block by block, or a basis that is given.

Called by SOAP and GaussNewton. What they do for all matrices of a group is batched over equal shapes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import bases
from .._core import iteration
from .._core.sharding import like, local
from .newton_schulz import ALIGNED

#: Elements of the largest operand of a batch. A batch copies its operands; a GPU wants many matrices at once, while a CPU gains
#: nothing from 256 x 256 on, and holds a batch of smaller ones in its cache.
_BATCH = {"cpu": 1 << 16}
_BATCH_ELSEWHERE = 1 << 24


def as_matrix(t: Tensor) -> Tensor:
    """Dimension 0 by all others."""
    return t.reshape(t.shape[0], -1)


def is_matrix(p: Tensor) -> bool:
    """True for a parameter that has a basis on either side; a vector has none."""
    return p.dim() > 1 and p.numel() > max(p.shape[0], 1)


def check_matrix(name: str, p: Tensor) -> None:
    """Raise for a parameter that cannot have a basis."""
    if p.is_complex():
        raise RuntimeError(f"{name} must be real to have a basis, got {p.dtype}")


class Side(NamedTuple):
    """One side of a block that has a basis: what its states are called after ``factor_`` and ``basis_``."""

    name: str
    block: tuple[slice, ...]
    left: bool


class Kronecker:
    """The bases of one matrix parameter: orthogonal matrices for each block, from running means of G G^T and G^T G."""

    def __init__(self, name: str, p: Tensor, state: dict[str, Any], max_size: int, one_sided: bool = False) -> None:
        """``name``: what errors call the parameter. ``one_sided``: a block has a basis on its shorter side alone."""
        self.name = name
        self.shape = (p.shape[0], p.shape[1:].numel())
        self.blocks = bases.blocks(self.shape, max_size)
        self.state = state
        self.sides = list(self._sides(one_sided))
        for side, (rows, columns), left in self.sides:
            size = (rows if left else columns).stop - (rows if left else columns).start
            for what in (f"factor_{side}", f"basis_{side}"):
                if what in state and (state[what].shape != (size, size) or state[what].device != p.device):
                    raise RuntimeError(
                        f"{what} of {name} must have shape {(size, size)} on {p.device}, "
                        f"got {tuple(state[what].shape)} on {state[what].device}"
                    )

    def _sides(self, one_sided: bool) -> Iterator[Side]:
        """Each side of each block that is longer than 1 and has a basis."""
        for k, block in enumerate(self.blocks):
            rows, columns = (part.stop - part.start for part in block)
            if rows > 1 and not (one_sided and columns < rows):
                yield Side(f"left_{k}", block, True)
            if columns > 1 and not (one_sided and rows <= columns):
                yield Side(f"right_{k}", block, False)

    @property
    def complete(self) -> bool:
        """True where each side has a basis."""
        return all(f"basis_{side.name}" in self.state for side in self.sides)

    @property
    def stale(self) -> list[Side]:
        """Sides whose basis the state has, and which have none any more."""
        kept = {side.name for side in self.sides}
        return [side for side in self._sides(False) if side.name not in kept and f"basis_{side.name}" in self.state]

    def leave(self, mean: str, square: str) -> None:
        """Turn states out of the bases of such sides, and drop these. Squares become the diagonal of what they are the diagonal
        of in the basis, where coordinates are taken for uncorrelated.
        """
        for side in self.stale:
            self.state.pop(f"factor_{side.name}", None)
            u = self.state.pop(f"basis_{side.name}")
            if not self.ready:
                continue
            for name, turn in ((mean, u), (square, u * u)):
                if name in self.state:
                    state = local(self.state[name])
                    t = as_matrix(state).clone()
                    part = t[side.block].to(u.dtype)
                    t[side.block] = (turn @ part if side.left else part @ turn.mT).to(t.dtype)
                    state.copy_(t.view(state.shape))

    @property
    def ready(self) -> bool:
        """True once a gradient has made the bases."""
        return bool(self.state.get("basis_step", 0) > 0)

    def make_states(self, like: Tensor) -> None:
        """Make states that a checkpoint can be loaded into; otherwise the first gradient replaces them."""
        _update_factors([(self, torch.zeros_like(like))], 0.0)
        _refresh([self], "", "")
        self.state["basis_step"] = 0

    def pair(self, k: int, m: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The bases of a block, as a matrix that is rotated has them: a checkpoint may bring another dtype. What the state has of
        a side that has no basis any more is not used.
        """
        names = {side.name for side in self.sides}
        left, right = (
            self.state.get(f"basis_{side}") if side in names else None for side in (f"left_{k}", f"right_{k}")
        )
        return None if left is None else left.to(m.dtype), None if right is None else right.to(m.dtype)

    def mean_square_norm(self) -> Tensor | None:
        """The running mean of the gradient's squared Frobenius norm, from the traces of a factor of each block; None without."""
        names: dict[tuple[int, int], str] = {}
        for side in self.sides:
            if f"factor_{side.name}" in self.state:  # a side that came later has none before its first gradient
                names.setdefault((side.block[0].start, side.block[1].start), side.name)
        traces = [self.state[f"factor_{name}"].diagonal().sum() for name in names.values()]
        return torch.stack(traces).sum() if traces else None


# What is done for many matrices at once.


def learn(gradients: Sequence[tuple[Kronecker, Tensor]], beta: float, frequency: int, mean: str, square: str) -> None:
    """Fold a gradient of each matrix into its factors. The first one refreshes its bases, and every ``frequency``-th after it."""
    _update_factors(gradients, beta)
    counts = [kronecker.state.get("basis_step", 0) for kronecker, _ in gradients]
    _refresh([k for (k, _), count in zip(gradients, counts, strict=True) if count % frequency == 0], mean, square)
    for (kronecker, _), count in zip(gradients, counts, strict=True):
        kronecker.state["basis_step"] = count + 1


def _update_factors(gradients: Sequence[tuple[Kronecker, Tensor]], beta: float) -> None:
    """Average G G^T and G^T G into the factors, with weight 1 - beta."""
    parts = [(kronecker.state, side, g[side.block]) for kronecker, g in gradients for side in kronecker.sides]
    keys = [((side.left, *_kind(part)), part.numel()) for _, side, part in parts]
    for batch in _batches(parts, keys):
        stack = _stacked(
            [part for _, _, part in batch]
        )  # transposed as a batch: a copy of what is transposed has other bits
        squares = iteration.square_of(stack if batch[0][1].left else stack.mT)
        for (state, side, _), new in zip(batch, squares, strict=True):
            factor = state.get(f"factor_{side.name}")
            if factor is None:
                state[f"factor_{side.name}"] = new * (1 - beta)
            else:
                factor.lerp_(new.to(factor.dtype), 1 - beta)


class _Due(NamedTuple):
    """A side whose basis is refreshed, its factor with the largest magnitude in it, and its basis, if it has one."""

    kronecker: Kronecker
    side: Side
    factor: Tensor
    largest: Tensor
    basis: Tensor | None


def _refresh(kroneckers: Sequence[Kronecker], mean: str, square: str) -> None:
    """Compute new bases: eigenvectors at first, then one step of orthogonal iteration. The state ``mean`` is transformed to them.
    ``square`` is only permuted, as in SOAP: a diagonal does not determine its transform.
    """
    due = [_due(kronecker, side) for kronecker in kroneckers for side in kronecker.sides]
    _check_finite(due)
    moves = {id(kronecker): _Moves(kronecker, mean, square) for kronecker in kroneckers}
    again = []
    for item in due:
        if item.basis is not None:
            again.append(item)
            continue
        new = bases.eigenbasis(item.factor).contiguous()  # as a checkpoint brings it back: products depend on it
        item.kronecker.state[f"basis_{item.side.name}"] = new
        moves[id(item.kronecker)].add(item.side, new, None)  # as from the identity
    keys = [((item.factor.dtype, *_kind(item.basis)), item.basis.numel()) for item in again if item.basis is not None]
    for batch in _batches(again, keys):
        before = _stacked([item.basis for item in batch if item.basis is not None])
        before = before.to(torch.promote_types(before.dtype, torch.float32))
        factors = _stacked([item.factor for item in batch])
        factors = iteration.normalised(factors, torch.stack([item.largest for item in batch])).to(before.dtype)
        found, spreads = iteration.refreshed(before, factors)
        for i, (item, spread) in enumerate(zip(batch, spreads.tolist(), strict=True)):
            basis, order, turn = iteration.settled(found, spread, i, before, factors)
            item.kronecker.state[f"basis_{item.side.name}"] = basis.clone() if len(batch) > 1 else basis
            moves[id(item.kronecker)].add(item.side, turn, order)
    for moved in moves.values():
        moved.finish()


class _Moves:
    """The states of a matrix that are kept in its bases, moved to new ones side by side in the order of its sides, whichever is
    found first: so that their bits do not depend on what is in a batch.
    """

    def __init__(self, kronecker: Kronecker, mean: str, square: str) -> None:
        self.kronecker, self.names = kronecker, (mean, square)
        state = kronecker.state
        self.found = [as_matrix(local(state[name])) if name in state else None for name in self.names]
        self.due = [side.name for side in kronecker.sides]
        self.waiting: dict[str, tuple[Side, Tensor, Tensor | None]] = {}

    def add(self, side: Side, turn: Tensor, order: Tensor | None) -> None:
        """Move the states from sorted columns of the last basis of a side, as soon as it is its turn."""
        self.waiting[side.name] = (side, turn, order)
        while self.due and self.due[0] in self.waiting:
            self._move(*self.waiting.pop(self.due.pop(0)))

    def _move(self, side: Side, turn: Tensor, order: Tensor | None) -> None:
        mean, square = (t if t is None else t[side.block] for t in self.found)
        if order is not None:
            for t in (mean, square):
                if t is not None:
                    t.copy_(t[order] if side.left else t[:, order])
        if mean is not None:
            m = mean.to(turn.dtype)
            mean.copy_(turn.mT @ m if side.left else m @ turn)

    def finish(self) -> None:
        """Write back what was a copy."""
        for name, t in zip(self.names, self.found, strict=True):
            if t is not None:
                state = local(self.kronecker.state[name])
                state.copy_(t.view(state.shape))


def _due(kronecker: Kronecker, side: Side) -> _Due:
    factor = kronecker.state[f"factor_{side.name}"]
    basis = kronecker.state.get(f"basis_{side.name}") if kronecker.ready else None
    return _Due(kronecker, side, factor, iteration.largest_of(factor), basis)


def _check_finite(due: list[_Due]) -> None:
    """Raise for inf or NaN in a factor; the device is asked once for all."""
    values = [v for kind in _grouped(due, [item.largest.device for item in due]) for v in _finite(kind)]
    for item, finite in values:
        if not finite:
            raise ValueError(
                f"factor_{item.side.name} of {item.kronecker.name}: a must be finite, got inf or NaN in it"
            )


def _finite(due: list[_Due]) -> list[tuple[_Due, bool]]:
    largest = torch.stack([item.largest.double() for item in due])
    return [(item, math.isfinite(value)) for item, value in zip(due, largest.tolist(), strict=True)]


def _kind(t: Tensor) -> tuple[Hashable, ...]:
    return t.shape, t.dtype, t.device


def _stacked(tensors: list[Tensor]) -> Tensor:
    """A batch of matrices; of one, without a copy."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _grouped(items: Iterable[Any], keys: Iterable[Hashable]) -> list[list[Any]]:
    groups: dict[Hashable, list[Any]] = {}
    for item, key in zip(items, keys, strict=True):
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def _batches(items: Sequence[Any], keys: Sequence[tuple[tuple[Any, ...], int]]) -> Iterator[list[Any]]:
    """Items of one key, which ends with shape, dtype and device, in batches of as many as the number of elements allows."""
    for group in _grouped(zip(items, keys, strict=True), (key for key, _ in keys)):
        (_, ((*_, shape, dtype, device), elements)) = group[0]
        limit = _BATCH.get(device.type, _BATCH_ELSEWHERE)
        # A CPU's products depend on where an operand begins: other sizes are not batched, so that a matrix has the same bits
        # alone and beside others.
        whole = device.type != "cpu" or all(
            n * dtype.itemsize % ALIGNED == 0 for n in (shape[0] ** 2, shape[1] ** 2, shape[0] * shape[1])
        )
        count = max(1, limit // max(elements, 1)) if whole else 1
        for i in range(0, len(group), count):
            yield [item for item, _ in group[i : i + count]]


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
        return turned([(self, t.detach().to(dtype))], back=False)[0]

    def rotate_back(self, t: Tensor) -> Tensor:
        """U t."""
        return turned([(self, t)], back=True)[0]

    def turned_alone(self, t: Tensor, back: bool) -> Tensor:
        """U t or U^T t by a basis that is given; t by the identity."""
        if self.flat is None and self.pair is None:
            return t
        if local(t) is not t:
            return like(t, self.turned_alone(local(t), back).contiguous())
        if self.flat is not None:
            u = self.flat.to(t)
            return ((u if back else u.mT) @ t.reshape(-1)).view(self.shape)
        assert self.pair is not None
        left, right = (u.to(t) for u in self.pair)
        m = t.reshape(left.shape[0], -1)
        return (left @ m @ right.mT if back else left.mT @ m @ right).view(self.shape)


def turned(tensors: Sequence[tuple[Rotation, Tensor]], back: bool) -> list[Tensor]:
    """U t or U^T t of each tensor; of one that is placed on a mesh, as its parameter is. Kronecker bases of equal shapes are one
    batch.
    """
    out: list[Tensor | None] = []
    parts: list[tuple[Tensor, Tensor | None, Tensor | None, int, tuple[slice, ...] | None]] = []
    for i, (basis, t) in enumerate(tensors):
        if basis.is_identity or basis.kronecker is None:
            out.append(basis.turned_alone(t, back))
            continue
        m = as_matrix(local(t))
        whole = len(basis.kronecker.blocks) == 1
        out.append(None if whole else torch.empty_like(m))
        for k, block in enumerate(basis.kronecker.blocks):
            parts.append((m if whole else m[block], *basis.kronecker.pair(k, m), i, None if whole else block))
    keys = [
        (
            (left is None, right is None, *_kind(m)),
            max(m.numel(), *(u.numel() for u in (left, right) if u is not None), 1),
        )
        for m, left, right, _, _ in parts
    ]
    for batch in _batches(parts, keys):
        left, right = (None if batch[0][side] is None else _stacked([part[side] for part in batch]) for side in (1, 2))
        turn = bases.rotate_back if back else bases.rotate
        for (_, _, _, i, block), new in zip(
            batch, turn(_stacked([part[0] for part in batch]), left, right), strict=True
        ):
            found = out[i]
            if block is None or found is None:
                out[i] = new
            else:
                found[block] = new
    return [_placed(t, new, basis) for (basis, t), new in zip(tensors, out, strict=True)]


def _placed(t: Tensor, new: Tensor | None, basis: Rotation) -> Tensor:
    assert new is not None
    if basis.is_identity or basis.kronecker is None:
        return new
    new = new.view(basis.shape)
    return like(t, new.contiguous()) if local(t) is not t else new


def rotation_of(
    name: str,
    p: Tensor,
    given: str | Tensor | Sequence[Tensor],
    state: dict[str, Any],
    max_size: int,
    one_sided: bool = False,
) -> Rotation:
    """The basis of a parameter: given as a matrix or a pair of them, or, for "kronecker", that which its state has."""
    if isinstance(given, str) and not is_matrix(p):
        return Rotation(p)
    check_matrix(name, p)
    if isinstance(given, str):
        return Rotation(p, kronecker=Kronecker(name, p, state, max_size, one_sided))
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
