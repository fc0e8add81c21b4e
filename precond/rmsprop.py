"""RMSprop, and RMSpropW with intrinsic decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import L1_OPTIONS, arguments, check_lr, check_nonnegative
from ._core.formats import StateFormat
from ._core.metric import Metric, of_parts
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.rows import Row
from ._core.settings import Settings


class _MeanOfSquares(FusedOptimizer):
    """What RMSprop and RMSpropW share; ``_name`` is that of the rule without momentum and centering."""

    _name: str
    _older_options = {**FusedOptimizer._older_options, "momentum": 0, "centered": False, "capturable": False}

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        check_nonnegative("epsilon value", "eps", defaults["eps"])
        for name in ("momentum", "weight_decay", "alpha"):
            check_nonnegative(f"{name} value", name, defaults[name])

    def _row(self, group: dict[str, Any]) -> Row:
        suffix = ("_centered" if group["centered"] else "") + ("_momentum" if group["momentum"] > 0 else "")
        hyper = self._hyper(group, "alpha", "eps", "momentum")
        return Row(self._decayed(self._name, group, suffix), -1.0 if group["maximize"] else 1.0, hyper)

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        if not self._steps(p):
            return None
        v = self._decoded(p, group, "square_avg")
        if group["centered"]:
            v = of_parts(lambda v, mean: (v - mean.square()).clamp(min=0), v, self._decoded(p, group, "grad_avg"))
        return Metric(v, eps=float(group["eps"]))


class RMSprop(_MeanOfSquares, torch.optim.RMSprop):
    r"""RMSprop, a drop-in for :class:`torch.optim.RMSprop`, in one pass; torch has no fused one.

    .. math::
        d_t = g_t + \lambda p_{t-1}, \quad v_t = \alpha v_{t-1} + (1-\alpha) d_t^2, \quad
        a_t = \alpha a_{t-1} + (1-\alpha) d_t

        \mathrm{den} = \sqrt{v_t \;(\text{centered: } \max(v_t - a_t^2, 0))} + \epsilon, \quad
        b_t = \mu b_{t-1} + d_t / \mathrm{den}, \quad p_t = p_{t-1} - \gamma b_t

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32, bfloat16, float16 and
            complex64 are fused, everything else runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-2).
        alpha: smoothing of v and a, >= 0 (default 0.99).
        eps: >= 0, added to the root (default 1e-8).
        weight_decay: lambda >= 0, coupled: added to the gradient (default 0).
        momentum: mu >= 0 (default 0: no momentum buffer).
        centered: divide by the root of the variance instead of the second moment (default False). The variance is kept from
            falling below 0 by rounding, where torch's step becomes NaN: with some constant gradients, after about 1200 steps.
            Where it is 0, eps alone divides: choose a larger one.
        capturable: step counters live on the GPU, so that a CUDA graph can capture the step (default False); an error at the
            step for parameters on the CPU, as in torch.
        foreach: accepted and ignored: a step is always one pass.
        maximize: ascend instead of descend (default False).
        differentiable: autograd sees the step, which runs on the reference backend (default False).
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
        PrecisionWarning: once, for a bfloat16 v with alpha > 0.995, which rounds to nearest and cannot decay, and for a float16
            one, which underflows.

    State: ``step``, ``square_avg``, ``momentum_buffer`` (momentum), ``grad_avg`` (centered), as torch.

    Source: Tieleman and Hinton 2012, lecture 6.5; centered: Graves 2013, arXiv 1308.0850, as torch.optim.RMSprop defines them.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.RMSprop([w], lr=0.01)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.9, -1.9]
    """

    _name = "rmsprop"
    _group_options = {**FusedOptimizer._group_options, "fused": None}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        FusedOptimizer.__init__(self, params, defaults, settings=settings)


class RMSpropW(_MeanOfSquares):
    r"""RMSprop with intrinsic decay, L2 and L1, in one pass.

    .. math::
        q = p_{t-1} - \gamma\lambda\, p_{t-1} - \gamma\, b_t, \qquad
        p_t = S_\tau(q), \quad \tau = \gamma \min(\lambda_1\, \mathrm{den}^{-1/2},\, c)

    with den and b as for :class:`precond.RMSprop`, from the gradient alone. RMSprop is gradient descent in z where
    p = den^(-1/2) z; both decays are penalties on z. Without a bias correction den is small in the first 1 / (1 - alpha) steps
    and thresholds are large: warm l1_decay up.

    Args:
        params, lr, alpha, eps, momentum, centered, capturable, foreach, maximize, differentiable: as for
            :class:`precond.RMSprop`.
        fused, state_format, weight_format, settings: the same.
        weight_decay: intrinsic L2, lambda >= 0 (default 1e-2, as for AdamW).
        l1_decay: intrinsic L1, lambda_1 >= 0 (default 0: the plain rule, bit for bit).
        l1_form: "proximal" (exact zeros; default) or "subgradient" (subtracts the threshold times the sign of p).
        l1_cap: c > 0, an upper bound of the threshold over lr (default 10). Coordinates that never had a gradient have no
            threshold.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    Warns:
        PrecisionWarning: once, for a bfloat16 v with alpha > 0.995, which rounds to nearest and cannot decay, and for a float16
            one, which underflows.

    State: ``step``, ``square_avg``, ``momentum_buffer`` (momentum), ``grad_avg`` (centered).

    Source: Tieleman and Hinton 2012, lecture 6.5; intrinsic decay: Ye, arXiv 2410.00232, whose abstract states the idea; the
    formulas for RMSprop are derived in docs/theory.md, A.2.2.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.1]))
        >>> opt = precond.RMSpropW([w], lr=0.01, weight_decay=0.0, l1_decay=1.0)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.877639, -1.884189, 0.0]
    """

    _name = "rmspropw"
    _group_options = {**FusedOptimizer._group_options, "fused": None, **L1_OPTIONS, "l1_cap": 10.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
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
