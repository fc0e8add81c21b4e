"""Adam, and AdamW with intrinsic L2 and L1 decay."""

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


class Adam(FusedOptimizer, torch.optim.Adam):
    r"""Adam, a drop-in for :class:`torch.optim.Adam`, in one pass.

    .. math::
        d_t = g_t + \lambda p_{t-1}, \quad m_t = \beta_1 m_{t-1} + (1-\beta_1) d_t, \quad
        v_t = \beta_2 v_{t-1} + (1-\beta_2) d_t^2

        p_t = p_{t-1} - \gamma\, \frac{m_t/(1-\beta_1^t)}{\sqrt{v_t/(1-\beta_2^t)} + \epsilon}

    The weight decay is part of the gradient and is divided by den with it: where gradients are large, it is weak. Use
    :class:`precond.AdamW` for one that acts alike on all parameters.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32, bfloat16, float16 and
            complex64 are fused, everything else runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-3).
        betas: decay rates of the two moments, each in [0, 1) (default (0.9, 0.999)).
        eps: >= 0, added to the root of the second moment (default 1e-8).
        weight_decay: lambda >= 0, coupled: added to the gradient (default 0).
        amsgrad: use the largest second moment so far (default False).
        foreach: accepted and ignored: a step is always one pass.
        maximize: ascend instead of descend (default False).
        capturable: step counters live on the GPU, so that a CUDA graph can capture the step (default False); an error at the
            step for parameters on the CPU, as in torch, unless ``fused=True``.
        differentiable: autograd sees the step, which runs on the reference backend (default False).
        fused: accepted; True also lets ``torch.amp.GradScaler`` leave unscaling to the step, and keeps counters on the GPU.
        decoupled_weight_decay: True makes this AdamW, as in torch (default False).
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

    State: ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` (amsgrad), as torch.

    Source: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1; amsgrad: Reddi et al. 2018, arXiv 1904.09237, algorithm 2.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.Adam([w], lr=0.1)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.9, -1.9]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        FusedOptimizer.__init__(self, params, defaults, settings=settings)

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        lr, betas = defaults["lr"], defaults["betas"]
        if isinstance(lr, Tensor) and defaults["foreach"] and not defaults["capturable"]:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        check_lr(lr)
        check_nonnegative("epsilon value", "eps", defaults["eps"])
        betas = check_betas(betas)
        check_nonnegative("weight_decay value", "weight_decay", defaults["weight_decay"])
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor) or not all(
            isinstance(b, float | Tensor) for b in betas
        ):
            raise ValueError(f"betas must be either both floats or both Tensors, got {betas}")
        for i, beta in enumerate(betas):
            if isinstance(beta, Tensor) and defaults["foreach"] and not defaults["capturable"]:
                raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
        # Without dimensions, as torch keeps them.
        defaults["betas"] = tuple(beta.squeeze() if isinstance(beta, Tensor) else beta for beta in betas)

    def _row(self, group: dict[str, Any]) -> Row:
        suffix = "_amsgrad" if group["amsgrad"] else ""
        rule = self._decayed("adamw", group, suffix) if group["decoupled_weight_decay"] else "adam" + suffix
        hyper = self._hyper(group, "eps")
        hyper["beta1"], hyper["beta2"] = map(number, group["betas"])
        return Row(rule, -1.0 if group["maximize"] else 1.0, hyper)

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        step = self._steps(p)
        if not step:
            return None
        v = self._decoded(p, group, "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
        return Metric(v, 1.0 / (1.0 - float(group["betas"][1]) ** step), float(group["eps"]))


class AdamW(Adam, torch.optim.AdamW):
    r"""AdamW, a drop-in for :class:`torch.optim.AdamW`, in one pass, with an L1 counterpart to its weight decay.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \quad
        \mathrm{den} = \sqrt{v_t/(1-\beta_2^t)} + \epsilon

        q = p_{t-1} - \gamma\lambda\, p_{t-1} - \gamma\, \frac{m_t/(1-\beta_1^t)}{\mathrm{den}}, \qquad
        p_t = S_\tau(q), \quad \tau = \gamma \min(\lambda_1\, \mathrm{den}^{-1/2},\, c)

    Adam is gradient descent in z where p = den^(-1/2) z. Both decays are penalties on that intrinsic variable: L2 on z is
    AdamW's ``weight_decay``, L1 on z is ``l1_decay``, a soft threshold S that gives exact zeros. With gradients that
    settle (full batch), the penalty acts as l1_decay^2 times the L1 norm of p: active coordinates end at
    abs(gradient) = l1_decay^2.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32, bfloat16, float16 and
            complex64 are fused, everything else runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-3).
        betas: decay rates of the two moments, each in [0, 1) (default (0.9, 0.999)).
        eps: >= 0, added to the root of the second moment (default 1e-8).
        weight_decay: intrinsic L2, lambda >= 0 (default 1e-2).
        amsgrad: use the largest second moment so far (default False).
        maximize: ascend instead of descend (default False).
        foreach: accepted and ignored: a step is always one pass.
        capturable: step counters live on the GPU, so that a CUDA graph can capture the step (default False); an error at the
            step for parameters on the CPU, as in torch, unless ``fused=True``.
        differentiable: autograd sees the step, which runs on the reference backend (default False).
        fused: accepted; True also lets ``torch.amp.GradScaler`` leave unscaling to the step, and keeps counters on the GPU.
        l1_decay: intrinsic L1, lambda_1 >= 0 (default 0: the plain rule, bit for bit). If the loss is multiplied by c,
            multiply it by sqrt(c); so unscale gradients first.
        l1_form: "proximal" (exact zeros; default) or "subgradient" (subtracts the threshold times the sign of p).
        l1_cap: c > 0, an upper bound of the threshold over lr (default 10). Coordinates that never had a gradient have no
            threshold.
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

    State: ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` (amsgrad), as torch.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2. Intrinsic decay: Ye, arXiv 2410.00232, whose abstract
    states the L2 case and that an L1 generalisation exists; the L1 formula and the cap are derived here (docs/theory.md, A.2.2).

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.AdamW([w], lr=0.1)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.899, -1.898]
    """

    _group_options = {**Adam._group_options, **L1_OPTIONS, "l1_cap": 10.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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
