"""Brings matrices that ranks have shards of to one owner each, and what it makes of them back, in batched all-to-alls.

Called by methods that map whole matrices. Nobody gathers a matrix that it does not own: a shard's bytes travel once each way.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from .owners import Assigned, Entry, Part, Plan, Unit
from .placed import entry_of, ranks_of
from .units import Matrices

# What all ranks have.

_GROUPS: dict[tuple[int, ...], tuple[Any, Any]] = {}


def group_of(ranks: tuple[int, ...], meshes: Sequence[Any]) -> Any:
    """The process group of some ranks: all of them, a mesh's of one dimension, or one that is made once."""
    dist = torch.distributed
    world = dist.group.WORLD
    if len(ranks) == dist.get_world_size():
        return world
    flat = [mesh.get_group() for mesh in meshes if mesh.ndim == 1]
    # The same one on all ranks, whatever order their parameters have.
    flat = sorted(
        (group for group in flat if tuple(dist.get_process_group_ranks(group)) == ranks),
        key=lambda group: str(group.group_name),
    )
    if flat:
        return flat[0]
    made_in, group = _GROUPS.get(ranks, (None, None))
    if made_in is not world:
        group = dist.new_group(list(ranks), use_local_synchronization=True)
        _GROUPS[ranks] = (world, group)
    return group


def agree(entries: Sequence[Entry], error: str | None, group: Any, what: str) -> None:
    """Raise on all ranks of a group where one has an error, or where they do not have the same entries. What each tells is short,
    unless they differ: all know the mesh.
    """
    dist = torch.distributed
    spread = functools.cache(_digest)
    digest = _digest(*((e.key, e.shape, e.placed, e.of, e.weight, spread(e.pieces, e.replicas)) for e in entries))
    ranks = dist.get_process_group_ranks(group)
    told: list[Any] = [None] * len(ranks)
    dist.all_gather_object(told, (digest, error), group=group)
    for rank, (_, said) in zip(ranks, told, strict=True):
        if said is not None:
            raise RuntimeError(f"{said} (on rank {rank})")
    if all(other == told[0] for other in told):
        return
    tables: list[Any] = [None] * len(ranks)
    dist.all_gather_object(tables, {entry.key: (entry.shape, entry.placed, entry.of) for entry in entries}, group=group)
    for rank, table in zip(ranks, tables, strict=True):
        for key in sorted(tables[0].keys() | table.keys()):
            if tables[0].get(key) != table.get(key):
                raise RuntimeError(
                    f"{what} must have the same sharded matrices on all ranks of a mesh, by their names where all groups have "
                    f"them, else by their places, got for {key}: {_said(tables[0].get(key))} on rank {ranks[0]}, "
                    f"{_said(table.get(key))} on rank {rank}"
                )
    raise RuntimeError(f"{what} must have the same meshes on all ranks, got sharded matrices on meshes that differ")


def _digest(*values: Any) -> bytes:
    return hashlib.blake2b(repr(values).encode(), digest_size=16).digest()


def _said(entry: tuple[Any, ...] | None) -> str:
    if entry is None:
        return "none"
    shape, placed, of = entry
    return f"shape {shape} in blocks of {of.rows} by {of.columns}, placed by {placed}"


class Member(NamedTuple):
    """A sharded parameter that takes part in an exchange."""

    #: By which the ranks know it.
    key: str
    #: What errors call it.
    name: str
    p: Tensor
    group: dict[str, Any]
    of: Matrices
    #: How its dimensions are seen, as in :func:`.units.seen`.
    flatten: bool | None
    #: What units of one batch must have in common besides their shape.
    kind: int
    #: What its matrices are mapped in.
    dtype: torch.dtype
    #: As an entry's: the same on all ranks.
    weight: float = 1.0


def by_ranks(members: Iterable[Member]) -> list[tuple[list[Member], Any]]:
    """The members of each set of ranks, by their keys, and its process group; in the same order on all ranks."""
    alike: dict[tuple[int, ...], list[Member]] = {}
    for member in members:
        alike.setdefault(ranks_of(member.p), []).append(member)
    return [
        (sorted(own, key=lambda member: member.key), group_of(ranks, [m.p.device_mesh for m in own]))  # type: ignore[attr-defined]
        for ranks, own in sorted(alike.items(), key=lambda item: (len(item[0]), item[0]))
    ]


