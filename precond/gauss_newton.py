"""Diagonal Gauss-Newton in a basis: GaussNewton."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import L1_OPTIONS, arguments, number
from ._core.formats import StateFormat, is_coded
from ._core.metric import Metric, of_parts
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.precision import at_stated_precision
from ._core.rows import Row, name_of
from ._core.scales import lr_of
from ._core.settings import Settings
from ._methods.kronecker import Rotation, turned
from ._methods.rotated import Rotated
from ._methods.share import HELD, Work

CURVATURES = ("gnb", "hutchinson", "gradient")


class GaussNewton(Rotated):
    r"""Preconditions by the diagonal of the Gauss-Newton matrix, in the parameters' own coordinates or in a basis.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1)\,U^T g_t, \qquad
        u = \mathrm{clamp}\Big(\frac{m_t / (1-\beta_1^t)}{(h + \epsilon)^{-\mathrm{power}}}, \pm c\Big), \qquad
        p_t = p_{t-1} - \gamma\,(U u + \lambda\, p_{t-1})

    h is a running mean of the diagonal of U^T G U, where G is the Gauss-Newton matrix. The training loop estimates that diagonal
    every few steps and calls :meth:`update_curvature`. With ``curvature="gradient"`` the step itself averages squared gradients;
    for the power -1/2 this is Adam with eps inside the root. A negative h counts as 0. Without a basis a step is one pass. With
    one, each gradient is rotated before the pass and the result is rotated back.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. All options may differ between groups.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-3).
        betas: decay rates of the means of gradients and of curvature, each in [0, 1) (default (0.9, 0.99)).
        eps: >= 0, added to the curvature before the power is taken (default 1e-8).
        power: -1 or -0.5 (default -1).
        clip: c > 0 bounds each coordinate of u, so that coordinates without curvature move by sign (default None: no bound).
        curvature: "gnb" (default): ``update_curvature`` squares the gradient of a loss on labels sampled from the model;
            "hutchinson": ``update_curvature`` is given estimates; "gradient": each step squares its own gradient.
        basis: "identity" (default). "kronecker": per matrix, the eigenvectors of running means of G G^T and G^T G, over the
            gradients that feed the curvature, or with "hutchinson" over those of the steps. An orthogonal matrix (n, n): every
            parameter must have n elements. A pair (m, m), (n, n): U = L (x) R, for m x n matrices.
        basis_beta: decay rate of the means behind "kronecker", in [0, 1) (default None: betas[1]).
        basis_frequency: steps, or curvature updates, between refreshes of the basis (default 10).
        max_size: matrices with a longer side are cut into blocks with a basis each (default 8192).
        weight_decay: lambda >= 0, intrinsic L2, decoupled (default 0).
        damping: >= 0, raises each estimate of the curvature by so many times its mean over the parameter (default 0). Unlike eps
            it stays when the loss is scaled or the basis changes. Not with "gradient".
        maximize: ascend instead of descend (default False).
        foreach: accepted and ignored.
        differentiable: autograd records the step, which then runs on the reference backend; not with a basis (default False).
        fused: True makes ``torch.amp.GradScaler`` leave unscaling to the step.
        l1_decay, l1_form, l1_cap: intrinsic L1 in the coordinates of the basis, as for :class:`precond.AdamW`.
        state_format: as for :class:`precond.AdamW`, but with a basis not "int8" or "int4". Without one, these two leave curvature
            that ``update_curvature`` feeds in float32.
        weight_format: as for :class:`precond.AdamW`.
        **settings: :class:`precond.Settings`.

    Raises:
        ValueError: an argument is out of range or not one of its names.
        RuntimeError: with a basis when built and at the step, for ``differentiable``; at the step, if the curvature was never
            updated and no ``clip`` bounds the step, a basis does not fit, or ranks differ in their sharded matrices.

    State: ``step``, ``exp_avg`` and ``curvature`` (in the basis), ``curvature_step``; ``factor_...`` and ``basis_...`` of blocks;
    with a basis, of a sharded matrix with its owner (docs/scaling.md).

    Source: Liu et al., arXiv 2510.13680, for the idea and the estimators; order, damping and defaults are this project's
    (docs/theory.md, C.2). Vectors have no Kronecker basis here.

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

    _in_basis = ("exp_avg", "curvature")
    _basis_options = ("basis_beta", "basis_frequency", "max_size")
    _why_not_one_pass = "with a basis"
    _group_options = {**FusedOptimizer._group_options, **L1_OPTIONS, "l1_cap": 10.0, "damping": 0.0}
    #: False: the means start at 0 without bias correction.
    _corrected: ClassVar[bool] = True

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
        damping: float = 0.0,
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
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        FusedOptimizer.__init__(self, params, defaults, settings=settings)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
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
        damping = group.get("damping", 0.0)
        if not 0.0 <= damping < math.inf:
            raise ValueError(f"damping must be >= 0 and finite, got {damping}")
        if damping and group["curvature"] == "gradient":
            raise ValueError(f"damping must be 0 with curvature='gradient', got {damping}")
        if group["basis_beta"] is not None and not 0.0 <= group["basis_beta"] < 1.0:
            raise ValueError(f"basis_beta must be None or in [0, 1), got {group['basis_beta']}")

    def rotates(self, group: dict[str, Any]) -> bool:
        """True for a group that has a basis."""
        return not (isinstance(group["basis"], str) and group["basis"] == "identity")

    def _curvature_scale(self, group: dict[str, Any]) -> float:
        """The factor of the curvature in a step."""
        return 1.0

    def _row(self, group: dict[str, Any]) -> Row:
        hyper = self._hyper(group, "eps")
        hyper["beta1"], hyper["beta2"] = map(number, group["betas"])
        hyper["scale"], hyper["corrected"] = self._curvature_scale(group), float(self._corrected)
        hyper["clip"] = math.inf if group["clip"] is None else float(group["clip"])
        suffix = ("_own" if group["curvature"] == "gradient" else "") + ("_root" if group["power"] == -0.5 else "")
        return Row(self._decayed("gauss_newton", group, suffix), -1.0 if group["maximize"] else 1.0, hyper)

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        if self._is_shared(p, group):
            return Metric(why_not=HELD)
        of_gradients = group["curvature"] == "gradient"
        count = self._steps(p) if of_gradients else self.state.get(p, {}).get("curvature_step", 0)
        if not count:
            return None
        scale = self._curvature_scale(group)
        if of_gradients:
            scale /= 1.0 - float(group["betas"][1]) ** count
        eps, power = float(group["eps"]), -2.0 * group["power"]
        h = self._decoded(p, group, "curvature")
        squared_den = of_parts(lambda h: (h.clamp(min=0) * scale + eps).pow(power), h)
        return Metric(squared_den, basis=self._basis_of_metric(p, group), known=h)

    @classmethod
    def _format_of_state(cls, name: str, group: dict[str, Any]) -> StateFormat:
        asked = super()._format_of_state(name, group)
        # Codes of 8 bits lose a change of a hundredth, which is all that an update every few steps makes.
        coded = name == "curvature" and group["curvature"] != "gradient" and is_coded(asked)
        return "fp32" if coded else asked

    @classmethod
    def _numbers(cls, group: dict[str, Any]) -> dict[str, int]:
        return {} if group["curvature"] == "gradient" else {"curvature_step": 0}

    def _check_ready(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or self._is_shared(p, group):
                    continue
                if not self.is_ready(group, self.state.get(p, {})):
                    raise self.not_ready(self._name(p), group)

    def is_ready(self, group: dict[str, Any], state: dict[str, Any], basis: Rotation | None = None) -> bool:
        """True unless a step would be divided by a curvature that nobody has given."""
        lr = lr_of(group)
        moves = isinstance(lr, Tensor) or lr != 0.0
        needs = group["curvature"] != "gradient" and group["clip"] is None and moves
        return not needs or bool(state.get("curvature_step"))

    def not_ready(self, name: str, group: dict[str, Any]) -> RuntimeError:
        """What is said then."""
        return RuntimeError(
            f"update_curvature must be called before the first step, or clip be given: {name} has no curvature"
        )

    def _before(self, work: list[Work], group: dict[str, Any], row: Row) -> list[Work]:
        """Feed the bases, unless ``update_curvature`` does: it feeds the gradients that it squares."""
        if group["curvature"] != "gnb":
            self._feed(work, group)
        return work

    def update_curvature(self, batch_size: float = 1.0, estimates: Sequence[Tensor | None] | None = None) -> None:
        r"""Averages a new estimate of the Gauss-Newton diagonal into the curvature.

        .. math::
            h = h + \frac{1 - \beta_2}{1 - \beta_2^n}\,(\hat h_n + \delta\,\mathrm{mean}(\hat h_n) - h), \qquad
            \hat h = B\,(U^T \hat g)^2

        with delta the ``damping``. A mean below 0 counts as 0.

        Args:
            batch_size: B, the number of samples behind the present ``.grad``, which must be the gradient of their mean loss on
                labels drawn from the model (default 1). :mod:`precond.curvature` draws such labels.
            estimates: used instead of ``.grad``: one estimate of the diagonal per parameter, in the order of the groups and in
                the coordinates of the basis, or None to leave a parameter as it is. With a basis, a sharded parameter takes a
                DTensor on its mesh. A Kronecker basis exists after the first step, with "gnb" after the first update from
                gradients.

        Raises:
            RuntimeError: ``curvature`` is "gradient"; it is "hutchinson" and there are no estimates; an estimate has another
                shape than its parameter, or its basis does not exist yet.
            ValueError: the number of estimates is not that of the parameters.

        Source: Liu et al., arXiv 2305.14342 (the estimator). The bias correction, which makes h a mean from the first update on,
        is this project's.

        Example:
            >>> import torch, precond
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> opt = precond.GaussNewton([w])
            >>> w.grad = torch.tensor([1.0, 2.0])  # on sampled labels
            >>> opt.update_curvature(batch_size=8)
            >>> opt.state[w]["curvature"].tolist()
            [8.0, 32.0]
        """
        self.update_groups(self.param_groups, batch_size, estimates)

    @torch.no_grad()
    @at_stated_precision
    def update_groups(
        self, groups: list[dict[str, Any]], batch_size: float, estimates: Sequence[Tensor | None] | None
    ) -> None:
        """:meth:`update_curvature` of some groups: owners are those of all of them."""
        position, total = 0, sum(len(group["params"]) for group in groups)
        if estimates is not None and len(estimates) != total:
            raise ValueError(f"estimates must be one per parameter, {total}, got {len(estimates)}")
        whole: list[tuple[dict[str, Any], Row, list[Work]]] = []
        shards: dict[Tensor, Tensor] = {}
        given = estimates is not None
        for group in groups:
            if group["curvature"] == "gradient":
                raise RuntimeError("curvature must be 'gnb' or 'hutchinson' for update_curvature, got 'gradient'")
            if group["curvature"] == "hutchinson" and not given:
                raise RuntimeError("estimates must be given with curvature='hutchinson', got None")
            found: list[Work] = []
            for index, p in enumerate(group["params"]):
                name = name_of(group, self._number_of(group), index)
                g = p.grad if estimates is None else estimates[position]
                position += 1
                if g is None:
                    continue
                if g.shape != p.shape:
                    raise RuntimeError(f"an estimate must have shape {tuple(p.shape)} for {name}, got {tuple(g.shape)}")
                if p.is_complex():
                    raise RuntimeError(f"{name} must be real for update_curvature, got {p.dtype}")
                if self._is_shared(p, group):
                    shards[p] = _placed(name, p, g)
                    continue
                basis = self._basis(name, p, group) if self.rotates(group) else Rotation(p)
                if given and not _is_made(basis):
                    raise _no_basis(name, group)
                found.append(Work(name, p, g, basis))
            whole.append((group, self._checked_row(group), found))
        rotating = [group for group in self.param_groups if self.rotates(group)]
        shares = self._shares(rotating, [self._checked_row(group) for group in rotating], shards)
        error: Exception | None = None
        for share in shares:
            ready = lambda group, state, basis: not given or _is_made(basis)  # noqa: E731
            error = share.agree(True, error, ready, _no_basis) or error
        if error is not None:
            raise error
        for group, row, found in whole:
            self._average(group, row, found, batch_size, given)
        for share in shares:
            share.update(lambda group, row, work: self._average(group, row, work, batch_size, given))
        for share in shares:
            error = share.settle(error) or error
        if error is not None:
            raise error

    def _average(self, group: dict[str, Any], row: Row, found: list[Work], batch_size: float, given: bool) -> None:
        """Average estimates that are ``given`` in the coordinates of the basis, or gradients that are squared in them."""
        parts = [item.g for item in found]
        if not given and self.rotates(group):
            self._feed(found, group)
            wide = [item.g.detach().to(torch.promote_types(item.p.dtype, torch.float32)) for item in found]
            parts = turned([(item.basis, g) for item, g in zip(found, wide, strict=True)], back=False)
        beta2 = float(group["betas"][1])
        for (name, p, *_), part in zip(found, parts, strict=True):
            self._init_state(p, group, row, name)
            state = self.state[p]
            h = state["curvature"]
            new = part.to(torch.promote_types(h.dtype, torch.float32))
            new = new if given else new.square() * batch_size
            if damping := group.get("damping", 0.0):
                # A mean of raised estimates is the raised mean of estimates.
                new = new + damping * new.mean().clamp(min=0)
            count = state["curvature_step"] = state.get("curvature_step", 0) + 1
            weight = (1 - beta2) / (1 - beta2**count) if self._corrected else 1 - beta2
            h.copy_(torch.lerp(h.to(new.dtype), new, weight))


def _is_made(basis: Rotation) -> bool:
    return basis.kronecker is None or basis.kronecker.ready


def _no_basis(name: str, group: dict[str, Any]) -> RuntimeError:
    first = "an update from gradients" if group["curvature"] == "gnb" else "a step"
    return RuntimeError(f"{first} must come before estimates of {name}, to make their basis")


def _placed(name: str, p: Tensor, g: Tensor) -> Tensor:
    """What is given for a sharded parameter, as its shards are."""
    given, placed = cast(Any, g), cast(Any, p)
    if not hasattr(g, "placements"):
        raise RuntimeError(f"an estimate must be a DTensor on the mesh of {name}, got a plain tensor")
    if (given.device_mesh, given.placements) != (placed.device_mesh, placed.placements):
        given = given.redistribute(placed.device_mesh, placed.placements)
    return cast(Tensor, given)
