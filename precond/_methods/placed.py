"""What ranks have of a parameter that is placed on a mesh: pieces of a batch of matrices, for any mix of shards and replicas.

Called by exchange.py and methods that map whole matrices.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .owners import Entry, Piece, Runs
from .units import Matrices, matrices_of


def is_sharded(p: Tensor) -> bool:
    """True for a DTensor of which a rank has a shard alone."""
    if type(p) in (Tensor, torch.nn.Parameter):  # nearly all; what has no such attribute takes long to say so
        return False
    return any(
        not placement.is_replicate() and p.device_mesh.size(dim) > 1  # type: ignore[attr-defined]
        for dim, placement in enumerate(getattr(p, "placements", ()))
    )


def check_placements(name: str, p: Tensor) -> None:
    """Raise for a parameter that is placed otherwise than in shards and replicas."""
    for placement in getattr(p, "placements", ()):
        if not (placement.is_replicate() or _is_shard(placement)):
            raise RuntimeError(f"{name} must be placed by Shard or Replicate, got {placement}")


def _is_shard(placement: Any) -> bool:
    return bool(placement.is_shard() or type(placement).__name__ == "_StridedShard")


def ranks_of(p: Tensor) -> tuple[int, ...]:
    """The ranks of a parameter's mesh, in order."""
    return _ranks_of_mesh(p.device_mesh)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def _ranks_of_mesh(mesh: Any) -> tuple[int, ...]:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def entry_of(key: str, name: str, p: Tensor, of: Matrices, flatten: bool | None, weight: float) -> Entry:
    """A DTensor parameter, which errors call ``name``, as its mesh has it; raise where this rank has another piece."""
    check_placements(name, p)
    mesh, placements, shape = p.device_mesh, tuple(p.placements), tuple(p.shape)  # type: ignore[attr-defined]
    expected, found = local_shape(shape, placements, mesh), tuple(p._local_tensor.shape)  # type: ignore[attr-defined]
    if found != expected:
        raise RuntimeError(f"{name} must have a local shape of {expected}, placed by {placements}, got {found}")
    pieces, replicas = spread_of(shape, placements, tuple(mesh.shape), _coordinates(mesh), flatten)
    placed = f"{placements} on a mesh of {tuple(mesh.shape)}"
    return Entry(key, shape, placed, of, pieces, replicas, weight)


def entry_at(key: str, shape: tuple[int, ...], placements: tuple[Any, ...], mesh: Any) -> Entry:
    """A tensor, as one matrix, as a mesh has it."""
    pieces, replicas = spread_of(shape, placements, tuple(mesh.shape), _coordinates(mesh), True)
    return Entry(key, shape, str(placements), matrices_of(shape, True, None, key), pieces, replicas)


def entry_with(key: str, shape: tuple[int, ...], rank: int, ranks: int) -> Entry:
    """A tensor, as one matrix, that one of the ranks has."""
    everything = piece_of(shape, [torch.arange(n) for n in shape], True)
    pieces = tuple(everything if other == rank else Piece((), (), ()) for other in range(ranks))
    return Entry(key, shape, f"on rank {rank}", matrices_of(shape, True, None, key), pieces, ((),) * ranks)


def local_shape(shape: tuple[int, ...], placements: tuple[Any, ...], mesh: Any) -> tuple[int, ...]:
    """What this rank has of such a tensor."""
    here = tuple(mesh.get_coordinate())
    return tuple(len(each) for each in indices_of(shape, placements, tuple(mesh.shape), here))


@functools.lru_cache(maxsize=256)
def _coordinates(mesh: Any) -> tuple[tuple[int, ...], ...]:
    """Those of each rank of a mesh, in order."""
    return tuple(tuple((mesh.mesh == rank).nonzero()[0].tolist()) for rank in _ranks_of_mesh(mesh))


@functools.lru_cache(maxsize=4096)
def spread_of(
    shape: tuple[int, ...],
    placements: tuple[Any, ...],
    mesh: tuple[int, ...],
    coordinates: tuple[tuple[int, ...], ...],
    flatten: bool | None,
) -> tuple[tuple[Piece, ...], tuple[tuple[int, ...], ...]]:
    """What the ranks at these coordinates of a mesh have of a tensor, and where they are among replicas."""
    pieces = tuple(piece_of(shape, indices_of(shape, placements, mesh, here), flatten) for here in coordinates)
    same = [dim for dim, placement in enumerate(placements) if placement.is_replicate()]
    return pieces, tuple(tuple(here[dim] for dim in same) for here in coordinates)


def indices_of(
    shape: tuple[int, ...], placements: Sequence[Any], mesh: tuple[int, ...], here: tuple[int, ...]
) -> list[Tensor]:
    """Which indices of each dimension the rank at these coordinates of a mesh has."""
    indices = [torch.arange(n) for n in shape]
    # Step by step, as distribute_tensor cuts: each dimension of the mesh what the one before has left.
    for placement, pieces, number in zip(placements, mesh, here, strict=True):
        if not placement.is_replicate():
            indices[placement.dim] = _cut(placement, indices[placement.dim], pieces, number)
    return indices


def piece_of(shape: tuple[int, ...], indices: Sequence[Tensor], flatten: bool | None) -> Piece:
    """What a rank has that has these indices of each dimension, in dimensions as in :func:`.units.seen`."""
    rows = 0 if flatten else len(shape) - 2
    cuts = (slice(None, rows), slice(rows, rows + 1), slice(rows + 1, None))
    return Piece(*(_runs(_flat(indices[cut], shape[cut])) for cut in cuts))


def _cut(placement: Any, indices: Tensor, pieces: int, number: int) -> Tensor:
    """One of so many pieces."""
    if type(placement).__name__ == "_StridedShard":
        along = type(placement)(0, split_factor=placement.split_factor)
        found: Tensor = along._split_tensor(indices, pieces, with_padding=False)[0][number]
        return found
    size = -(-len(indices) // pieces)  # as torch.chunk, which would make all of them
    return indices[number * size : (number + 1) * size]


def _flat(indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The indices of a product of dimensions, in one."""
    if len(indices) == 1:
        return indices[0]
    flat = torch.zeros(1, dtype=torch.int64)
    for each, size in zip(indices, sizes, strict=True):
        flat = (flat[:, None] * size + each[None, :]).reshape(-1)
    return flat


def _runs(indices: Tensor) -> Runs:
    if len(indices) == 0:
        return ()
    edges = [0, *((indices.diff() != 1).nonzero().flatten() + 1).tolist(), len(indices)]
    return tuple((int(indices[low]), high - low) for low, high in itertools.pairwise(edges))
