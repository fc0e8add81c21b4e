"""RAdam, and RAdamW with intrinsic L2 and L1 decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import L1_OPTIONS, arguments, check_betas, check_lr, check_nonnegative, number
from ._core.formats import StateFormat
from ._core.metric import Metric
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.rows import Row
from ._core.settings import Settings
from .reference.radam import rectification


class RAdam(FusedOptimizer, torch.optim.RAdam):
    r"""RAdam, a drop-in for :class:`torch.optim.RAdam`, in one pass; torch has no fused one.

    .. math::
        d_t = g_t + \lambda p_{t-1}, \quad m_t = \beta_1 m_{t-1} + (1-\beta_1) d_t, \quad
        v_t = \beta_2 v_{t-1} + (1-\beta_2) d_t^2

        \rho_\infty = \frac{2}{1-\beta_2} - 1, \quad \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1-\beta_2^t}, \quad
        r_t = \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}}

        p_t = p_{t-1} - \gamma\, \frac{m_t/(1-\beta_1^t)}{\mathrm{den}}, \qquad
        \mathrm{den} = \frac{\sqrt{v_t} + \epsilon}{r_t \sqrt{1-\beta_2^t}} \;\text{ where } \rho_t > 5, \text{ else } 1

    Adam with a warm-up of its own: while v is a mean of too few squares a step is one of momentum, and then it is
    shortened by r, which tends to 1.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32, bfloat16, float16 and
            complex64 are fused, everything else runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-3).
        betas: decay rates of the two moments, each in [0, 1) (default (0.9, 0.999)). With betas[1] <= 2/3 the warm-up never ends.
        eps: >= 0, added to the root of the second moment, which is not corrected for its start (default 1e-8).
        weight_decay: lambda >= 0, coupled: added to the gradient (default 0).
        decoupled_weight_decay: True makes this RAdamW without L1, as in torch (default False).
        foreach: accepted and ignored: a step is always one pass.
        maximize: ascend instead of descend (default False).
        capturable: step counters live on the GPU, so that a CUDA graph can capture the step (default False); an error at the
            step for parameters on the CPU, as in torch.
        differentiable: autograd sees the step, which runs on the reference backend (default False).
        fused: accepted, though torch's has no such argument; True lets ``torch.amp.GradScaler`` leave unscaling to the step, and
            keeps counters on the GPU.
        state_format: of the moments: None is the parameter's dtype, as in torch; "fp32", "bf16", "fp16" or their torch
            dtypes; "int8" or "int4": codes with a scale per 64 elements, where rows are a multiple of that (docs/formats.md).
        weight_format: for bfloat16 and float16 parameters: None (default) rounds to nearest; "stochastic" keeps small changes
            on average; "split24" and "split32" keep 8 and 16 bits more of each beside it.
        **settings: ``backend``, ``max_grad_norm`` and others that every optimizer takes: :class:`precond.Settings`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    Warns:
        PrecisionWarning: once, for a bfloat16 second moment with betas[1] > 0.995, which rounds to nearest and cannot decay,
            and for a float16 one, which underflows.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``, as torch.

    Source: Liu et al. 2020, arXiv 1908.03265, algorithm 2, as torch.optim.RAdam defines it.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.RAdam([w], lr=0.1)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.8, -1.6]
    """

    _group_options = {**FusedOptimizer._group_options, "fused": None}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        FusedOptimizer.__init__(self, params, defaults, settings=settings)

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        check_nonnegative("epsilon value", "eps", defaults["eps"])
        defaults["betas"] = check_betas(defaults["betas"])
        check_nonnegative("weight_decay value", "weight_decay", defaults["weight_decay"])

    def _row(self, group: dict[str, Any]) -> Row:
        rule = self._decayed("radamw", group) if group["decoupled_weight_decay"] else "radam"
        hyper = self._hyper(group, "eps")
        hyper["beta1"], hyper["beta2"] = map(number, group["betas"])
        return Row(rule, -1.0 if group["maximize"] else 1.0, hyper)

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        step = self._steps(p)
        if not step:
            return None
        square = float(rectification(float(group["betas"][1]), step))
        if square == 0.0:
            return Metric()
        v = self._decoded(p, group, "exp_avg_sq")
        return Metric(v, 1.0 / square, float(group["eps"]) / square**0.5)


class RAdamW(RAdam):
    r"""RAdam with intrinsic decay, L2 and L1, in one pass.

    .. math::
        q = p_{t-1} - \gamma\lambda\, p_{t-1} - \gamma\, \frac{m_t/(1-\beta_1^t)}{\mathrm{den}}, \qquad
        p_t = S_\tau(q), \quad \tau = \gamma \min(\lambda_1\, \mathrm{den}^{-1/2},\, c)

    with m and den as for :class:`precond.RAdam`, from the gradient alone. RAdam is gradient descent in z where p = P z,
    P = den^(-1/2), and P is the identity in the warm-up. Both decays are penalties on z: in the warm-up the threshold of L1 is
    lr min(l1_decay, l1_cap), as for SGDW, because den is 1 there. After it r makes den large and thresholds small, until r is 1.
    L2 is that of ``torch.optim.RAdam(decoupled_weight_decay=True)``, whose checkpoints this class takes.

    Args:
        params, lr, betas, eps, foreach, maximize, capturable, differentiable: as for :class:`precond.RAdam`.
        fused, state_format, weight_format, settings: the same.
        weight_decay: intrinsic L2, lambda >= 0 (default 1e-2, as for AdamW).
        l1_decay: intrinsic L1, lambda_1 >= 0 (default 0: the plain rule, bit for bit).
        l1_form: "proximal" (exact zeros; default) or "subgradient" (subtracts the threshold times the sign of p).
        l1_cap: c > 0, an upper bound of the threshold over lr (default 10). Coordinates that never had a gradient have no
            threshold, in the warm-up neither.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    Warns:
        PrecisionWarning: once, for a bfloat16 second moment with betas[1] > 0.995, which rounds to nearest and cannot decay,
            and for a float16 one, which underflows.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``.

    Source: Liu et al. 2020, arXiv 1908.03265; decoupled decay as torch.optim.RAdam has it; intrinsic L1: Ye, arXiv 2410.00232,
    whose abstract states the idea; the formula is derived in docs/theory.md, A.2.2.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.01]))
        >>> opt = precond.RAdamW([w], lr=0.01, weight_decay=0.0, l1_decay=1.0)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.97, -1.95, 0.0]
    """

    _group_options = {**RAdam._group_options, **L1_OPTIONS, "l1_cap": 10.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        l1_decay: float = 0.0,
        l1_form: str = "proximal",
        l1_cap: float = 10.0,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals()) | {"decoupled_weight_decay": True}
        FusedOptimizer.__init__(self, params, defaults, settings=settings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
