"""Who maps which of the matrices that ranks have shards of, and in which batch they travel: the same on all ranks, from what each
has. No process group is asked here, so that a plan for any number of ranks can be made on one.

Called by exchange.py, which runs the plan.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from .units import Block, Matrices

#: So many bytes of matrices per owner travel together: a quarter of what it owns, so that products hide all but the first gather
#: and the last return, within bounds. Less is not worth a collective; more only takes memory.
BATCHES, SMALLEST_BATCH, LARGEST_BATCH = 4, 1 << 20, 128 << 20

T = TypeVar("T")

#: Stretches of indices of a dimension, (first, number), in the order in which a local tensor has them.
Runs = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """What a rank has of a tensor that is a batch of matrices: those indices of each dimension."""

    counts: Runs
    rows: Runs
    columns: Runs


class Entry(NamedTuple):
    """A parameter and what ranks have of it."""

    #: Its name, or its place.
    key: str
    shape: tuple[int, ...]
    #: How it is placed, as text: to compare, and for errors.
    placed: str
    of: Matrices
    #: Of each rank.
    pieces: tuple[Piece, ...]
    #: Of each rank its coordinates on those dimensions of the mesh on which the parameter is replicated.
    replicas: tuple[tuple[int, ...], ...]
    #: How much a matrix of m by n costs, as a multiple of m^2 (2 n + m).
    weight: float = 1.0


class Part(NamedTuple):
    """What a rank has of a unit: the slices of its local tensor, and where they lie in the unit."""

    local: tuple[tuple[int, int], ...]
    at: tuple[Runs, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the local slices."""
        return tuple(size for _, size in self.local)

    @property
    def numel(self) -> int:
        """Their elements."""
        return math.prod(self.shape)

    @property
    def here(self) -> tuple[slice, ...]:
        """The slices of the local tensor."""
        return tuple(slice(start, start + size) for start, size in self.local)

    def regions(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Slices of the part, and those of the unit where they lie."""

        def along(runs: Runs) -> Iterator[tuple[slice, slice]]:
            done = 0
            for start, size in runs:
                yield slice(done, done + size), slice(start, start + size)
                done += size

        for e in along(self.at[0]):
            for r in along(self.at[1]):
                for c in along(self.at[2]):
                    yield (e[0], r[0], c[0]), (e[1], r[1], c[1])


class Unit(NamedTuple):
    """Matrices that one owner maps: one, or several of a batch that a rank has whole."""

    #: The number of the parameter.
    param: int
    first: int
    number: int
    block: Block

    @property
    def shape(self) -> tuple[int, int, int]:
        """As a batch."""
        return self.number, self.block.rows, self.block.columns


@dataclasses.dataclass
class Assigned:
    """A unit with its owner, and the ranks that have parts of it."""

    unit: Unit
    cost: float
    #: Each rank that has a part; results go to all of them.
    holders: dict[int, Part]
    owner: int = -1
    #: Those whose parts make the unit: of replicas the owner's own.
    sources: tuple[int, ...] = ()
    #: The batch that it travels with; None where only its owner has of it.
    batch: int | None = None

    def others(self, ranks: Sequence[int]) -> list[int]:
        """Those of some ranks that are not the owner."""
        return [rank for rank in ranks if rank != self.owner]


class Plan:
    """Who maps what, and when it travels. A function of what all ranks have, so all ranks make the same."""

    def __init__(
        self, entries: Sequence[Entry], ranks: int, itemsize: int = 2, owners: Sequence[int] | None = None
    ) -> None:
        """``entries``: in the same order on all ranks. ``itemsize``: bytes of an element on its way. ``owners``: of each entry,
        where they are known already.
        """
        self.entries, self.ranks, self.itemsize = entries, ranks, itemsize
        holders = _Alike()
        self.assigned = [found for number, entry in enumerate(entries) for found in _units(number, entry, holders)]
        #: What each rank has to do.
        self.costs = self._choose_owners() if owners is None else self._take_owners(owners)
        self._choose_sources()
        self.batches = self._choose_batches()

    def _choose_owners(self) -> list[float]:
        """Largest first, to the rank with the least to do: of those that have all of it, where there are some. Returns what each
        has to do.
        """
        loads = [0.0] * self.ranks
        sizes = _once(lambda holders: {rank: part.numel for rank, part in holders.items()})
        whole = {
            id(a): [rank for rank, size in sizes(a.holders).items() if size == math.prod(a.unit.shape)]
            for a in self.assigned
        }
        order = sorted(self.assigned, key=lambda a: (not whole[id(a)], -a.cost, a.unit))
        for a in order:
            among, has = whole[id(a)], sizes(a.holders)
            if not among:
                # The only ones that can come first. All ranks for each of tens of thousands of experts would take minutes.
                least = min(loads)
                among = [rank for rank in has if loads[rank] == least] or [loads.index(least)]
            a.owner = min(among, key=lambda rank: (loads[rank], -has.get(rank, 0), rank))
            loads[a.owner] += a.cost
        return loads

    def _take_owners(self, owners: Sequence[int]) -> list[float]:
        loads = [0.0] * self.ranks
        for a in self.assigned:
            a.owner = owners[a.unit.param]
            loads[a.owner] += a.cost
        return loads

    def _choose_sources(self) -> None:
        """The owner's own part, those of its replica, then whichever there are."""
        several = _once(lambda holders: len({part.at for part in holders.values()}) < len(holders))
        sizes = _once(lambda holders: sum(part.numel for part in holders.values()))
        for a in self.assigned:
            entry = self.entries[a.unit.param]
            if several(a.holders):
                replicas = entry.replicas
                order = [(rank != a.owner, replicas[rank] != replicas[a.owner], rank) for rank in a.holders]
                best: dict[tuple[Runs, ...], int] = {}
                for *_, rank in sorted(order):
                    best.setdefault(a.holders[rank].at, rank)
                a.sources = tuple(sorted(best.values()))
                found = sum(a.holders[rank].numel for rank in a.sources)
            else:
                a.sources, found = tuple(sorted(a.holders)), sizes(a.holders)
            if found != math.prod(a.unit.shape):
                raise RuntimeError(
                    f"shards of {entry.key} must make up its shape {entry.shape} once, "
                    f"got {found} of {math.prod(a.unit.shape)} elements of {a.unit}, placed as {entry.placed}"
                )

    def _choose_batches(self) -> int:
        """Number the batches; returns how many there are. Costly units come first on all owners, so that what travels together
        takes its owners about the same time; units of one shape follow each other, to be multiplied together.
        """
        travelling: list[list[Assigned]] = [[] for _ in range(self.ranks)]
        for a in self.assigned:
            if a.others(a.sources) or a.others(tuple(a.holders)):
                travelling[a.owner].append(a)
        sizes = [sum(self._bytes(a) for a in own) for own in travelling]
        limit = min(max(-(-max(sizes, default=0) // BATCHES), SMALLEST_BATCH), LARGEST_BATCH)
        batches = 0
        for own in travelling:
            batch, filled = -1, limit
            for a in sorted(own, key=lambda a: (-a.cost, a.unit.shape, a.unit)):
                if filled >= limit:
                    batch, filled = batch + 1, 0
                a.batch = batch
                filled += self._bytes(a)
            batches = max(batches, batch + 1)
        return batches

    def _bytes(self, a: Assigned) -> int:
        return math.prod(a.unit.shape) * self.itemsize

    def sent(self) -> list[tuple[int, int]]:
        """Of each rank the bytes that it sends in a step: of its shards, and of results."""
        there, back = [0] * self.ranks, [0] * self.ranks
        for a in self.assigned:
            for rank in a.others(a.sources):
                there[rank] += a.holders[rank].numel * self.itemsize
            back[a.owner] += sum(a.holders[rank].numel for rank in a.others(tuple(a.holders))) * self.itemsize
        return list(zip(there, back, strict=True))


#: From the pieces of all ranks and the stretches of a unit, the parts of those that have some.
Holders = Callable[[tuple[Piece, ...], tuple[tuple[int, int], ...]], dict[int, Part]]


def _units(number: int, entry: Entry, holders_of: Holders) -> Iterator[Assigned]:
    """The units of a parameter: each block of each matrix; of those of a batch that a rank has whole all that it has."""
    of = entry.of
    different = set(entry.pieces)
    edges = {0, of.number} | {edge for p in different for start, n in p.counts for edge in (start, start + n)}
    for block in of.blocks():
        if block.rows == 0 or block.columns == 0:
            continue
        short, long = sorted((block.rows, block.columns))
        cost = entry.weight * short * short * (2.0 * long + short)
        sides = ((block.row, block.rows), (block.column, block.columns))
        for first, last in itertools.pairwise(sorted(edges)):
            unit = Unit(number, first, last - first, block)
            holders = holders_of(entry.pieces, ((first, unit.number), *sides))
            if unit.number == 1 or any(part.numel == math.prod(unit.shape) for part in holders.values()):
                yield Assigned(unit, cost * unit.number, holders)
                continue
            for e in range(first, last):
                yield Assigned(Unit(number, e, 1, block), cost, holders_of(entry.pieces, ((e, 1), *sides)))


class _Alike:
    """The layers of a model are alike: what ranks have of a unit is found once for all of them."""

    def __init__(self) -> None:
        #: By the identity of the pieces, which entries keep alive: a thousand ranks' take long to compare.
        self._found: dict[tuple[int, tuple[tuple[int, int], ...]], dict[int, Part]] = {}
        self._ranks_with: dict[int, dict[Runs, list[int]]] = {}

    def __call__(self, pieces: tuple[Piece, ...], wanted: tuple[tuple[int, int], ...]) -> dict[int, Part]:
        key = id(pieces), wanted
        if key not in self._found:
            self._found[key] = self._holders(pieces, wanted)
        return self._found[key]

    def _holders(self, pieces: tuple[Piece, ...], wanted: tuple[tuple[int, int], ...]) -> dict[int, Part]:
        ranks_with = self._ranks_with.get(id(pieces))
        if ranks_with is None:
            ranks_with = self._ranks_with[id(pieces)] = {}
            for rank, piece in enumerate(pieces):
                ranks_with.setdefault(piece.counts, []).append(rank)
        start, size = wanted[0]
        near = sorted(
            rank
            for counts, ranks in ranks_with.items()
            if any(run < start + size and start < run + length for run, length in counts)
            for rank in ranks
        )
        parts = {piece: _part(piece, wanted) for piece in {pieces[rank] for rank in near}}  # replicas have the same
        return {rank: part for rank in near if (part := parts[pieces[rank]]) is not None}


def _once(of: Callable[[dict[int, Part]], T]) -> Callable[[dict[int, Part]], T]:
    """Something about the parts of a unit's holders, asked for once where units share them."""
    found: dict[int, T] = {}

    def asked(holders: dict[int, Part]) -> T:
        if id(holders) not in found:
            found[id(holders)] = of(holders)
        return found[id(holders)]

    return asked


def _part(piece: Piece, wanted: tuple[tuple[int, int], ...]) -> Part | None:
    local, at = [], []
    for runs, (start, size) in zip(piece, wanted, strict=True):
        done = first = 0
        found: list[tuple[int, int]] = []
        for run, length in runs:
            low, high = max(run, start), min(run + length, start + size)
            if low < high:
                if not found:
                    first = done + low - run
                found.append((low - start, high - low))
            done += length
        if not found:
            return None
        local.append((first, sum(length for _, length in found)))
        at.append(tuple(found))
    return Part(tuple(local), tuple(at))
