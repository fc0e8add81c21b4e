"""Diagonal Gauss-Newton in a basis: GaussNewton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import L1_OPTIONS, arguments, check_betas, check_lr, check_nonnegative, number
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.passes import plain_step
from ._core.rows import Row
from ._core.settings import Settings
from ._methods.kronecker import Kronecker, Rotation, check_matrix, is_matrix
from ._methods.multipass import MultiPass

CURVATURES = ("gnb", "hutchinson", "gradient")


class GaussNewton(MultiPass):
    r"""A diagonal Gauss-Newton preconditioner to the power -1 or -1/2, in the coordinates or in a basis.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1)\,U^T g_t, \qquad
        u = \mathrm{clamp}\Big(\frac{m_t / (1-\beta_1^t)}{(h + \epsilon)^{-\mathrm{power}}}, \pm c\Big), \qquad
        p_t = p_{t-1} - \gamma\,(U u + \lambda\, p_{t-1})

    h is a running mean of the diagonal of U^T G U, G the Gauss-Newton matrix: estimated now and then by the training loop, which
    then calls :meth:`update_curvature`, or with ``curvature="gradient"`` of squared gradients at every step, which is Adam with
    its eps inside the root for the power -1/2. A negative h counts as 0. Without a basis a step is one pass; with one, a matrix
    is rotated before the pass and the result after it.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. All options may differ between groups.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-3).
        betas: of the mean of gradients and of that of the curvature, each in [0, 1) (default (0.9, 0.99)).
        eps: >= 0, added to the curvature before the power (default 1e-8).
        power: -1 or -0.5 (default -1).
        clip: c > 0, bounds every coordinate of u, so that those without curvature descend by their sign (default None: none).
        curvature: "gnb" (default): ``update_curvature`` squares a gradient that was taken on labels sampled from the model;
            "hutchinson": it is given estimates; "gradient": squares of the gradients themselves.
        basis: "identity" (default); "kronecker": eigenvectors of means of G G^T and G^T G per matrix, of the gradients that feed
            the curvature, with "hutchinson" of each step's; an orthogonal matrix (n, n): every parameter must have n elements; a
            pair (m, m), (n, n): U = L (x) R, for matrices.
        basis_beta: of the means behind "kronecker", in [0, 1) (default None: betas[1]).
        basis_frequency: the basis is refreshed after so many steps or updates (default 10).
        max_size: larger matrices are cut into blocks with a basis each (default 8192).
        weight_decay: lambda >= 0, intrinsic L2, decoupled (default 0).
        maximize: ascend instead of descend (default False).
        foreach: accepted and ignored.
        differentiable: without a basis, autograd sees the step, which runs on the reference backend (default False).
        fused: without a basis, True lets ``torch.amp.GradScaler`` leave unscaling to the step.
        l1_decay, l1_form, l1_cap: intrinsic L1 in the coordinates of the basis, as for :class:`precond.AdamW`.
        state_format: as for :class:`precond.AdamW`, not "int8" or "int4" with a basis; curvature that ``update_curvature``
            feeds is float32 where codes are asked for.
        weight_format: as for :class:`precond.AdamW`.
        **settings: ``backend``, without a basis also ``max_grad_norm`` and the others: :class:`precond.Settings`.

    Raises:
        ValueError: an argument is out of range or not one of its names.
        RuntimeError: at the step: a curvature that was never updated, unless ``clip`` bounds the step; a basis that does not fit.

    State: ``step``, ``exp_avg`` and ``curvature`` (in the basis), ``curvature_step``; ``factor_...`` and ``basis_...`` of blocks.

    Source: Liu et al., arXiv 2510.13680 (idea and estimators; order, damping and defaults are this project's, METHODS C.2).
    Vectors have no Kronecker basis here.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.GaussNewton([w], lr=0.5, betas=(0.0, 0.9), curvature="hutchinson")
        >>> (0.5 * torch.tensor([1.0, 100.0]) * w**2).sum().backward()
        >>> opt.update_curvature(estimates=[torch.tensor([1.0, 100.0])])
        >>> opt.step()
        >>> [round(x, 4) for x in w.tolist()]
        [0.5, -1.0]
    """

    _counts_steps = True
    _second_moment = "curvature"
    _why_not_one_pass = "with a basis"
    _group_options = {**FusedOptimizer._group_options, **L1_OPTIONS, "l1_cap": 10.0}
    #: False: a mean that starts at 0 and is not corrected for it.
    _corrected = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        power: float = -1.0,
        clip: float | None = None,
        curvature: str = "gnb",
        basis: str | Tensor | Sequence[Tensor] = "identity",
        weight_decay: float = 0.0,
        *,
        basis_beta: float | None = None,
        basis_frequency: int = 10,
        max_size: int = 8192,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        l1_decay: float = 0.0,
        l1_form: str = "proximal",
        l1_cap: float = 10.0,
        state_format: str | None = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        FusedOptimizer.__init__(self, params, defaults, settings=settings)

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        check_betas(defaults["betas"])
        check_nonnegative("weight_decay value", "weight_decay", defaults["weight_decay"])

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_nonnegative("epsilon value", "eps", group["eps"])
        if group["power"] not in (-1.0, -0.5):
            raise ValueError(f"power must be -1 or -0.5, got {group['power']}")
        if group["clip"] is not None and not group["clip"] > 0.0:
            raise ValueError(f"clip must be None or > 0, got {group['clip']}")
        if group["curvature"] not in CURVATURES:
            raise ValueError(f"curvature must be one of {', '.join(CURVATURES)}, got {group['curvature']!r}")
        if isinstance(group["basis"], str):
            if group["basis"] not in ("identity", "kronecker"):
                raise ValueError(f"basis must be 'identity', 'kronecker' or matrices, got {group['basis']!r}")
        elif not isinstance(group["basis"], Tensor) and len(group["basis"]) != 2:
            raise ValueError(f"basis must be a matrix or a pair of them, got {len(group['basis'])}")
        if group["basis_beta"] is not None and not 0.0 <= group["basis_beta"] < 1.0:
            raise ValueError(f"basis_beta must be None or in [0, 1), got {group['basis_beta']}")
        for name in ("basis_frequency", "max_size"):
            if not group[name] >= 1:
                raise ValueError(f"{name} must be >= 1, got {group[name]}")
        if self._rotates(group) and group.get("state_format") in ("int8", torch.int8, "int4"):
            raise ValueError(f"state_format must not have codes with a basis, got {group['state_format']!r}")

    def _rotates(self, group: dict[str, Any]) -> bool:
        return not (isinstance(group["basis"], str) and group["basis"] == "identity")

    def _row(self, group: dict[str, Any]) -> Row:
        hyper = self._hyper(group, "eps")
        hyper["beta1"], hyper["beta2"] = map(number, group["betas"])
        hyper["scale"], hyper["corrected"] = 1.0, 1.0
        hyper["clip"] = math.inf if group["clip"] is None else float(group["clip"])
        suffix = ("_own" if group["curvature"] == "gradient" else "") + ("_root" if group["power"] == -0.5 else "")
        return Row(self._decayed("gauss_newton", group, suffix), -1.0 if group["maximize"] else 1.0, hyper)

    def _metric(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor | str | None, float, float]:
        if self._rotates(group):
            raise TypeError("base must have no basis, got a GaussNewton that rotates")
        hyper = self._row(group).hyper
        scale = float(hyper["scale"])
        if group["curvature"] == "gradient":
            scale /= 1.0 - float(hyper["beta2"]) ** float(self.state[p]["step"])
        den = self._values(p, group, "curvature").clamp(min=0) * scale + float(hyper["eps"])
        return (den if group["power"] == -0.5 else den * den), 1.0, 0.0

    @classmethod
    def _format_of_state(cls, name: str, group: dict[str, Any]) -> Any:
        asked = super()._format_of_state(name, group)
        # A mean that moves every few steps by a hundredth is not for a few bits.
        coded = name == "curvature" and group["curvature"] != "gradient" and asked in ("int8", torch.int8, "int4")
        return "fp32" if coded else asked

    @classmethod
    def _smoothing(cls, group: dict[str, Any]) -> float | Tensor:
        return number(group["betas"][1])

    @classmethod
    def _numbers(cls, group: dict[str, Any]) -> dict[str, int]:
        return {} if group["curvature"] == "gradient" else {"curvature_step": 0}

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _update(self) -> None:
        groups = self.param_groups
        for group in groups:
            moves = isinstance(group["lr"], Tensor) or group["lr"] != 0.0
            if group["curvature"] != "gradient" and group["clip"] is None and moves:
                for p in group["params"]:
                    if p.grad is not None and not self.state.get(p, {}).get("curvature_step"):
                        raise RuntimeError("update_curvature must be called before the first step, or clip be given")
        straight = [group for group in groups if not self._rotates(group)]
        if len(straight) == len(groups):
            return super()._update()
        rows = [self._checked_row(group) for group in groups]
        work = [
            [(p, g, self._basis(name, p, group)) for name, p, g in self._gradients(group)]
            if self._rotates(group)
            else []
            for group in groups
        ]
        if straight:
            self._step_in_one_pass(straight)
        only_states = self._only_makes_states(rows, {p: g for items in work for p, g, _ in items})
        for index, (group, row) in enumerate(zip(groups, rows, strict=True)):
            if not only_states:
                self._rotated_step(index, group, row, work[index])
                continue
            for p, g, basis in work[index]:
                self._init_state(p, group, row)
                if basis.kronecker is not None:
                    basis.kronecker.make_states(basis.matrix(g, torch.float32))
        return None

    def _rotated_step(
        self, index: int, group: dict[str, Any], row: Row, work: list[tuple[Tensor, Tensor, Rotation]]
    ) -> None:
        """Rotate gradients, run the rule on a buffer in the basis, rotate back, and let a plain step take the result."""
        has_l1 = float(group.get("l1_decay", 0.0)) != 0.0
        inner = row.hyper if has_l1 else {**row.hyper, "lr": 1.0, "weight_decay": 0.0}
        jobs, before = [], []
        for p, g, basis in work:
            if group["curvature"] != "gnb":
                self._feed(basis, g, group)
            self._init_state(p, group, row)
            buffer = self._buffer(p, torch.promote_types(p.dtype, torch.float32))
            buffer.copy_(basis.rotate(p, buffer.dtype)) if has_l1 else buffer.zero_()
            before.append(buffer.clone() if has_l1 else None)
            names = ("exp_avg", "curvature", "step")
            rotated, asked = basis.rotate(g, buffer.dtype), group.get("state_format")
            jobs.append(self._job(p, buffer, rotated, names, inner, row.sign, state_format=asked))
        self._pass(row.rule, ("exp_avg", "curvature"), of=index, counts=True).run(jobs)
        last = []
        for (p, _, basis), job, start in zip(work, jobs, before, strict=True):
            direction = basis.rotate_back(-job.p if start is None else start - job.p)
            step = plain_step(1.0, 0.0) if has_l1 else plain_step(row.hyper["lr"], row.hyper["weight_decay"])
            last.append(self._job(p, p, direction, ("remainder",), step, 1.0, group.get("weight_format")))
        self._pass("sgdw", of=index).run(last)

    def _basis(self, name: str, p: Tensor, group: dict[str, Any]) -> Rotation:
        given = group["basis"]
        if isinstance(given, str) and not is_matrix(p):
            return Rotation(p)
        check_matrix(name, p)
        if isinstance(given, Tensor):
            if given.shape != (p.numel(), p.numel()):
                raise RuntimeError(
                    f"basis must have shape {(p.numel(), p.numel())} for {name}, got {tuple(given.shape)}"
                )
            return Rotation(p, flat=given)
        if not isinstance(given, str):
            rows, columns = (p.shape[0], p.shape[1:].numel()) if p.dim() > 0 else (1, 1)
            if given[0].shape != (rows, rows) or given[1].shape != (columns, columns):
                raise RuntimeError(
                    f"basis must be matrices of {rows} and {columns} for {name}, "
                    f"got {tuple(given[0].shape)} and {tuple(given[1].shape)}"
                )
            return Rotation(p, pair=(given[0], given[1]))
        return Rotation(p, kronecker=Kronecker(p.shape, self.state[p], group["max_size"]))

    def _feed(self, basis: Rotation, g: Tensor, group: dict[str, Any]) -> None:
        """Update the factors of a Kronecker basis by a gradient, and the basis where it is due."""
        if basis.kronecker is None:
            return
        beta = group["betas"][1] if group["basis_beta"] is None else group["basis_beta"]
        state = basis.kronecker.state
        basis.kronecker.update_factors(basis.matrix(g, torch.float32), float(beta))
        count = state.get("basis_step", 0)
        if count % group["basis_frequency"] == 0:
            basis.kronecker.refresh("exp_avg", "curvature")
        state["basis_step"] = count + 1

    @torch.no_grad()
    def update_curvature(self, batch_size: float = 1.0, estimates: Sequence[Tensor | None] | None = None) -> None:
        r"""Fold an estimate of the Gauss-Newton diagonal into the curvature.

        .. math:: h = h + \frac{1 - \beta_2}{1 - \beta_2^n}\,(\hat h_n - h), \qquad \hat h = B\,(U^T \hat g)^2

        Args:
            batch_size: B, the number of samples behind the present ``.grad``: the gradient of their mean loss on labels that were
                drawn from the model (default 1). :mod:`precond.curvature` draws them.
            estimates: instead of gradients, of every parameter in the order of the groups: estimates of its diagonal, in the
                coordinates of its basis, or None for one that has none. A Kronecker basis is there after the first step, with
                "gnb" after the first update from gradients.

        Raises:
            RuntimeError: with curvature="gradient", which has nothing to fold; "hutchinson" without estimates; an estimate of
                another shape, or in a basis that is not there yet.
            ValueError: not one estimate per parameter.

        Source: Liu et al., arXiv 2306.14342 (the estimator); the correction, which makes h a mean from the first on, is this
        project's.

        Example:
            >>> import torch, precond
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> opt = precond.GaussNewton([w])
            >>> w.grad = torch.tensor([1.0, 2.0])  # on sampled labels
            >>> opt.update_curvature(batch_size=8)
            >>> opt.state[w]["curvature"].tolist()
            [8.0, 32.0]
        """
        position, total = 0, sum(len(group["params"]) for group in self.param_groups)
        if estimates is not None and len(estimates) != total:
            raise ValueError(f"estimates must be one per parameter, {total}, got {len(estimates)}")
        for group in self.param_groups:
            if group["curvature"] == "gradient":
                raise RuntimeError("curvature must be 'gnb' or 'hutchinson' for update_curvature, got 'gradient'")
            if group["curvature"] == "hutchinson" and estimates is None:
                raise RuntimeError("estimates must be given with curvature='hutchinson', got None")
            row = self._checked_row(group)
            for index, p in enumerate(group["params"]):
                given = p.grad if estimates is None else estimates[position]
                position += 1
                if given is None:
                    continue
                if given.shape != p.shape:
                    raise RuntimeError(
                        f"an estimate must have shape {tuple(p.shape)} for parameter {index}, got {tuple(given.shape)}"
                    )
                if p.is_complex():
                    raise RuntimeError(f"parameter {index} must be real for update_curvature, got {p.dtype}")
                state = self.state[p]
                if self._rotates(group):
                    basis = self._basis(f"parameter {index}", p, group)
                    if estimates is None:
                        self._feed(basis, given, group)
                        given = basis.rotate(given, torch.promote_types(p.dtype, torch.float32))
                    elif basis.kronecker is not None and not basis.kronecker.ready:
                        first = "an update from gradients" if group["curvature"] == "gnb" else "a step"
                        raise RuntimeError(
                            f"{first} must come before estimates of parameter {index}, to make their basis"
                        )
                self._init_state(p, group, row)
                h = state["curvature"]
                wide = torch.promote_types(h.dtype, torch.float32)
                new = given.to(wide) if estimates is not None else given.to(wide).square() * batch_size
                count = state["curvature_step"] = state.get("curvature_step", 0) + 1
                beta2 = float(group["betas"][1])
                h.copy_(torch.lerp(h.to(wide), new, (1 - beta2) / (1 - beta2**count) if self._corrected else 1 - beta2))
