"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import L1_OPTIONS, arguments, check_betas, check_lr, check_nonnegative, number
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.passes import plain_step
from ._core.rows import Row
from ._core.settings import Settings
from ._methods.kronecker import Kronecker, as_matrix, check_matrix, is_matrix
from ._methods.multipass import MultiPass


class SOAP(MultiPass):
    r"""SOAP: Adam on the rotated gradient of a matrix, its basis the eigenvectors of running means of G G^T and G^T G.

    .. math::
        G' = Q_L^T G\, Q_R, \qquad m = \beta_1 m + (1-\beta_1) G', \quad v = \beta_2 v + (1-\beta_2) G'^2, \qquad
        W = (1-\gamma\lambda)\Big(W - \gamma\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\,
        Q_L \frac{m}{\sqrt{v} + \epsilon + \epsilon_r\,\lVert G \rVert} Q_R^T\Big)

    The first step of a matrix only builds its bases. Every ``precondition_frequency`` steps they take a step of QR, after the
    update; m is then expressed in the new basis and v is not, but for the order of its columns. Rotations are matrix products,
    Adam and the step are one fused pass each.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. A tensor of more dimensions is a matrix of
            dimension 0 by all others; vectors get Adam from the first step on. float64 runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 3e-3).
        betas: of the moments, each in [0, 1) (default (0.95, 0.95)).
        shampoo_beta: of the means behind the bases, in [0, 1); None or -1: betas[1] (default None).
        eps: >= 0, as published: beside the root before its correction (default 1e-8).
        relative_eps: >= 0, times the gradient's Frobenius norm (rms over steps; default 3e-6). A gradient of deficient rank
            leaves coordinates with nothing but rounding errors in them, which a tiny eps alone divides by themselves: weights
            drift there. The errors of rotations in float32 grow with that norm: at 3e-6 weights drift by a quarter of what a
            gradient of rank 1 moves them, at 1e-4 of its entries' rms by 2.5 times as much for 512 x 512. 0 for float64.
        weight_decay: lambda >= 0, decoupled (default 0.01).
        precondition_frequency: steps between refreshes of the bases (default 10).
        max_precond_dim: matrices with a longer side are cut into blocks, each with bases of its own (default 10000).
        maximize: ascend instead of descend (default False).
        l1_decay, l1_form, l1_cap: intrinsic L1 with P = Q diag(den^-1/2), so in the eigenbasis: as for :class:`precond.AdamW`,
            whose order the weight decay then has.
        state_format: as for :class:`precond.AdamW`, but for "int8" and "int4".
        weight_format: as for :class:`precond.AdamW`.
        **settings: ``backend`` and ``seed``: :class:`precond.Settings`.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: at the step, for a sparse gradient, a sharded or complex matrix, or clipping: torch has functions for it.

    State: ``step``, ``exp_avg``, ``exp_avg_sq`` (in the basis), ``basis_step``; ``factor_...`` and ``basis_...`` of blocks.

    Source: Vyas et al., arXiv 2409.11321, in the order of the published code (METHODS C.6); relative_eps and blocks are this
    project's, and m is kept in the basis.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.ones(2, 2))
        >>> opt = precond.SOAP([w], lr=0.1, weight_decay=0.0)
        >>> for _ in range(2):
        ...     w.grad = torch.eye(2)
        ...     opt.step()
        >>> [[round(x, 3) for x in row] for row in w.tolist()]
        [[0.9, 1.0], [1.0, 0.9]]
    """

    _counts_steps = True
    _why_not_one_pass = "for SOAP"
    _group_options = {**FusedOptimizer._group_options, **L1_OPTIONS, "l1_cap": 10.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        *,
        relative_eps: float = 3e-6,
        maximize: bool = False,
        l1_decay: float = 0.0,
        l1_form: str = "proximal",
        l1_cap: float = 10.0,
        state_format: str | None = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals()) | {"differentiable": False}
        super().__init__(params, defaults, settings=settings)

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        check_betas(defaults["betas"])
        check_nonnegative("weight_decay value", "weight_decay", defaults["weight_decay"])

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_nonnegative("epsilon value", "eps", group["eps"])
        check_nonnegative("relative epsilon value", "relative_eps", group["relative_eps"])
        if group["shampoo_beta"] not in (None, -1) and not 0.0 <= group["shampoo_beta"] < 1.0:
            raise ValueError(f"shampoo_beta must be None, -1 or in [0, 1), got {group['shampoo_beta']}")
        for name in ("precondition_frequency", "max_precond_dim"):
            if not group[name] >= 1:
                raise ValueError(f"{name} must be >= 1, got {group[name]}")
        if group.get("state_format") in ("int8", torch.int8, "int4"):
            raise ValueError(f"state_format must not have codes for SOAP, got {group['state_format']!r}")

    def _metric(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor | str | None, float, float]:
        raise TypeError("base must have no basis, got a SOAP")

    def _row(self, group: dict[str, Any]) -> Row:
        hyper = self._hyper(group, "eps")
        hyper["beta1"], hyper["beta2"] = map(number, group["betas"])
        return Row(self._decayed("adamw", group), -1.0 if group["maximize"] else 1.0, hyper)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _update(self) -> None:
        rows = [self._checked_row(group) for group in self.param_groups]
        work = [
            [(p, g, self._bases_of(name, p, group)) for name, p, g in self._gradients(group)]
            for group in self.param_groups
        ]
        only_states = self._only_makes_states(rows, {p: g for items in work for p, g, _ in items})
        for index, (group, row) in enumerate(zip(self.param_groups, rows, strict=True)):
            if not only_states:
                self._step_group(index, group, row, work[index])
                continue
            for p, g, turn in work[index]:
                self._init_state(p, group, row)
                if turn is not None:
                    turn.make_states(as_matrix(g.to(torch.promote_types(p.dtype, torch.float32))))

    def _step_group(
        self, index: int, group: dict[str, Any], row: Row, work: list[tuple[Tensor, Tensor, Kronecker | None]]
    ) -> None:
        found, jobs, before, turns = [], [], [], []
        has_l1 = float(group.get("l1_decay", 0.0)) != 0.0
        for p, g, turn in work:
            wide = torch.promote_types(p.dtype, torch.float32)
            if turn is not None and not turn.ready:
                turn.update_factors(as_matrix(g.to(wide)), self._factor_beta(group))
                turn.refresh("exp_avg", "exp_avg_sq")
                self._init_state(p, group, row)
                self.state[p]["basis_step"] = 1
                continue
            self._init_state(p, group, row)
            buffer = self._buffer(p, wide)
            if has_l1:
                buffer.copy_(_rotated(p.detach().to(wide), turn))
            else:
                buffer.zero_()
            before.append(buffer.clone() if has_l1 else None)
            names = ("exp_avg", "exp_avg_sq", "step")
            hyper = self._hyper_of(p, group, row, turn, has_l1)
            rotated, asked = _rotated(g.to(wide), turn), group.get("state_format")
            jobs.append(self._job(p, buffer, rotated, names, hyper, row.sign, state_format=asked))
            found.append((p, g))
            turns.append(turn)
        self._pass(row.rule, ("exp_avg", "exp_avg_sq"), of=index, counts=True).run(jobs)
        lr, decay = row.hyper["lr"], row.hyper["weight_decay"]
        steps = []
        for (p, _), job, start, turn in zip(found, jobs, before, turns, strict=True):
            direction = _rotated(-job.p if start is None else start - job.p, turn, back=True)
            # The published order: the decay takes the new weight.
            kept = 1.0 - lr * decay
            step = plain_step(1.0, 0.0) if has_l1 else plain_step(lr * kept, decay / kept)
            steps.append(self._job(p, p, direction, ("remainder",), step, 1.0, group.get("weight_format")))
        self._pass("sgdw", of=index).run(steps)
        for (p, g), turn in zip(found, turns, strict=True):
            if turn is None:
                continue
            turn.update_factors(as_matrix(g.to(torch.promote_types(p.dtype, torch.float32))), self._factor_beta(group))
            state = self.state[p]
            if state["basis_step"] % group["precondition_frequency"] == 0:
                turn.refresh("exp_avg", "exp_avg_sq")
            state["basis_step"] += 1

    def _bases_of(self, name: str, p: Tensor, group: dict[str, Any]) -> Kronecker | None:
        if not is_matrix(p):
            return None
        check_matrix(name, p)
        return Kronecker(p.shape, self.state[p], group["max_precond_dim"])

    def _factor_beta(self, group: dict[str, Any]) -> float:
        given = group["shampoo_beta"]
        return float(group["betas"][1] if given in (None, -1) else given)

    def _hyper_of(
        self, p: Tensor, group: dict[str, Any], row: Row, turn: Kronecker | None, has_l1: bool
    ) -> dict[str, float | Tensor]:
        """The rule's eps stands beside the corrected root: so published eps, and the relative one, are divided as the root is."""
        eps: float | Tensor = group["eps"]
        if turn is not None and group["relative_eps"] > 0.0:
            eps = turn.mean_square_norm().double().sqrt() * group["relative_eps"] + eps
        step = float(self.state[p]["step"]) + 1.0
        eps = eps / (1.0 - float(group["betas"][1]) ** step) ** 0.5
        plain = {} if has_l1 else {"lr": 1.0, "weight_decay": 0.0}
        return {**row.hyper, **plain, "eps": number(eps)}


def _rotated(t: Tensor, turn: Kronecker | None, back: bool = False) -> Tensor:
    if turn is None:
        return t
    return (turn.rotate_back if back else turn.rotate)(as_matrix(t)).view(t.shape)