class Agreements:
    """What ranks have agreed on about their sharded parameters: an exchange for each set of ranks, dtype and kind of device.
    Parameters, their placements and their matrices decide, so that all ranks ask each other again at the same step. No parameter
    is kept alive.
    """

    def __init__(self, what: str) -> None:
        """``what``: the class that errors name."""
        self._what = what
        self._held: dict[tuple[tuple[int, ...], str], tuple[tuple[Any, ...], Exchange]] = {}

    def exchanges(self, members: Iterable[Member]) -> list[tuple[list[Member], Exchange]]:
        """The exchanges of a step, in the same order on all ranks, each with its parameters by their numbers. What is wrong on
        some ranks is told to the larger sets that agree at the same step: they would wait for them.
        """
        alike: dict[tuple[tuple[int, ...], str], list[Member]] = {}
        for member in members:
            alike.setdefault((ranks_of(member.p), f"{member.dtype} {member.p.device.type}"), []).append(member)
        self._held = {key: held for key, held in self._held.items() if key in alike}
        found, failure = [], None
        for key, own in sorted(alike.items(), key=lambda item: (len(item[0][0]), *item[0])):
            own.sort(key=lambda member: member.key)
            seen = tuple(
                (m.key, m.p.shape, m.p.placements, m.p.device_mesh, m.of, m.kind, m.weight)  # type: ignore[attr-defined]
                for m in own
            )
            if key not in self._held or self._held[key][0] != seen:
                try:
                    self._held[key] = seen, self._agree(key[0], own, failure)
                except RuntimeError as error:
                    failure = failure or error
                    continue
            found.append((own, self._held[key][1]))
        if failure is not None:
            raise failure
        return found

    def _agree(self, ranks: tuple[int, ...], own: list[Member], failure: RuntimeError | None) -> Exchange:
        group = group_of(ranks, [m.p.device_mesh for m in own])  # type: ignore[attr-defined]
        entries, error = [], None if failure is None else str(failure)
        try:
            entries = [entry_of(m.key, m.name, m.p, m.of, m.flatten, m.weight) for m in own]
        except Exception as wrong:  # whatever it is, the other ranks wait for ours
            error = str(wrong)
        agree(entries, error, group, self._what)
        return Exchange(Plan(entries, len(ranks), own[0].dtype.itemsize), group, {n: m.kind for n, m in enumerate(own)})


# A step.


class Buffer:
    """One all-to-all: the parts that go to each rank and come from each, in one buffer each way."""

    def __init__(self, sends: list[int], receives: list[int], travels: bool) -> None:
        """Elements to and from each rank, and whether any rank of the group sends something."""
        self.sends, self.receives, self.travels = sends, receives, travels

    def start(self, parts: list[Tensor], dtype: torch.dtype, device: torch.device, group: Any) -> Arrival | None:
        """Send parts, in the order of ranks and units."""
        if not self.travels:
            return None
        sent = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
        received = torch.empty(sum(self.receives), dtype=dtype, device=device)
        size = dtype.itemsize
        # Bytes, since gloo does not know every dtype.
        handle = torch.distributed.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [n * size for n in self.receives],
            [n * size for n in self.sends],
            group=group,
            async_op=True,
        )
        return Arrival(handle, received, sent)


class Arrival(NamedTuple):
    """What is on its way."""

    handle: Any
    received: Tensor
    #: Kept until it has been sent.
    sent: Tensor

    def wait(self) -> Tensor:
        """The elements, when they are there; a GPU's stream waits, not the host."""
        self.handle.wait()
        return self.received


