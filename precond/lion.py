"""Lion with intrinsic decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import L1_OPTIONS, arguments, check_betas, check_lr, check_nonnegative, number
from ._core.formats import StateFormat
from ._core.metric import Metric
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.rows import Row
from ._core.settings import Settings


class Lion(FusedOptimizer):
    r"""Lion: the sign of an interpolated momentum, with decoupled decay, L2 and L1, in one pass.

    .. math::
        u_t = \mathrm{sign}(\beta_1 m_{t-1} + (1-\beta_1) g_t), \quad m_t = \beta_2 m_{t-1} + (1-\beta_2) g_t

        q = p_{t-1} - \gamma\lambda\, p_{t-1} - \gamma\, u_t, \qquad p_t = S_{\gamma\lambda_1}(q)

    Every coordinate moves by lr: take a learning rate 3 to 10 times smaller than AdamW's and a weight decay as many times
    larger. One state of the parameter's size, half of AdamW's.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32, bfloat16, float16 and
            complex64 are fused, everything else runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-4).
        betas: of the interpolation and of the momentum, each in [0, 1) (default (0.9, 0.99)).
        weight_decay: lambda >= 0, decoupled (default 0).
        maximize: ascend instead of descend (default False).
        foreach: accepted and ignored: a step is always one pass.
        differentiable: autograd sees the step, which runs on the reference backend (default False). A sign has no slope.
        fused: accepted; True also lets ``torch.amp.GradScaler`` leave unscaling to the step.
        l1_decay: lambda_1 >= 0, decoupled L1 with den = 1 (default 0: the plain rule, bit for bit). The steps have the size of
            lr whatever the gradient, so below 1 it shrinks no parameter that its gradient pushes steadily.
        l1_form: "proximal" (a soft threshold S, exact zeros; default) or "subgradient".
        state_format: of the momentum: None is the parameter's dtype, as in torch; "fp32", "bf16", "fp16" or their torch
            dtypes; "int8" or "int4": codes with a scale per 64 elements, where rows are a multiple of that (docs/formats.md).
        weight_format: for bfloat16 and float16 parameters: None (default) rounds to nearest; "stochastic" keeps small changes
            on average; "split24" and "split32" keep 8 and 16 bits more of each beside it.
        **settings: ``backend``, ``max_grad_norm`` and others that every optimizer takes: :class:`precond.Settings`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    State: ``exp_avg``.

    Source: Chen et al. 2023, arXiv 2302.06675, algorithm 2; the L1 form is derived in docs/theory.md, A.2.2.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.Lion([w], lr=0.1)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.9, -1.9]
    """

    _group_options = {**FusedOptimizer._group_options, **L1_OPTIONS}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        l1_decay: float = 0.0,
        l1_form: str = "proximal",
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        super().__init__(params, defaults, settings=settings)

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        defaults["betas"] = check_betas(defaults["betas"])
        check_nonnegative("weight_decay value", "weight_decay", defaults["weight_decay"])

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        return Metric(why_not="its steps are signs")

    def _row(self, group: dict[str, Any]) -> Row:
        hyper = self._hyper(group)
        hyper["beta1"], hyper["beta2"] = map(number, group["betas"])
        return Row(self._decayed("lion", group), -1.0 if group["maximize"] else 1.0, hyper)
