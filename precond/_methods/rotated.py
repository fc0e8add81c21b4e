"""The step in a basis that SOAP and GaussNewton share: rotate the gradient, run a rule on its coordinates, rotate the result back
and let a plain step take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._core.arguments import check_betas, check_lr, check_nonnegative
from .._core.clipping import Begun
from .._core.formats import is_coded
from .._core.passes import plain_step
from .._core.rows import Row
from .kronecker import Rotation, check_whole, is_matrix, learn, rotation_of, turned
from .multipass import MultiPass


class Work(NamedTuple):
    """A parameter, its gradient and its basis."""

    name: str
    p: Tensor
    g: Tensor
    basis: Rotation


class Rotated(MultiPass, abstract=True):
    """A method whose rule runs in a basis, in all groups or in some. A subclass says what feeds the basis, and when."""

    #: The states that are kept in the basis: a mean of gradients, and one of squares or of curvature.
    _in_basis: ClassVar[tuple[str, str]]
    #: The options that say how much of the factors a step keeps, after how many steps a basis is refreshed, and how long the
    #: side of a block may be.
    _basis_options: ClassVar[tuple[str, str, str]]

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
        if not isinstance(group.get("basis", "kronecker"), str) or is_matrix(p):
            check_whole(name, p)

    def _basis(self, name: str, p: Tensor, group: dict[str, Any]) -> Rotation:
        """The basis that a group gives a parameter; the identity for a vector without one."""
        state = self.state.get(p, {})
        given, max_size = group.get("basis", "kronecker"), group[self._basis_options[2]]
        basis = rotation_of(name, p, given, state, max_size, group.get("one_sided", False))
        self.state[p] = state  # not before a parameter that can have no basis was refused
        return basis

    def _basis_of_metric(self, p: Tensor, group: dict[str, Any]) -> Rotation | None:
        """The basis of a parameter that has one by now."""
        basis = self._basis(self._name(p), p, group) if self.rotates(group) and p in self.state else None
        return None if basis is None or basis.is_identity else basis

    def _feed(self, work: Sequence[Work], group: dict[str, Any]) -> None:
        """Fold gradients into the factors of Kronecker bases, and refresh the bases where that is due."""
        beta, frequency, _ = (group[name] for name in self._basis_options)
        kept = float(group["betas"][1] if beta in (None, -1) else beta)
        gradients = [(b.kronecker, b.matrix(g, _wide(p))) for _, p, g, b in work if b.kronecker is not None]
        learn(gradients, kept, frequency, *self._in_basis)

    # What a subclass adds to the step.

    def _before(self, work: list[Work], group: dict[str, Any], row: Row) -> list[Work]:
        """Called before states are made and gradients are rotated; returns the parameters that move."""
        return work

    def _after(self, work: list[Work], group: dict[str, Any]) -> None:
        """Called when the parameters of a group have moved."""

    def _hyper_in_basis(self, p: Tensor, basis: Rotation, group: dict[str, Any], row: Row) -> dict[str, float | Tensor]:
        """The hyper-parameters of the rule for a parameter."""
        return row.hyper

    def _directions(self, work: list[Work], directions: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """What the parameters move along, from the rule's results in their own coordinates."""
        return directions

    def _plain_hyper(self, row: Row) -> dict[str, float | Tensor]:
        """Those of the plain step by what the rule found."""
        return plain_step(row.hyper["lr"], row.hyper["weight_decay"])

    # The step.

    def _prepare(self, groups: list[dict[str, Any]], rows: list[Row]) -> list[list[Work]]:
        return [
            [Work(name, p, g, self._basis(name, p, group)) for name, p, g in self._gradients(group, row)]
            for group, row in zip(groups, rows, strict=True)
        ]

    def _step_in_passes(
        self, groups: list[dict[str, Any]], rows: list[Row], work: list[list[Work]], begun: Begun
    ) -> None:
        only_states = self._only_makes_states(rows, {item.p: item.g for items in work for item in items})
        for index, (group, row) in enumerate(zip(groups, rows, strict=True)):
            if only_states:
                self._make_states(group, row, work[index])
            else:
                applied = [item._replace(g=begun.applied(item.g)) for item in work[index]]
                self._step_group(index, group, row, applied)

    def _make_states(self, group: dict[str, Any], row: Row, work: list[Work]) -> None:
        for name, p, g, basis in work:
            self._init_state(p, group, row, name)
            if basis.kronecker is not None:
                basis.kronecker.make_states(basis.matrix(g, _wide(p)))

    def _step_group(self, index: int, group: dict[str, Any], row: Row, work: list[Work]) -> None:
        """One pass of the rule over buffers in the basis, then one plain pass over the parameters."""
        has_l1 = float(group.get("l1_decay", 0.0)) != 0.0
        moving = self._before(work, group, row)
        for name, p, _, _ in moving:
            self._init_state(p, group, row, name)
        buffers = [self._buffer(p, _wide(p)) for _, p, _, _ in moving]
        rotated = turned([(b, g.detach().to(_wide(p))) for _, p, g, b in moving], back=False)
        # L1 decays the coordinates of the parameter itself; else the buffer holds the direction alone.
        before = turned([(b, p.detach().to(_wide(p))) for _, p, _, b in moving], back=False) if has_l1 else None
        jobs = []
        for i, (name, p, _, basis) in enumerate(moving):
            buffers[i].zero_() if before is None else buffers[i].copy_(before[i])
            hyper = self._hyper_in_basis(p, basis, group, row)
            hyper = hyper if has_l1 else {**hyper, "lr": 1.0, "weight_decay": 0.0}
            names, asked = (*self._in_basis, "step"), group.get("state_format")
            jobs.append(self._job(name, p, buffers[i], rotated[i], names, hyper, row.sign, state_format=asked))
        self._pass(row.rule, self._in_basis, of=index).run(jobs)
        step = plain_step(1.0, 0.0) if has_l1 else self._plain_hyper(row)
        moves = (
            [-buffer for buffer in buffers] if before is None else [a - b for a, b in zip(before, buffers, strict=True)]
        )
        directions = turned([(item.basis, move) for item, move in zip(moving, moves, strict=True)], back=True)
        directions = self._directions(moving, directions, group)
        last = [
            self._job(name, p, p, direction, ("remainder",), step, 1.0, group.get("weight_format"))
            for (name, p, _, _), direction in zip(moving, directions, strict=True)
        ]
        self._pass("sgdw", of=index).run(last)
        self._after(moving, group)


def _wide(p: Tensor) -> torch.dtype:
    """What a parameter's gradients are rotated and multiplied in, whatever their own dtype."""
    return torch.promote_types(p.dtype, torch.float32)
