"""The step in a basis that SOAP and GaussNewton share: rotate the gradient, run a rule on its coordinates, rotate the result back
and let a plain step take it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._core import parts
from .._core.arguments import check_betas, check_lr, check_nonnegative
from .._core.clipping import Begun
from .._core.formats import is_coded
from .._core.passes import plain_step
from .._core.rows import Row
from .._core.scales import l1_decay_of
from .._core.sharding import like, local
from ..bases import blocks
from .exchange import Member, by_ranks
from .held import hand_out
from .kronecker import Rotation, check_matrix, is_matrix, learn, rotation_of, turned
from .last_pass import Move, without_parts
from .multipass import MultiPass
from .of_parameters import OfParameters
from .placed import check_placements
from .share import Share, Work
from .units import matrices_of, wide_of


class Prepared(NamedTuple):
    """What a step updates: of each group what this rank has whole, and what it steps together with others."""

    work: list[list[Work]]
    shares: list[Share]
    #: True for a first step that only makes states, as far as this rank knows.
    only_states: bool


class Rotated(MultiPass, abstract=True):
    """A method whose rule runs in a basis, in all groups or in some. A subclass says what feeds the basis, and when."""

    #: The states that are kept in the basis: a mean of gradients, and one of squares or of curvature.
    _in_basis: ClassVar[tuple[str, str]]
    #: The options that say how much of the factors a step keeps, after how many steps a basis is refreshed, and how long the
    #: side of a block may be.
    _basis_options: ClassVar[tuple[str, str, str]]
    _scales_updates = True

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        defaults["betas"] = check_betas(defaults["betas"])
        check_nonnegative("weight_decay value", "weight_decay", defaults["weight_decay"])

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_nonnegative("epsilon value", "eps", group["eps"])
        for name in self._basis_options[1:]:
            if not group[name] >= 1:
                raise ValueError(f"{name} must be >= 1, got {group[name]}")
        if self.rotates(group) and is_coded(group.get("state_format")):
            raise ValueError(
                f"state_format must not have codes {self._why_not_one_pass}, got {group['state_format']!r}"
            )

    def rotates(self, group: dict[str, Any]) -> bool:
        """True for a group whose matrices have a basis."""
        return True

    def _needs_passes(self, group: dict[str, Any]) -> bool:
        return self.rotates(group)

    def _check_whole(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        if self._maps(p, group):
            check_placements(name, p)

    def _maps(self, p: Tensor, group: dict[str, Any]) -> bool:
        return self.rotates(group) and (not isinstance(group.get("basis", "kronecker"), str) or is_matrix(p))

    def _held_by_owner(self, p: Tensor, group: dict[str, Any]) -> bool:
        return self._is_shared(p, group)

    def _member(self, key: str, name: str, p: Tensor, group: dict[str, Any], kind: int) -> Member:
        of = matrices_of(tuple(p.shape), True, None, name)
        _, frequency, longest = (group[option] for option in self._basis_options)
        given = not isinstance(group.get("basis", "kronecker"), str)
        weight = 1.0 if given else _weight(of.rows[0], of.columns[0], frequency, longest, group.get("one_sided", False))
        return Member(key, name, p, group, of, True, kind, wide_of(p), weight)

    def _rebuild(self) -> None:
        super()._rebuild()
        self._stand_ins = OfParameters()

    def keep_memory(self, params: list[Tensor]) -> None:
        """Forget the memory of other parameters, and of what stood for them."""
        super().keep_memory([*params, *self._stand_ins.of(params)])
        self._stand_ins.keep(params)

    def _basis(self, name: str, p: Tensor, group: dict[str, Any]) -> Rotation:
        """The basis that a group gives a parameter; the identity for a vector without one."""
        state = self.state.get(p, {})
        basis = self.basis_of(name, p, state, group)
        self.state[p] = state  # not before a parameter that can have no basis was refused
        return basis

    def _basis_of_metric(self, p: Tensor, group: dict[str, Any]) -> Rotation | None:
        """The basis of a parameter that has one by now."""
        if not self.rotates(group) or p not in self.state:
            return None
        basis = self._basis(self._name(p), p, group)
        self._leave_sides(basis)
        return None if basis.is_identity else basis

    def _leave_sides(self, basis: Rotation) -> None:
        """Bring states out of a side that has no basis any more, as after another ``one_sided``."""
        if basis.kronecker is not None:
            basis.kronecker.leave(*self._in_basis)

    def _feed(self, work: Sequence[Work], group: dict[str, Any]) -> None:
        """Fold gradients into the factors of Kronecker bases, and refresh the bases where that is due."""
        beta, frequency, _ = (group[name] for name in self._basis_options)
        kept = float(group["betas"][1] if beta in (None, -1) else beta)
        gradients = [(b.kronecker, b.matrix(g, wide_of(p))) for _, p, g, b, _ in work if b.kronecker is not None]
        learn(gradients, kept, frequency, *self._in_basis)

    # What a subclass adds to the step.

    def _before(self, work: list[Work], group: dict[str, Any], row: Row) -> list[Work]:
        """Called before states are made and gradients are rotated; returns the parameters that move."""
        return work

    def after(self, work: list[Work], group: dict[str, Any]) -> None:
        """Called when the parameters of a group have moved."""

    def _hyper_in_basis(self, p: Tensor, basis: Rotation, group: dict[str, Any], row: Row) -> dict[str, float | Tensor]:
        """The hyper-parameters of the rule for a parameter."""
        return row.hyper

    def _directions(self, work: list[Work], directions: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """What the parameters move along, from the rule's results in their own coordinates."""
        return directions

    def _plain_hyper(self, row: Row, group: dict[str, Any]) -> dict[str, float | Tensor]:
        """Those of the plain step by what the rule found."""
        return plain_step(row.hyper["lr"], row.hyper["weight_decay"])

    def moves(self, basis: Rotation) -> bool:
        """True where a parameter with such a basis moves in this step."""
        return True

    def is_ready(self, group: dict[str, Any], state: dict[str, Any], basis: Rotation | None = None) -> bool:
        """False where something must be called before a step on such states."""
        return True

    def not_ready(self, name: str, group: dict[str, Any]) -> RuntimeError:
        """What is said of a parameter then."""
        raise NotImplementedError

    # The step.

    def _prepare(self, groups: list[dict[str, Any]], rows: list[Row]) -> Prepared:
        found: list[list[Work]] = []
        shards: dict[Tensor, Tensor] = {}
        for group, row in zip(groups, rows, strict=True):
            found.append([])
            for name, p, g in self._gradients(group, row):
                if self._is_shared(p, group):
                    check_matrix(name, p)
                    shards[p] = g
                else:
                    found[-1].append(Work(name, p, g, self._basis(name, p, group)))
        only_states = self._asked_for_states
        shares = self._shares(groups, rows, shards)
        error: Exception | None = None
        for share in shares:  # small sets of ranks first: larger ones hear of their errors
            error = share.agree(not only_states, error, self.is_ready, self.not_ready) or error
        if error is not None:
            raise error
        return Prepared(found, shares, only_states)

    def _step_in_passes(self, groups: list[dict[str, Any]], rows: list[Row], work: Prepared, begun: Begun) -> None:
        whole = functools.partial(self._step_whole, groups, rows, work.work, begun, work.only_states)
        own: Callable[[], None] | None = whole
        for share in work.shares:
            if share.busy:
                share.run(begun, own)
                own = None
            else:
                share.make_states()
        if own is not None:
            own()
        error: Exception | None = None
        for share in work.shares:
            error = share.settle(error) or error
        if error is not None:
            raise error
        numbered = {self._number_of(group): row for group, row in zip(groups, rows, strict=True)}
        for share in work.shares:
            if share.busy:
                self._step_shards(share, numbered, begun)

    def _step_whole(
        self, groups: list[dict[str, Any]], rows: list[Row], work: list[list[Work]], begun: Begun, only_states: bool
    ) -> None:
        """The step of what this rank has whole."""
        for index, (group, row) in enumerate(zip(groups, rows, strict=True)):
            if only_states:
                self.make_states(group, row, work[index])
            else:
                applied = [item._replace(g=begun.applied(item.g)) for item in work[index]]
                self._step_group(index, group, row, applied)

    def make_states(self, group: dict[str, Any], row: Row, work: list[Work]) -> None:
        """Make what a checkpoint can be loaded into."""
        for name, p, _, basis, _ in work:
            self._init_state(p, group, row, name)
            if basis.kronecker is not None:
                basis.kronecker.make_states(torch.zeros(basis.kronecker.shape, dtype=wide_of(p), device=p.device))

    def _step_group(self, index: int, group: dict[str, Any], row: Row, work: list[Work]) -> None:
        """One pass of the rule over buffers in the basis, then one plain pass over the parameters."""
        moving, directions = self.directed(index, group, row, work)
        step, form = self._last_hyper(group, row), group.get("weight_format")
        moves = []
        for item, direction in zip(moving, directions, strict=True):
            job = self._job(item.name, item.p, item.p, direction, ("remainder",), step, 1.0, form)
            moves.append(Move(group, row, job, item.g))
        self._last_pass(moves, Begun(), of=index)
        self.after(moving, group)

    def directed(
        self, of: Hashable, group: dict[str, Any], row: Row, work: list[Work]
    ) -> tuple[list[Work], list[Tensor]]:
        """The parameters that move, and what along: one pass of the rule over buffers in the basis. ``of`` names the pass."""
        for item in work:
            self._leave_sides(item.basis)
        moving = self._before(work, group, row)
        for item in moving:
            self._init_state(item.p, group, row, item.name)
        rule = without_parts(row).rule
        buffers = [self._buffer(item.p, wide_of(item.p)) for item in moving]
        rotated = turned([(item.basis, item.g.detach().to(wide_of(item.p))) for item in moving], back=False)
        # L1 decays the coordinates of the parameter itself; else the buffer holds the direction alone.
        has_l1 = self.decays_coordinates(group)
        before = None
        if has_l1:
            weights = [item.p if item.weights is None else item.weights for item in moving]
            before = turned(
                [(item.basis, w.detach().to(wide_of(item.p))) for item, w in zip(moving, weights, strict=True)],
                back=False,
            )
        jobs = []
        for i, (name, p, _, basis, _) in enumerate(moving):
            buffers[i].zero_() if before is None else buffers[i].copy_(before[i])
            hyper = self._hyper_in_basis(p, basis, group, row)
            hyper = hyper if has_l1 else {**hyper, "lr": 1.0, "weight_decay": 0.0}
            names, asked = (*self._in_basis, "step"), group.get("state_format")
            jobs.append(self._job(name, p, buffers[i], rotated[i], names, hyper, row.sign, state_format=asked))
        self._pass(rule, self._in_basis, of=of).run(jobs)
        moves = (
            [-buffer for buffer in buffers] if before is None else [a - b for a, b in zip(before, buffers, strict=True)]
        )
        directions = turned([(item.basis, move) for item, move in zip(moving, moves, strict=True)], back=True)
        return moving, self._directions(moving, directions, group)

    def decays_coordinates(self, group: dict[str, Any]) -> bool:
        """True where a decay takes the parameter's coordinates in the basis."""
        return l1_decay_of(group) != 0.0

    def _check_settings(self, group: dict[str, Any]) -> None:
        super()._check_settings(group)
        for name in ("cautious", "max_update_rms"):
            if group.get(name) is not None and self.decays_coordinates(group):
                raise RuntimeError(
                    f"{name} must be None with l1_decay {self._why_not_one_pass}, which decays coordinates, "
                    f"got {group[name]!r}"
                )

    def _last_hyper(self, group: dict[str, Any], row: Row) -> dict[str, float | Tensor]:
        return plain_step(1.0, 0.0) if self.decays_coordinates(group) else self._plain_hyper(row, group)

    # On shards.

    def _shares(self, groups: list[dict[str, Any]], rows: list[Row], given: dict[Tensor, Tensor]) -> list[Share]:
        """What this rank steps, or averages, together with others."""
        by_number = {self._number_of(group): without_parts(row) for group, row in zip(groups, rows, strict=True)}
        return [
            Share(self, members, exchange, by_number, given)
            for members, exchange in self.agreements.exchanges(self._members(groups))
        ]

    def _step_shards(self, share: Share, rows: dict[int, Row], begun: Begun) -> None:
        """One plain pass over the shards of each group, along what owners have found."""
        share.count()
        moves: dict[int, list[Move]] = {}
        steps: dict[int, dict[str, float | Tensor]] = {}
        for (_, name, p, group, _, _, kind, *_), g, direction in share.moving():
            if g is None and not parts.is_scaled(group):
                continue
            self._keep_counter(p, rows[kind])
            step = steps[kind] = steps.get(kind) or self._last_hyper(group, rows[kind])
            job = self._job(name, p, p, direction, ("remainder",), step, 1.0, group.get("weight_format"))
            moves.setdefault(kind, []).append(Move(group, rows[kind], job, g))
        for kind, own in moves.items():
            self._last_pass(own, begun, of=("shards", share.dtype, kind))

    def is_held(self, name: str) -> bool:
        """True for the name of a state that belongs to a whole matrix."""
        return name in self._in_basis or name == "curvature_step" or name.startswith(("factor_", "basis_"))

    def stand_in(self, p: Tensor) -> Tensor:
        """What stands for a parameter where its whole states are made and stepped: its shape and dtype, without memory."""
        made = self._stand_ins.get(p)
        if made is None or (made.shape, made.dtype, made.device) != (p.shape, p.dtype, p.device):
            made = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
            self._stand_ins.put(p, made)
        return made

    def basis_of(self, name: str, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Rotation:
        """The basis that a group gives a parameter with these states; the identity for a vector without one."""
        given, max_size = group.get("basis", "kronecker"), group[self._basis_options[2]]
        return rotation_of(name, p, given, state, max_size, group.get("one_sided", False))

    def changes_states(self, basis: Rotation, state: dict[str, Any]) -> bool:
        """True where a step may make states, or drop some."""
        kronecker = basis.kronecker
        if any(name not in state for name in self._in_basis):
            return True
        return kronecker is not None and (not kronecker.complete or bool(kronecker.stale))

    def check_held(self, name: str, whole: Tensor, state: dict[str, Any]) -> None:
        """Raise where an owner has states that do not fit."""
        for key in self._in_basis:
            t = state.get(key)
            if t is not None and (t.shape, t.device) != (whole.shape, whole.device):
                raise RuntimeError(
                    f"{key} of {name} must have shape {tuple(whole.shape)} on {whole.device}, "
                    f"got {tuple(t.shape)} on {t.device}"
                )
        for key, t in state.items():
            if self.is_held(key) and isinstance(t, Tensor) and not t.is_floating_point():
                raise RuntimeError(f"{key} of {name} must be floating point as the parameter is, got {t.dtype}")

    def direction_of(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Where this rank's shard of a direction goes: contiguous, whatever the parameter's strides."""
        made = self._buffers.get(p)
        shape = local(p).shape
        if made is None or (made.dtype, made.shape, local(made).shape, made.device) != (
            dtype,
            p.shape,
            shape,
            p.device,
        ):
            made = like(p, torch.zeros(shape, dtype=dtype, device=p.device))
            self._buffers.put(p, made)
        return made

    def _states_to_save(self) -> dict[Tensor, dict[str, Any]]:
        found = {}
        for members, group in by_ranks(self._members(self.param_groups, frozen=True)):
            states = [self.state.get(member.p, {}) for member in members]
            for member, state in zip(members, hand_out(members, states, group, self.is_held), strict=True):
                if state is not None:
                    found[member.p] = state
        return found


@functools.lru_cache(maxsize=4096)
def _weight(rows: int, columns: int, frequency: int, longest: int, one_sided: bool) -> float:
    """The operations of a step, as a multiple of m^2 (2 n + m): a factor's update and two rotations for each side of a block, and
    its share of a refresh.
    """
    total = 0.0
    for block in blocks((rows, columns), longest):
        m, n = (part.stop - part.start for part in block)
        sides = [(m, n)] * (not one_sided or m <= n) + [(n, m)] * (not one_sided or n < m)
        total += sum(6.0 * size * size * other + 16.0 * size**3 / frequency for size, other in sides)
    short, long = sorted((rows, columns))
    return total / (short * short * (2.0 * long + short))
