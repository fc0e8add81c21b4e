"""Adamax, and AdamaxW with intrinsic decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import L1_OPTIONS, arguments, check_betas, check_lr, check_nonnegative, number
from ._core.formats import StateFormat
from ._core.metric import Metric, of_parts
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.rows import Row
from ._core.settings import Settings


class _LargestGradient(FusedOptimizer):
    """What Adamax and AdamaxW share; ``_name`` is that of the rule, ``_eps_inside`` whether u contains eps."""

    _name: str
    _eps_inside: bool
    _older_options = {**FusedOptimizer._older_options, "capturable": False}

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        check_nonnegative("epsilon value", "eps", defaults["eps"])
        defaults["betas"] = check_betas(defaults["betas"])
        check_nonnegative("weight_decay value", "weight_decay", defaults["weight_decay"])

    def _row(self, group: dict[str, Any]) -> Row:
        hyper = self._hyper(group, "eps")
        hyper["beta1"], hyper["beta2"] = map(number, group["betas"])
        return Row(self._decayed(self._name, group), -1.0 if group["maximize"] else 1.0, hyper)

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        if not self._steps(p):
            return None
        eps = float(group["eps"])
        inside = eps if self._eps_inside else 0.0
        v = of_parts(lambda u: (u - inside).clamp(min=0).square(), self._decoded(p, group, "exp_inf"))
        return Metric(v, eps=eps)


class Adamax(_LargestGradient, torch.optim.Adamax):
    r"""Adamax, a drop-in for :class:`torch.optim.Adamax`, in one pass; torch has no fused one.

    .. math::
        d_t = g_t + \lambda p_{t-1}, \quad m_t = \beta_1 m_{t-1} + (1-\beta_1) d_t, \quad
        u_t = \max(\beta_2 u_{t-1}, |d_t| + \epsilon)

        p_t = p_{t-1} - \gamma\, \frac{m_t/(1-\beta_1^t)}{u_t}

    Adam with the largest gradient, decayed, in place of the root of the mean square. A step is at most about lr.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32, bfloat16, float16 and
            complex64 are fused, everything else runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 2e-3).
        betas: decay rates of the mean and of the maximum, each in [0, 1) (default (0.9, 0.999)).
        eps: >= 0, added to each magnitude (default 1e-8).
        weight_decay: lambda >= 0, coupled: added to the gradient (default 0).
        foreach: accepted and ignored: a step is always one pass.
        maximize: ascend instead of descend (default False).
        differentiable: autograd sees the step, which runs on the reference backend (default False).
        capturable: step counters live on the GPU, so that a CUDA graph can capture the step (default False); an error at the
            step for parameters on the CPU, as in torch.
        fused: accepted, though torch's has no such argument; True lets ``torch.amp.GradScaler`` leave unscaling to the step, and
            keeps counters on the GPU.
        state_format: of the states: None is the parameter's dtype, as in torch; "fp32", "bf16", "fp16" or their torch
            dtypes; "int8" or "int4": codes with a scale per 64 elements, where rows are a multiple of that (docs/formats.md).
        weight_format: for bfloat16 and float16 parameters: None (default) rounds to nearest; "stochastic" keeps small changes
            on average; "split24" and "split32" keep 8 and 16 bits more of each beside it.
        **settings: ``backend``, ``max_grad_norm`` and others that every optimizer takes: :class:`precond.Settings`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    Warns:
        PrecisionWarning: once, for a bfloat16 u with betas[1] > 0.995, which rounds to nearest and cannot decay.

    State: ``step``, ``exp_avg``, ``exp_inf``, as torch.

    Source: Kingma and Ba 2015, arXiv 1412.6980, algorithm 2, with eps where torch.optim.Adamax has it.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.Adamax([w], lr=0.1)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.9, -1.9]
    """

    _name = "adamax"
    _eps_inside = True
    _group_options = {**FusedOptimizer._group_options, "fused": None}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        FusedOptimizer.__init__(self, params, defaults, settings=settings)


class AdamaxW(_LargestGradient):
    r"""Adamax with intrinsic decay, L2 and L1, in one pass.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad u_t = \max(\beta_2 u_{t-1}, |g_t|), \quad
        \mathrm{den} = u_t + \epsilon

        q = p_{t-1} - \gamma\lambda\, p_{t-1} - \gamma\, \frac{m_t/(1-\beta_1^t)}{\mathrm{den}}, \qquad
        p_t = S_\tau(q), \quad \tau = \gamma \min(\lambda_1\, \mathrm{den}^{-1/2},\, c)

    Adamax is gradient descent in z where p = P z, P = den^(-1/2); both decays are penalties on z. eps stands beside u, not in it
    as in :class:`precond.Adamax`, so that u says in every format which coordinates never had a gradient.

    Args:
        params, lr, betas, eps, foreach, maximize, differentiable, capturable: as for :class:`precond.Adamax`.
        fused, state_format, weight_format, settings: the same.
        weight_decay: intrinsic L2, lambda >= 0 (default 1e-2, as for AdamW).
        l1_decay: intrinsic L1, lambda_1 >= 0 (default 0: the plain rule, bit for bit). If the loss is multiplied by c,
            multiply it by sqrt(c); so unscale gradients first.
        l1_form: "proximal" (exact zeros; default) or "subgradient" (subtracts the threshold times the sign of p).
        l1_cap: c > 0, an upper bound of the threshold over lr (default 10). Coordinates that never had a gradient, where u is 0,
            have no threshold.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    Warns:
        PrecisionWarning: once, for a bfloat16 u with betas[1] > 0.995, which rounds to nearest and cannot decay.

    State: ``step``, ``exp_avg``, ``exp_inf``.

    Source: Kingma and Ba 2015, arXiv 1412.6980, algorithm 2; intrinsic decay: Ye, arXiv 2410.00232, whose abstract states the
    idea; the formulas for Adamax are derived in docs/theory.md, A.2.2.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.1]))
        >>> opt = precond.AdamaxW([w], lr=0.1, weight_decay=0.0, l1_decay=0.1)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.892929, -1.895, 0.0]
    """

    _name = "adamaxw"
    _eps_inside = False
    _group_options = {**FusedOptimizer._group_options, "fused": None, **L1_OPTIONS, "l1_cap": 10.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        l1_decay: float = 0.0,
        l1_form: str = "proximal",
        l1_cap: float = 10.0,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        super().__init__(params, defaults, settings=settings)
