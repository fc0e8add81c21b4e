"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._optimizer import FusedOptimizer, ParamsT, check_nonnegative, number
from ._plan import Row


class SGD(FusedOptimizer):
    r"""Stochastic gradient descent with momentum, a drop-in for :class:`torch.optim.SGD`, in one pass.

    .. math::
        d_t = g_t + \lambda p_{t-1}, \quad
        b_t = \mu b_{t-1} + (1 - \tau) d_t \;(b_1 = d_1), \quad
        p_t = p_{t-1} - \gamma\, (b_t \text{ or, with Nesterov, } d_t + \mu b_t)

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32 and bfloat16 are
            fused, everything else runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-3).
        momentum: mu >= 0 (default 0: no momentum buffer).
        dampening: tau (default 0).
        weight_decay: lambda >= 0, coupled: added to the gradient (default 0).
        nesterov: Nesterov momentum; needs momentum > 0 and dampening = 0 (default False).
        maximize: ascend instead of descend (default False).
        foreach: accepted and ignored: a step is always one pass.
        differentiable: must be False.
        fused: accepted; True also lets ``torch.amp.GradScaler`` leave unscaling to the step.
        state_format: dtype of the momentum buffer: None is the parameter's, or "fp32", "bf16" or their torch dtypes.
        backend: None picks the best per parameter, or "cpu", "cuda", "triton", "reference".

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    The first step sets the buffer to the undampened gradient, as torch does. State: ``momentum_buffer``.

    Source: Polyak 1964; Sutskever et al. 2013 as torch.optim.SGD defines them.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.SGD([w], lr=0.1, momentum=0.9)
        >>> for _ in range(2):
        ...     opt.zero_grad()
        ...     (w**2).sum().backward()
        ...     opt.step()
        >>> w.tolist()
        [0.46000000834465027, -0.9200000166893005]
    """

    _state_names = ("momentum_buffer",)
    _group_options = {"state_format": None}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        state_format: str | None = None,
        backend: str | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
        check_nonnegative("learning rate", "lr", lr)
        check_nonnegative("momentum value", "momentum", momentum)
        check_nonnegative("weight_decay value", "weight_decay", weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                "Nesterov momentum requires a momentum and zero dampening, "
                f"got momentum={momentum} and dampening={dampening}"
            )
        defaults: dict[str, Any] = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            state_format=state_format,
        )
        super().__init__(params, defaults, backend=backend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)

    def _row(self, group: dict[str, Any]) -> Row:
        rule = "sgd" if group["momentum"] == 0 else "sgd_nesterov" if group["nesterov"] else "sgd_momentum"
        hyper = {name: number(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay")}
        return Row(rule, -1.0 if group["maximize"] else 1.0, hyper)