#: Errors that have their kind on all ranks.
_KINDS: Final[dict[str, type[Exception]]] = {
    cls.__name__: cls
    for cls in (TypeError, ValueError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
}

#: Maps matrices: units and a batch of their matrices, which it may overwrite.
Work = Callable[[list[Unit], Tensor], Tensor]
#: Takes what a rank gets of a result: a unit, the slices of the local tensor, the values.
Put = Callable[[Unit, tuple[slice, ...], Tensor], None]


class Exchange:
    """Runs a plan's steps on one rank. ``bytes_sent`` counts what it has sent to other ranks."""

    def __init__(self, plan: Plan, group: Any, kinds: Mapping[int, object]) -> None:
        """``kinds``: of each parameter what units of one batch must have in common besides their shape."""
        self.plan, self.group, self.bytes_sent = plan, group, 0
        #: This rank's number in the group.
        self.me = torch.distributed.get_rank(group)
        self._kinds = kinds
        me = self.me
        self._resting = self._alike([a for a in plan.assigned if a.batch is None and a.owner == me])
        self._batches: list[list[Assigned]] = [[] for _ in range(plan.batches)]
        for a in plan.assigned:
            if a.batch is not None:
                self._batches[a.batch].append(a)
        #: Of each batch what this rank owns, in lists to be multiplied together.
        self._owned = [self._alike([a for a in batch if a.owner == me]) for batch in self._batches]
        # In the order of ranks, and of units for each: what goes to an owner, comes from a source, and the same of results.
        self._to = [
            _by_rank((a, a.owner) for a in batch if a.owner != me and me in a.sources) for batch in self._batches
        ]
        self._from = [
            _by_rank((a, rank) for a in batch if a.owner == me for rank in a.others(a.sources))
            for batch in self._batches
        ]
        self._back_to = [
            _by_rank((a, rank) for a in batch if a.owner == me for rank in a.others(tuple(a.holders)))
            for batch in self._batches
        ]
        self._back_from = [
            _by_rank((a, a.owner) for a in batch if a.owner != me and me in a.holders) for batch in self._batches
        ]
        self._gathers, self._returns = [], []
        for b, batch in enumerate(self._batches):
            sends = self._elements(self._to[b], lambda a, rank: a.holders[me].numel)
            receives = self._elements(self._from[b], lambda a, rank: a.holders[rank].numel)
            self._gathers.append(Buffer(sends, receives, any(a.others(a.sources) for a in batch)))
            sends = self._elements(self._back_to[b], lambda a, rank: a.holders[rank].numel)
            receives = self._elements(self._back_from[b], lambda a, rank: a.holders[me].numel)
            self._returns.append(Buffer(sends, receives, any(a.others(tuple(a.holders)) for a in batch)))

    def any(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """Which flags a rank has raised. The host waits for all ranks."""
        raised = torch.tensor(flags, dtype=torch.uint8, device=device)
        torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in raised.tolist()]

    def together(self, error: Exception | None, device: torch.device) -> Exception | None:
        """What all ranks raise where some have found something wrong: each its own error, else another's, of its kind. The host
        waits for all ranks.
        """
        return self.told(error) if self.any([error is not None], device)[0] else None

    def told(self, error: Exception | None) -> Exception:
        """The same, where all ranks know that one has an error."""
        said: list[Any] = [None] * self.plan.ranks
        own = None if error is None else (type(error).__name__, str(error))
        torch.distributed.all_gather_object(said, own, group=self.group)
        if error is not None:
            return error
        rank, (kind, what) = next((rank, what) for rank, what in enumerate(said) if what is not None)
        return _KINDS.get(kind, RuntimeError)(f"{what} (on rank {rank})")

    def _elements(self, parts: list[tuple[Assigned, int]], of: Callable[[Assigned, int], int]) -> list[int]:
        counts = [0] * self.plan.ranks
        for a, rank in parts:
            counts[rank] += of(a, rank)
        return counts

    def _alike(self, owned: list[Assigned]) -> list[list[Assigned]]:
        alike: dict[tuple[Any, ...], list[Assigned]] = {}
        for a in owned:
            alike.setdefault((self._kinds[a.unit.param], a.unit.shape[1:]), []).append(a)
        return list(alike.values())

    def run(
        self,
        piece_of: Callable[[int], Tensor | None],
        work: Work,
        put: Put,
        dtype: torch.dtype,
        device: torch.device,
        *,
        result: torch.dtype | None = None,
        meanwhile: Callable[[], None] | None = None,
        later: Callable[[], None] | None = None,
    ) -> None:
        """One step. ``piece_of``: what this rank has of a parameter, as a batch of matrices; None counts as zeros. Every rank
        takes part with all of its parameters at every step, so none waits for another. ``dtype``: that of pieces; results have
        ``result``, else the same. ``meanwhile``: other work of the step, done while the first batch is on its way; ``later``: of
        each batch, done when its results are on theirs.
        """
        pieces, result = _Pieces(piece_of, dtype, device), dtype if result is None else result
        gathers: dict[int, Arrival | None] = {}
        returns: dict[int, Arrival | None] = {}
        for b in range(min(1, self.plan.batches)):
            gathers[b] = self._gather(b, pieces)
        if meanwhile is not None:
            meanwhile()
        for alike in self._resting:
            # Without a gradient here nobody has one.
            self._map([a for a in alike if pieces.whole(a.unit.param) is not None], pieces, {}, work, put)
        if later is not None and self._resting:
            later()
        for b in range(self.plan.batches):
            if b + 1 < self.plan.batches:
                gathers[b + 1] = self._gather(b + 1, pieces)
            arrived = self._parts(gathers.pop(b), self._from[b], lambda a, rank: a.holders[rank])
            results: dict[int, Tensor] = {}
            for alike in self._owned[b]:
                results.update(self._map(alike, pieces, arrived, work, put))
            parts = [taken(results[id(a)], a.holders[rank]) for a, rank in self._back_to[b]]
            returns[b] = self._start(self._returns[b], parts, result, device)
            if later is not None:
                later()
            if b > 0:
                self._finish(b - 1, returns.pop(b - 1), put)
        for b, arrival in returns.items():
            self._finish(b, arrival, put)

    def collect(
        self,
        piece_of: Callable[[int], Tensor | None],
        take: Callable[[Unit, Tensor], None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """The way there alone: each owner takes what ranks have of its units."""
        pieces, arrivals = _Pieces(piece_of, dtype, device), {}
        for a in (a for alike in self._resting for a in alike):
            take(a.unit, self._whole([a], pieces, {}))
        for b in range(self.plan.batches + 1):
            if b < self.plan.batches:
                arrivals[b] = self._gather(b, pieces)
            if b > 0:
                arrived = self._parts(arrivals.pop(b - 1), self._from[b - 1], lambda a, rank: a.holders[rank])
                for a in (a for alike in self._owned[b - 1] for a in alike):
                    take(a.unit, self._whole([a], pieces, arrived))

    def hand_out(self, whole_of: Callable[[Unit], Tensor], put: Put, dtype: torch.dtype, device: torch.device) -> None:
        """The way back alone: each rank gets its parts of what owners have."""
        returns: dict[int, Arrival | None] = {}
        for a in (a for alike in self._resting for a in alike):
            self._put_own(a, whole_of(a.unit), put)
        for b in range(self.plan.batches):
            results = {id(a): whole_of(a.unit) for alike in self._owned[b] for a in alike}
            for a in (a for alike in self._owned[b] for a in alike):
                self._put_own(a, results[id(a)], put)
            parts = [taken(results[id(a)], a.holders[rank]) for a, rank in self._back_to[b]]
            returns[b] = self._start(self._returns[b], parts, dtype, device)
            if b > 0:
                self._finish(b - 1, returns.pop(b - 1), put)
        for b, arrival in returns.items():
            self._finish(b, arrival, put)

    def _finish(self, b: int, arrival: Arrival | None, put: Put) -> None:
        back = self._parts(arrival, self._back_from[b], lambda a, rank: a.holders[self.me])
        for a, rank in self._back_from[b]:
            put(a.unit, a.holders[self.me].here, back[id(a), rank])

    def _gather(self, b: int, pieces: _Pieces) -> Arrival | None:
        parts = [pieces.of(a.unit.param, a.holders[self.me]).reshape(-1) for a, _ in self._to[b]]
        return self._start(self._gathers[b], parts, pieces.dtype, pieces.device)

    def _start(self, buffer: Buffer, parts: list[Tensor], dtype: torch.dtype, device: torch.device) -> Arrival | None:
        self.bytes_sent += sum(buffer.sends) * dtype.itemsize
        return buffer.start(parts, dtype, device, self.group)

    def _parts(
        self, arrival: Arrival | None, order: list[tuple[Assigned, int]], part_of: Callable[[Assigned, int], Part]
    ) -> dict[tuple[int, int], Tensor]:
        """What has come, by unit and rank."""
        if arrival is None:
            return {}
        found = torch.split(arrival.wait(), [part_of(a, rank).numel for a, rank in order]) if order else ()
        return {(id(a), rank): each.view(part_of(a, rank).shape) for (a, rank), each in zip(order, found, strict=True)}

    def _map(
        self,
        alike: list[Assigned],
        pieces: _Pieces,
        arrived: dict[tuple[int, int], Tensor],
        work: Work,
        put: Put,
    ) -> dict[int, Tensor]:
        """Put matrices of one shape together, map them, and take what is this rank's own of the results. Returns all of them."""
        if not alike:
            return {}
        units = [a.unit for a in alike]
        stack = self._whole(alike, pieces, arrived)
        mapped = torch.split(work(units, stack), [unit.number for unit in units])
        results = {id(a): each for a, each in zip(alike, mapped, strict=True)}
        for a in alike:
            self._put_own(a, results[id(a)], put)
        return results

    def _put_own(self, a: Assigned, whole: Tensor, put: Put) -> None:
        if self.me in a.holders:
            part = a.holders[self.me]
            put(a.unit, part.here, taken(whole, part).view(part.shape))

    def _whole(self, alike: list[Assigned], pieces: _Pieces, arrived: dict[tuple[int, int], Tensor]) -> Tensor:
        parts = [[(a.holders[rank], arrived.get((id(a), rank))) for rank in a.sources] for a in alike]
        if len(alike) == 1 and len(parts[0]) == 1:  # all of it is in one place
            ((part, each),) = parts[0]
            if all(len(runs) == 1 for runs in part.at):
                return pieces.of(alike[0].unit.param, part) if each is None else each
        count = sum(a.unit.number for a in alike)
        stack = torch.empty(count, *alike[0].unit.shape[1:], dtype=pieces.dtype, device=pieces.device)
        for a, whole, of in zip(alike, torch.split(stack, [a.unit.number for a in alike]), parts, strict=True):
            for part, each in of:
                values = pieces.of(a.unit.param, part) if each is None else each
                for here, there in part.regions():
                    whole[there].copy_(values[here])
        return stack


def _by_rank(parts: Iterable[tuple[Assigned, int]]) -> list[tuple[Assigned, int]]:
    """Units and ranks, by ranks; of each in the order of its batch."""
    return sorted(parts, key=lambda part: part[1])


class _Pieces:
    """This rank's pieces, asked for once each."""

    def __init__(self, piece_of: Callable[[int], Tensor | None], dtype: torch.dtype, device: torch.device) -> None:
        self._piece_of, self.dtype, self.device = piece_of, dtype, device
        self._found: dict[int, Tensor | None] = {}

    def whole(self, param: int) -> Tensor | None:
        """One."""
        if param not in self._found:
            self._found[param] = self._piece_of(param)
        return self._found[param]

    def of(self, param: int, part: Part) -> Tensor:
        """A part of one."""
        piece = self.whole(param)
        if piece is None:
            return torch.zeros(part.shape, dtype=self.dtype, device=self.device)
        return piece[part.here]


def taken(whole: Tensor, part: Part) -> Tensor:
    """What a part takes of a unit's result, without dimensions."""
    regions = list(part.regions())
    if len(regions) == 1:
        return whole[regions[0][1]].reshape(-1)
    values = torch.empty(part.shape, dtype=whole.dtype, device=whole.device)
    for here, there in regions:
        values[here] = whole[there]
    return values.reshape(-1)


#: What ranks have agreed on for a step.
Exchanges = list[tuple[list[Member], Exchange]]
