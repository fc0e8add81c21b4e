"""Sophia: a clipped diagonal Gauss-Newton step."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import arguments
from ._core.formats import StateFormat
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.settings import Settings
from .gauss_newton import GaussNewton


class Sophia(GaussNewton):
    r"""Sophia-G: a clipped diagonal Gauss-Newton step, in one pass.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad
        p_t = (1-\gamma\lambda)\,p_{t-1} - \gamma\,\mathrm{clamp}\Big(\frac{m_t}{\rho B h + 10^{-15}}, \pm 1\Big)

    Every k steps (10 in the published code), after a backward pass of the mean loss on labels sampled from the model
    (:mod:`precond.curvature`), call :meth:`update_curvature`: :math:`h = \beta_2 h + (1-\beta_2)\,\hat g^2`. Neither mean is
    bias-corrected. Before the first update every coordinate moves by the sign of m.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-4).
        betas: decay rates of the two means, each in [0, 1) (default (0.965, 0.99)).
        rho: > 0 (default 0.04). Tune it so that 10 to 50 % of the coordinates are not clamped.
        weight_decay: lambda >= 0, decoupled (default 0.1).
        batch_size: B, the number of samples, tokens of a language model, behind a curvature gradient (default 5120).
        maximize, foreach, differentiable, fused, l1_decay, l1_form, l1_cap, state_format, weight_format, settings: as for
            :class:`precond.GaussNewton`.

    Raises:
        ValueError: an argument is out of range.

    State: ``step``, ``exp_avg``, ``curvature`` (``hessian`` in the published code), ``curvature_step``.

    Source: Liu et al., arXiv 2305.14342, in the order of the published SophiaG (docs/theory.md, C.6).

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.Sophia([w], lr=0.1, weight_decay=0.0, batch_size=1)
        >>> w.grad = torch.tensor([10.0, 10.0])  # on sampled labels
        >>> opt.update_curvature()
        >>> w.grad = torch.tensor([1.0, -0.1])
        >>> opt.step()
        >>> [round(x, 4) for x in w.tolist()]
        [0.9125, -1.9913]
    """

    _corrected = False
    #: The options of GaussNewton that Sophia fixes.
    _fixed: ClassVar[dict[str, Any]] = dict(
        eps=1e-15,
        power=-1.0,
        clip=1.0,
        curvature="gnb",
        basis="identity",
        basis_beta=None,
        basis_frequency=10,
        max_size=8192,
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        batch_size: float = 5120,
        *,
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
        defaults = arguments(locals()) | self._fixed
        FusedOptimizer.__init__(self, params, defaults, settings=settings)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name in ("rho", "batch_size"):
            if not group[name] > 0:
                raise ValueError(f"{name} must be > 0, got {group[name]}")

    def _curvature_scale(self, group: dict[str, Any]) -> float:
        return float(group["rho"]) * float(group["batch_size"])
