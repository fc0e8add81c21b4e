"""The part of a rotated step that ranks take together: an owner steps its matrices whole, on what all ranks have of their
gradients, and each rank moves its shards along the result.

Called by rotated.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._core import parts
from .._core.clipping import Begun
from .._core.counters import check_one, make_counter, next_step
from .._core.rows import Row
from .._core.sharding import local
from .._core.states import ParamStates
from .exchange import Exchange, Member
from .held import State, held_of, out_of_place, take, tell_names
from .kronecker import Rotation
from .newton_schulz import ALIGNED
from .owners import Plan, Unit
from .placed import entry_of
from .units import view

#: Why a rank cannot say what a parameter on shards is multiplied with.
HELD = "its basis is with the rank that owns its matrix"


class Work(NamedTuple):
    """A parameter, or what stands for one that has an owner, its gradient and its basis."""

    name: str
    p: Tensor
    g: Tensor
    basis: Rotation
    #: The values of a parameter that p stands for, where the step reads them.
    weights: Tensor | None = None


class Method(Protocol):
    """What a rotated method does with whole matrices, under the tensors that stand for their parameters."""

    state: Any

    @property
    def states(self) -> ParamStates:
        """What makes states."""

    def is_held(self, name: str) -> bool:
        """True for the name of a state that belongs to a whole matrix."""

    def stand_in(self, p: Tensor) -> Tensor:
        """What stands for a parameter."""

    def basis_of(self, name: str, p: Tensor, state: State, group: dict[str, Any]) -> Rotation:
        """The basis that a group gives a parameter with these states."""

    def check_held(self, name: str, whole: Tensor, state: State) -> None:
        """Raise where an owner has states that do not fit."""

    def moves(self, basis: Rotation) -> bool:
        """True where a parameter with such a basis moves in this step."""

    def changes_states(self, basis: Rotation, state: State) -> bool:
        """True where a step may make states, or drop some."""

    def make_states(self, group: dict[str, Any], row: Row, work: list[Work]) -> None:
        """Make what a checkpoint can be loaded into."""

    def directed(
        self, of: Hashable, group: dict[str, Any], row: Row, work: list[Work]
    ) -> tuple[list[Work], list[Tensor]]:
        """The parameters that move, and what along."""

    def after(self, work: list[Work], group: dict[str, Any]) -> None:
        """What is done when they have moved."""

    def decays_coordinates(self, group: dict[str, Any]) -> bool:
        """True where a decay takes the parameter's coordinates in the basis."""

    def direction_of(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Where this rank's shard of a direction goes."""


class Share:
    """The matrices that the ranks of one exchange have shards of, in one step, or in one update of what a step reads."""

    def __init__(
        self,
        optimizer: Method,
        members: list[Member],
        exchange: Exchange,
        rows: dict[int, Row],
        given: dict[Tensor, Tensor],
    ) -> None:
        """``rows``: of the groups, by their numbers, without parts. ``given``: the gradients that this rank has, or what stands
        for them.
        """
        self._optimizer, self.members, self._exchange, self._rows = optimizer, members, exchange, rows
        self._given = given
        #: What matrices are mapped in.
        self.dtype, self._device = members[0].dtype, local(members[0].p).device
        self._states: list[State] = [optimizer.state.get(m.p, {}) for m in members]
        self._owners = {a.unit.param: a.owner for a in exchange.plan.assigned}
        self._mine = [self._owners[i] == exchange.me for i in range(len(members))]
        #: Of matrices that this rank owns.
        self._work: dict[int, Work] = {}
        self._held: dict[int, State] = {}
        self._weights: dict[int, Tensor] = {}
        self._later: list[Callable[[], None]] = []
        #: What was wrong with this owner's work: the others wait for its results, so they come all the same.
        self._error: Exception | None = None

    # What all ranks must know.

    def agree(
        self,
        busy: bool,
        error: Exception | None,
        is_ready: Callable[[dict[str, Any], State, Rotation], bool],
        not_ready: Callable[[str, dict[str, Any]], Exception],
    ) -> Exception | None:
        """Find which matrices have a gradient somewhere, and which of them move; bring states to their owners from a checkpoint
        or from others. Returns what all ranks raise, before anything has changed: ``error``, of a smaller set of ranks, what does
        not fit, or a matrix that has a gradient and is not ready. ``busy``: this rank's step does more than make states.
        """
        exchange, is_held = self._exchange, self._optimizer.is_held
        while True:
            away = any(out_of_place(state, mine, is_held) for state, mine in zip(self._states, self._mine, strict=True))
            found = [(self._has(m.p), False, False, False) for m in self.members]
            if not away and error is None:
                try:
                    for member, state in zip(self.members, self._states, strict=True):
                        check_one("step", member.name, state.get("step"))
                    found = [self._found(i, is_ready) if mine else found[i] for i, mine in enumerate(self._mine)]
                except Exception as wrong:  # whatever it is, the other ranks wait for ours
                    error = wrong
            flags = exchange.any([away, error is not None, busy, *(f for each in found for f in each)], self._device)
            if flags[1]:
                return exchange.told(error)
            if not flags[0]:
                break
            try:
                take(self.members, self._states, exchange, is_held)
            except RuntimeError as wrong:  # on all ranks here; larger sets hear of it
                error = wrong
                continue
            self._optimizer.state.update(
                {m.p: state for m, state in zip(self.members, self._states, strict=True) if state}
            )
        self.busy = flags[2]
        self.present, self._moves, changes, unready = (flags[3 + k :: 4] for k in range(4))
        self._changes_states = any(a and b for a, b in zip(self.present, changes, strict=True))
        for member, has_gradient, is_unready in zip(self.members, self.present, unready, strict=True):
            if has_gradient and is_unready:
                return not_ready(member.name, member.group)
        return None

    def settle(self, error: Exception | None) -> Exception | None:
        """What all ranks raise after their work: ``error``, of a smaller set of ranks, or that of an owner here."""
        return self._exchange.together(error or self._error, self._device)

    def _has(self, p: Tensor) -> bool:
        """True where this rank has a gradient, of more than nothing."""
        return p in self._given and local(p).numel() > 0

    def _found(
        self, i: int, is_ready: Callable[[dict[str, Any], State, Rotation], bool]
    ) -> tuple[bool, bool, bool, bool]:
        """What an owner knows of a matrix: whether it has a gradient here, moves, gets or loses states, or is not ready."""
        optimizer, m = self._optimizer, self.members[i]
        held = self._held[i] = held_of(self._states[i], optimizer.is_held)
        whole = optimizer.stand_in(m.p)
        basis = optimizer.basis_of(m.name, whole, held, m.group)
        optimizer.check_held(m.name, whole, held)
        self._work[i] = Work(m.name, whole, whole, basis)
        unready = not is_ready(m.group, held, basis)
        return self._has(m.p), optimizer.moves(basis), optimizer.changes_states(basis, held), unready

    # A step.

    def make_states(self) -> None:
        """Make the states that a first step at lr 0 is asked for."""
        for i, member in enumerate(self.members):
            if self.present[i]:
                self._prepare_own(i)
                if self._mine[i]:
                    with self._standing_in([i]):
                        self._optimizer.make_states(self._of_whole(member), self._rows[member.kind], [self._work[i]])
        self._finish()

    def run(self, begun: Begun, meanwhile: Callable[[], None] | None) -> None:
        """Step the matrices that this rank owns, and find what its shards move along; ``meanwhile``: what it steps alone."""
        for i in range(len(self.members)):
            if self.present[i]:
                self._prepare_own(i)
        there = self._wire(begun)

        def piece_of(i: int) -> Tensor | None:
            g = self._given.get(self.members[i].p)
            return None if g is None else view(local(begun.applied(g)).detach().to(there), True)

        def while_it_travels() -> None:
            try:
                if meanwhile is not None:
                    meanwhile()
            except Exception as error:  # the other ranks wait for what is on its way
                self._error = self._error or error

        self._weights = self._whole_weights()
        self._exchange.run(
            piece_of,
            self._directed,
            self._put,
            there,
            self._device,
            result=self.dtype,
            meanwhile=while_it_travels,
            later=self._catch_up,
        )
        self._finish()

    def moving(self) -> Iterator[tuple[Member, Tensor | None, Tensor]]:
        """The parameters that move, the gradients that this rank has, and what along."""
        for i, member in enumerate(self.members):
            if self.present[i] and self._moves[i]:
                yield member, self._given.get(member.p), self._target(i)

    def update(self, work_on: Callable[[dict[str, Any], Row, list[Work]], None]) -> None:
        """Give each group's matrices, with what the ranks have for them, to the owner's work on its states."""
        whole: dict[int, Tensor] = {}

        def piece_of(i: int) -> Tensor | None:
            given = self._given.get(self.members[i].p)
            return None if given is None else view(local(given).detach().to(self.dtype), True)

        def keep(unit: Unit, stack: Tensor) -> None:
            if self.present[unit.param]:
                whole[unit.param] = stack.reshape(self.members[unit.param].p.shape).clone()

        for i in range(len(self.members)):
            if self.present[i]:
                self._prepare_own(i)
        self._exchange.collect(piece_of, keep, self.dtype, self._device)
        alike: dict[int, list[int]] = {}
        for i in sorted(whole):
            alike.setdefault(self.members[i].kind, []).append(i)
        for numbers in alike.values():
            member, work = self.members[numbers[0]], [self._work[i]._replace(g=whole[i]) for i in numbers]
            try:
                with self._standing_in(numbers):
                    work_on(self._of_whole(member), self._rows[member.kind], work)
            except Exception as error:
                self._error = self._error or error
        self._finish()

    # The parts of a step.

    def _wire(self, begun: Begun) -> torch.dtype:
        """What gradients travel in: 16 bits where all have these, and nothing is multiplied with them."""
        # A rank without a gradient knows its dtype by this; None: it may have any.
        own = {dtype for m in self.members for dtype in (m.p.dtype, getattr(m.p, "grad_dtype", m.p.dtype))}
        (only,) = own if len(own) == 1 else (self.dtype,)
        return only if not begun.changes else self.dtype

    def _prepare_own(self, i: int) -> None:
        """What a rank has itself of a parameter that is stepped: a counter, and what its weights lack of their masters."""
        optimizer, member, state = self._optimizer, self.members[i], self._states[i]
        optimizer.state[member.p] = state
        if optimizer.states.keeps_step(self._rows[member.kind].rule):
            make_counter(member.name, member.p, state, member.group)
        if member.p in self._given or parts.is_scaled(member.group):
            if member.group.get("weight_format") is None:
                state.pop("remainder", None)  # of another format before
            last = Row("sgdw" + parts.suffix(member.group), 1.0, {})
            optimizer.states.ensure(member.name, member.p, member.group, last)
        if self._mine[i]:
            self._held[i].update({name: state[name] for name in ("step", "key") if name in state})

    @contextlib.contextmanager
    def _standing_in(self, numbers: Sequence[int]) -> Iterator[None]:
        """While it lasts the optimizer has the whole states of matrices, under tensors that stand for their parameters."""
        optimizer = self._optimizer
        stand_ins = {i: optimizer.stand_in(self.members[i].p) for i in numbers}
        for i, whole in stand_ins.items():
            optimizer.state[whole] = self._held[i]
            optimizer.states.name_as(whole, self.members[i].p)
        try:
            yield
        finally:
            for i, whole in stand_ins.items():
                state, held = self._states[i], optimizer.state.pop(whole)
                for name in [name for name in state if optimizer.is_held(name) and name not in held]:
                    del state[name]
                state.update(held)

    def _of_whole(self, member: Member) -> dict[str, Any]:
        """A group as whole matrices are stepped by: weights are with their shards."""
        return {**member.group, "weight_format": None}

    def _whole_weights(self) -> dict[int, Tensor]:
        """The parameters themselves, where their coordinates in the basis decay."""
        read = [
            i
            for i, m in enumerate(self.members)
            if self.present[i] and self._moves[i] and self._optimizer.decays_coordinates(m.group)
        ]
        if not read:
            return {}
        entries = [entry_of(m.key, m.name, m.p, m.of, True, 1.0) for m in (self.members[i] for i in read)]
        owners = [self._owners[i] for i in read]
        plan = Plan(entries, self._exchange.plan.ranks, self.dtype.itemsize, owners)
        found: dict[int, Tensor] = {}

        def keep(unit: Unit, stack: Tensor) -> None:
            i = read[unit.param]
            found[i] = stack.reshape(self.members[i].p.shape).clone()

        def piece_of(n: int) -> Tensor:
            return view(local(self.members[read[n]].p).detach().to(self.dtype), True)

        carrier = Exchange(plan, self._exchange.group, dict(enumerate(read)))
        carrier.collect(piece_of, keep, self.dtype, self._device)
        return found

    def _directed(self, units: list[Unit], stack: Tensor) -> Tensor:
        """What whole matrices of one group move along; zeros where one does not move."""
        member = self.members[units[0].param]
        result = stack.new_zeros(stack.shape, dtype=self.dtype)
        numbers = [unit.param for unit in units if self.present[unit.param]]
        if not numbers:
            return result
        place = {unit.param: k for k, unit in enumerate(units)}
        gradients = {i: _aligned(stack[place[i]].view(self.members[i].p.shape)) for i in numbers}
        group, row = self._of_whole(member), self._rows[member.kind]
        work = [self._work[i]._replace(g=gradients[i], weights=self._weights.get(i)) for i in numbers]
        of = (member.kind, units[0].param)  # the batch, whichever of it has gradients
        try:
            with self._standing_in(numbers):
                moving, directions = self._optimizer.directed(of, group, row, work)
        except Exception as error:
            self._error = self._error or error
            return result
        number_of = {id(self._work[i].p): i for i in numbers}
        for item, direction in zip(moving, directions, strict=True):
            result[place[number_of[id(item.p)]]] = direction.view(result.shape[1:])
        self._later.append(functools.partial(self._fed, numbers, moving, group))
        return result

    def _fed(self, numbers: list[int], moving: list[Work], group: dict[str, Any]) -> None:
        try:
            with self._standing_in(numbers):
                self._optimizer.after(moving, group)
        except Exception as error:
            self._error = self._error or error

    def _catch_up(self) -> None:
        """Do what nobody waits for."""
        while self._later:
            self._later.pop(0)()

    def _target(self, i: int) -> Tensor:
        return self._optimizer.direction_of(self.members[i].p, self.dtype)

    def _put(self, unit: Unit, where: tuple[slice, ...], values: Tensor) -> None:
        if self.members[unit.param].p in self._given:
            view(local(self._target(unit.param)), True)[where].copy_(values)

    def _finish(self) -> None:
        """Count the step of matrices that others own, and let all know of new states."""
        for i, member in enumerate(self.members):
            if self.present[i] and self._states[i]:
                self._optimizer.state[member.p] = self._states[i]
        if self._changes_states:
            tell_names(self.members, self._states, self._exchange.group, self._optimizer.is_held)

    def count(self) -> None:
        """Count the step where its owner has not."""
        for i in range(len(self.members)):
            step = self._states[i].get("step")
            if not self._mine[i] and self.present[i] and self._moves[i] and step is not None:
                if step.device.type == "cpu":
                    next_step(step)
                else:
                    step += 1


def _aligned(t: Tensor) -> Tensor:
    return t if t.device.type != "cpu" or t.data_ptr() % ALIGNED == 0 else t.clone()
