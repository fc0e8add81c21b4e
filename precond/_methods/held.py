"""States of whole matrices, which only the owner of a sharded parameter holds: how they come to it, and into checkpoints.

Called by methods whose states belong to whole matrices. In memory a state is whole with the owner, and the other ranks know its
name. A checkpoint has it as a DTensor on the parameter's mesh, so that ``torch.distributed.checkpoint`` reshards it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.sharding import like, local
from .exchange import Exchange, Member
from .owners import Entry, Plan, Unit
from .placed import entry_at, entry_with, local_shape, ranks_of
from .units import view

State = dict[str, Any]

#: True for the name of a state that the owner of a matrix holds. What else a parameter has, every rank has itself: of its own
#: shard, or the same everywhere.
IsHeld = Callable[[str], bool]

#: How a rank has a state.
WHOLE, SHARDED, NUMBER = "whole", "in shards", "as a number"


class Said(NamedTuple):
    """What a rank says of a state of which it has more than the name."""

    how: str
    #: The number itself, or the shape of the whole.
    value: Any
    dtype: torch.dtype = torch.float32
    placed: str = ""


def held_of(state: State, is_held: IsHeld) -> State:
    """What the owner works with: the states that it holds, and what counts its steps and names its random bits."""
    return {name: value for name, value in state.items() if is_held(name) or name in ("step", "key")}


def out_of_place(state: State, mine: bool, is_held: IsHeld) -> bool:
    """True where a rank has what it should not have, as after a checkpoint was loaded, or lacks what it should."""
    for name, value in state.items():
        if not is_held(name):
            continue
        if not isinstance(value, Tensor):
            if not mine:
                return True
        elif hasattr(value, "placements") or (value.numel() > 0) != mine:
            return True
    return False


def name_alone(p: Tensor) -> Tensor:
    """What stands for a state that another rank holds."""
    return torch.empty(0, device=local(p).device)


def tell_names(members: Sequence[Member], states: Sequence[State], group: Any, is_held: IsHeld) -> None:
    """Let all ranks know the names of states that owners have now: checkpoints are loaded by the names that are there."""
    own = {
        m.key: [name for name, value in state.items() if is_held(name) and not _is_name_alone(value)]
        for m, state in zip(members, states, strict=True)
    }
    told = _gathered(own, group)
    for member, state in zip(members, states, strict=True):
        names = dict.fromkeys(name for said in told for name in said.get(member.key, ()))
        gone = [name for name, value in state.items() if is_held(name) and _is_name_alone(value) and name not in names]
        for name in gone:
            del state[name]
        state.update({name: name_alone(member.p) for name in names if name not in state})


def _is_name_alone(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 0 and not hasattr(value, "placements")


def take(members: Sequence[Member], states: Sequence[State], exchange: Exchange, is_held: IsHeld) -> None:
    """Bring states to the owners, from wherever they are: shards of a checkpoint, another owner, or everywhere. All ranks of the
    exchange call it; what is wrong raises on all, and nothing has changed.
    """
    told, me = _told(members, states, exchange.group, is_held), exchange.me
    owners = {a.unit.param: a.owner for a in exchange.plan.assigned}
    finally_there: list[State] = []
    moves: list[_Move] = []
    for number, (member, state) in enumerate(zip(members, states, strict=True)):
        new = {name: value for name, value in state.items() if not is_held(name)}
        finally_there.append(new)
        for name in dict.fromkeys(name for table in told for name in table[member.key] if is_held(name)):
            says = {rank: table[member.key][name] for rank, table in enumerate(told) if name in table[member.key]}
            move = _Move(number, name, says, owners[number], member, state.get(name))
            if move.entry is not None:
                moves.append(move)
            new[name] = move.resting if me == move.owner else name_alone(member.p)
    for alike, carrier in _carriers(moves, exchange.group):

        def keep(unit: Unit, stack: Tensor, alike: list[_Move] = alike) -> None:
            move = alike[unit.param]
            finally_there[move.number][move.name] = stack.reshape(move.shape).clone()

        def piece_of(n: int, alike: list[_Move] = alike) -> Tensor | None:
            return alike[n].piece

        carrier.collect(piece_of, keep, alike[0].dtype, alike[0].device)
    for state, new in zip(states, finally_there, strict=True):
        state.clear()
        state.update(new)


def hand_out(members: Sequence[Member], states: Sequence[State], group: Any, is_held: IsHeld) -> list[State | None]:
    """The states of parameters as checkpoints have them; None for a parameter whose states are nowhere whole. All ranks of the
    group call it.
    """
    told = _told(members, states, group, is_held)
    found: list[State | None] = []
    moves: list[_Move] = []
    for number, (member, state) in enumerate(zip(members, states, strict=True)):
        owner = next(
            (r for r, table in enumerate(told) if any(s.how == WHOLE for s in table[member.key].values())), None
        )
        if owner is None:
            found.append(None)
            continue
        made: State = {name: value for name, value in state.items() if not is_held(name)}
        found.append(made)
        for name, said in told[owner][member.key].items():
            if said.how == NUMBER:
                made[name] = said.value
            else:
                moves.append(_Move(number, name, {owner: said}, owner, member, state.get(name), cut=True))
                made[name] = moves[-1].made
    for alike, carrier in _carriers(moves, group):

        def put(unit: Unit, where: tuple[slice, ...], values: Tensor, alike: list[_Move] = alike) -> None:
            view(local(alike[unit.param].made), True)[where].copy_(values)

        def whole_of(unit: Unit, alike: list[_Move] = alike) -> Tensor:
            return alike[unit.param].whole

        carrier.hand_out(whole_of, put, alike[0].dtype, alike[0].device)
    return found


def placements_of(p: Tensor, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """How a checkpoint has a state of this shape: as the parameter, or cut along its own dimensions where that is cut at all."""
    from torch.distributed.tensor import Replicate, Shard

    placements: tuple[Any, ...] = tuple(p.placements)  # type: ignore[attr-defined]
    if shape == tuple(p.shape):
        return placements
    dims = iter(range(len(shape)))
    cut = ((None if placement.is_replicate() else next(dims, None)) for placement in placements)
    return tuple(Replicate() if dim is None else Shard(dim) for dim in cut)


class _Move:
    """A state on its way, between shards and the whole of it on one rank."""

    def __init__(
        self,
        number: int,
        name: str,
        says: dict[int, Said],
        owner: int,
        member: Member,
        value: Any,
        *,
        cut: bool = False,
    ) -> None:
        """``number``: of its parameter. ``says``: of the ranks that have it. ``value``: what this rank has. ``cut``: the owner's
        is cut for a checkpoint; otherwise it comes to the owner, unless that has it.
        """
        self.number, self.name, self.owner, self.value = number, name, owner, value
        said = says.get(owner) or says[min(says)]
        whole = [rank for rank, each in says.items() if each.how == WHOLE]
        said = says[whole[0]] if whole and owner not in whole else said
        key = f"{name} of {member.name}"
        self.dtype, self.device = said.dtype, local(member.p).device
        #: Where it does not travel: what its owner has of it.
        self.resting = value if said.how != NUMBER else said.value
        self.entry: Entry | None = None
        if said.how == NUMBER:
            return
        self.shape = torch.Size(said.value)
        mesh = member.p.device_mesh  # type: ignore[attr-defined]
        ranks = len(ranks_of(member.p))
        if cut:
            placements = placements_of(member.p, said.value)
            shape = local_shape(said.value, placements, mesh)
            self.made = like(member.p, torch.empty(shape, dtype=self.dtype, device=self.device), self.shape, placements)
            self.entry = entry_at(key, said.value, placements, mesh)
        elif whole and owner not in whole:
            self.entry = entry_with(key, said.value, whole[0], ranks)
        elif not whole:
            if any(says.get(rank) != said for rank in range(ranks)):
                found = {rank: (each.how, each.value, each.placed) for rank, each in says.items()}
                raise RuntimeError(f"{key} must be loaded on all {ranks} ranks in shards of one tensor, got {found}")
            placements = tuple(value.placements)
            if value.device_mesh != mesh:
                raise RuntimeError(
                    f"{key} must be loaded on the mesh of its parameter, {mesh}, got {value.device_mesh}"
                )
            self.entry = entry_at(key, said.value, placements, mesh)

    @property
    def piece(self) -> Tensor | None:
        """What this rank has of it, as one matrix."""
        if not isinstance(self.value, Tensor) or _is_name_alone(self.value):
            return None
        return view(local(self.value), True)

    @property
    def whole(self) -> Tensor:
        """All of it, as one matrix."""
        return view(self.value, True)


def _carriers(moves: Sequence[_Move], group: Any) -> Iterator[tuple[list[_Move], Exchange]]:
    """An exchange for those of each dtype."""
    alike: dict[str, list[_Move]] = {}
    for move in moves:
        alike.setdefault(str(move.dtype), []).append(move)
    for _, own in sorted(alike.items()):
        entries = [move.entry for move in own if move.entry is not None]
        plan = Plan(
            entries, torch.distributed.get_world_size(group), own[0].dtype.itemsize, [move.owner for move in own]
        )
        yield own, Exchange(plan, group, dict(enumerate(range(len(own)))))


def _told(
    members: Sequence[Member], states: Sequence[State], group: Any, is_held: IsHeld
) -> list[dict[str, dict[str, Said]]]:
    """What each rank says of each state of each parameter that owners hold, and of what names its random bits."""
    own = {
        m.key: {
            name: said
            for name, value in state.items()
            if (is_held(name) or name == "key") and (said := _said(value)) is not None
        }
        for m, state in zip(members, states, strict=True)
    }
    return _gathered(own, group)


def _said(value: Any) -> Said | None:
    if not isinstance(value, Tensor):
        return Said(NUMBER, value)
    if hasattr(value, "placements"):
        return Said(SHARDED, tuple(value.shape), value.dtype, str(tuple(value.placements)))
    return Said(WHOLE, tuple(value.shape), value.dtype) if value.numel() else None


def _gathered(own: Any, group: Any) -> list[Any]:
    told = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(told, own, group=group)
    return told
