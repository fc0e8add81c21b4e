"""The step in a basis that SOAP and GaussNewton share: rotate the gradient, run a rule on its coordinates, rotate the result back
and let a plain step take it.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._core.arguments import check_betas, check_lr, check_nonnegative
from .._core.clipping import Begun
from .._core.formats import is_coded
from .._core.passes import plain_step
from .._core.rows import Row
from .kronecker import Rotation, check_whole, is_matrix, rotation_of
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
        basis = rotation_of(name, p, group.get("basis", "kronecker"), state, group[self._basis_options[2]])
        self.state[p] = state  # not before a parameter that can have no basis was refused
        return basis

    def _basis_of_metric(self, p: Tensor, group: dict[str, Any]) -> Rotation | None:
        """The basis of a parameter that has one by now."""
        basis = self._basis(self._name(p), p, group) if self.rotates(group) and p in self.state else None
        return None if basis is None or basis.is_identity else basis

    def _feed(self, p: Tensor, g: Tensor, basis: Rotation, group: dict[str, Any]) -> None:
        """Fold a gradient into the factors of a Kronecker basis, and refresh the basis where that is due."""
        if basis.kronecker is not None:
            beta, frequency, _ = (group[name] for name in self._basis_options)
            kept = float(group["betas"][1] if beta in (None, -1) else beta)
            basis.kronecker.learn(basis.matrix(g, _wide(p)), kept, frequency, *self._in_basis)

    # What a subclass adds to the step.

    def _before(self, work: Work, group: dict[str, Any], row: Row) -> bool:
        """Called before a parameter's states are made and its gradient is rotated; False: the step is over for it."""
        return True

    def _after(self, p: Tensor, g: Tensor, basis: Rotation, group: dict[str, Any]) -> None:
        """Called when the parameters of a group have moved."""

    def _hyper_in_basis(self, p: Tensor, basis: Rotation, group: dict[str, Any], row: Row) -> dict[str, float | Tensor]:
        """The hyper-parameters of the rule for a parameter."""
        return row.hyper

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
        moving, jobs, before = [], [], []
        for item in work:
            if not self._before(item, group, row):
                continue
            name, p, g, basis = item
            self._init_state(p, group, row, name)
            # L1 decays the coordinates of the parameter itself; else the buffer holds the direction alone.
            buffer = self._buffer(p, _wide(p))
            buffer.copy_(basis.rotate(p, buffer.dtype)) if has_l1 else buffer.zero_()
            before.append(buffer.clone() if has_l1 else None)
            hyper = self._hyper_in_basis(p, basis, group, row)
            hyper = hyper if has_l1 else {**hyper, "lr": 1.0, "weight_decay": 0.0}
            rotated, asked = basis.rotate(g, buffer.dtype), group.get("state_format")
            names = (*self._in_basis, "step")
            jobs.append(self._job(name, p, buffer, rotated, names, hyper, row.sign, state_format=asked))
            moving.append(item)
        self._pass(row.rule, self._in_basis, of=index).run(jobs)
        step = plain_step(1.0, 0.0) if has_l1 else self._plain_hyper(row)
        last = []
        for (name, p, _, basis), job, start in zip(moving, jobs, before, strict=True):
            direction = basis.rotate_back(-job.p if start is None else start - job.p)
            last.append(self._job(name, p, p, direction, ("remainder",), step, 1.0, group.get("weight_format")))
        self._pass("sgdw", of=index).run(last)
        for _, p, g, basis in moving:
            self._after(p, g, basis, group)


def _wide(p: Tensor) -> torch.dtype:
    """What a parameter's gradients are rotated and multiplied in, whatever their own dtype."""
    return torch.promote_types(p.dtype, torch.float32)
