"""Which matrices a parameter consists of: itself, a flattened tensor, a batch (experts), or blocks that count as matrices.

Called by methods that map whole matrices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: What ``split=`` is kept as: pairs of a dimension (0: rows, 1: columns) and a number of equal blocks or their sizes. Tuples of
#: integers alone: whatever saves a group can save them, and ``torch.load`` needs no class to read them.
Split = tuple[tuple[int, int | tuple[int, ...]], ...]


class Block(NamedTuple):
    """A rectangle of a matrix, or of each matrix of a batch."""

    row: int
    rows: int
    column: int
    columns: int

    @property
    def where(self) -> tuple[slice, slice, slice]:
        """Its place in a batch of matrices."""
        return slice(None), slice(self.row, self.row + self.rows), slice(self.column, self.column + self.columns)


class Matrices(NamedTuple):
    """How a tensor is seen: ``number`` matrices, and the sizes of the blocks that their rows and their columns are cut into."""

    number: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def blocks(self) -> Iterator[Block]:
        """The blocks of each matrix, row by row."""
        row = 0
        for rows in self.rows:
            column = 0
            for columns in self.columns:
                yield Block(row, rows, column, columns)
                column += columns
            row += rows

    @property
    def batch(self) -> tuple[int, int, int] | None:
        """The shape in which the tensor's elements, in their order, are a batch of all blocks; None where they are not one."""
        if len(self.columns) > 1 or len(set(self.rows)) > 1:
            return None
        return self.number * len(self.rows), self.rows[0], self.columns[0]


def seen(shape: Sequence[int], flatten: bool | None) -> tuple[int, int, int]:
    """The shape of a tensor, or of a rank's piece of it, as a batch of matrices: dimension 0 by all others (``flatten=True``), or
    the last two dimensions, the others counting matrices.
    """
    if flatten:
        return 1, shape[0], math.prod(shape[1:])
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def view(t: Tensor, flatten: bool | None) -> Tensor:
    """A tensor, or a piece of it, as a batch of matrices; a copy only where its strides leave no choice."""
    return t.reshape(seen(t.shape, flatten))


def normal_split(split: Any) -> Split | None:
    """``split=`` in the one form that groups keep. Raise for anything else than a number of blocks, their sizes, or a mapping of
    dimensions to either.
    """
    if split is None:
        return None
    if isinstance(split, Mapping):
        return _of_pairs(tuple(split.items()), split)
    if _is_sequence(split) and len(split) > 0 and all(_is_sequence(pair) for pair in split):
        return _of_pairs(tuple(split), split)
    return ((0, _cut(split, split)),)


def _of_pairs(pairs: tuple[Any, ...], split: Any) -> Split:
    if not pairs or not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"split must say how a dimension is cut, got {split!r}")
    dims = [_int(dim, split) for dim, _ in pairs]
    if len(set(dims)) < len(dims) or not set(dims) <= {0, 1}:
        raise ValueError(f"split must have the dimensions 0 (rows) and 1 (columns), each once at most, got {split!r}")
    return tuple(sorted((dim, _cut(cut, split)) for dim, (_, cut) in zip(dims, pairs, strict=True)))


def _cut(cut: Any, split: Any) -> int | tuple[int, ...]:
    """A number of equal blocks, or sizes."""
    if _is_sequence(cut):
        sizes = tuple(_int(size, split) for size in cut)
        if sizes and min(sizes) > 0:
            return sizes
    elif (number := _int(cut, split)) > 0:
        return number
    raise ValueError(f"split must be a number of blocks or their sizes, integers > 0, got {split!r}")


def _int(value: Any, split: Any) -> int:
    try:
        if not isinstance(value, bool):
            return int(value.__index__())
    except AttributeError:
        pass
    raise ValueError(
        f"split must be a number of blocks, a sequence of sizes, or a dict of dimension 0 or 1 to either, got {split!r}"
    )


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def check_flatten(flatten: Any) -> None:
    """Raise for a value that ``flatten=`` does not have."""
    if flatten is not None and not isinstance(flatten, bool):
        raise ValueError(f"flatten must be None, True or False, got {flatten!r}")


def is_matrices(dimensions: int, flatten: bool | None) -> bool:
    """True where a tensor of so many dimensions is a matrix, or is made one or several."""
    return dimensions == 2 or (dimensions > 2 and flatten is not None)


@functools.lru_cache(maxsize=4096)
def matrices_of(shape: tuple[int, ...], flatten: bool | None, split: Split | None, name: str) -> Matrices:
    """The matrices of a tensor of two dimensions or more, which errors call so. Raise where ``split`` does not fit."""
    count, rows, columns = seen(shape, flatten)
    cuts = dict(split or ())
    return Matrices(count, _sizes(rows, cuts.get(0, 1), 0, name), _sizes(columns, cuts.get(1, 1), 1, name))


def _sizes(size: int, cut: int | tuple[int, ...], dim: int, name: str) -> tuple[int, ...]:
    what = ("rows", "columns")[dim]
    if isinstance(cut, tuple):
        if sum(cut) != size:
            raise ValueError(
                f"split must have sizes along dimension {dim} that add up to the {size} {what} of {name}, got {cut}"
            )
        return cut
    if size % cut:
        raise ValueError(
            f"split must cut dimension {dim} of {name} into blocks of equal size, got {cut} blocks of {size} {what}"
        )
    return (size // cut,) * cut


def wide_of(t: Tensor) -> torch.dtype:
    """What matrices of such a parameter are mapped in, whatever its own dtype: float32 at least."""
    return torch.promote_types(t.dtype, torch.float32)
