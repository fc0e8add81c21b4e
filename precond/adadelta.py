"""Adadelta, and AdadeltaW with intrinsic decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import L1_OPTIONS, arguments, check_lr, check_nonnegative
from ._core.formats import StateFormat, is_coded
from ._core.metric import Metric, of_parts
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.rows import Row
from ._core.settings import Settings


class _RatioOfMeans(FusedOptimizer):
    """What Adadelta and AdadeltaW share; ``_name`` is that of the rule."""

    _name: str
    _older_options = {**FusedOptimizer._older_options, "capturable": False}

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        if not 0.0 <= defaults["rho"] <= 1.0:
            raise ValueError(f"Invalid rho value: {defaults['rho']} (rho must be in [0, 1])")
        check_nonnegative("epsilon value", "eps", defaults["eps"])
        check_nonnegative("weight_decay value", "weight_decay", defaults["weight_decay"])

    def _row(self, group: dict[str, Any]) -> Row:
        hyper = self._hyper(group, "rho", "eps")
        return Row(self._decayed(self._name, group), -1.0 if group["maximize"] else 1.0, hyper)

    @classmethod
    def _format_of_state(cls, name: str, group: dict[str, Any]) -> StateFormat:
        asked = super()._format_of_state(name, group)
        # A step multiplies acc_delta by rho + (1 - rho) g^2 / v, and v in codes makes the mean of 1 / v larger: where a gradient
        # is far below the largest of its 64, steps grew by 1000 in 600 steps.
        return "bf16" if name == "square_avg" and is_coded(asked) else asked

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        """That of the next step, if its gradients have the same mean of squares: acc_delta has this step in it already."""
        if not self._steps(p):
            return None
        eps = float(group["eps"])
        v, acc = (self._decoded(p, group, name) for name in ("square_avg", "acc_delta"))
        return Metric(of_parts(lambda v, acc: (v + eps) / (acc + eps), v, acc), known=v)


class Adadelta(_RatioOfMeans, torch.optim.Adadelta):
    r"""Adadelta, a drop-in for :class:`torch.optim.Adadelta`, in one pass; torch has no fused one.

    .. math::
        d_t = g_t + \lambda p_{t-1}, \quad v_t = \rho v_{t-1} + (1-\rho) d_t^2, \quad
        u_t = \frac{\sqrt{a_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}}\, d_t

        a_t = \rho a_{t-1} + (1-\rho) u_t^2, \quad p_t = p_{t-1} - \gamma u_t

    a, the mean square of past steps, takes the place of a learning rate, and gives u the unit of a parameter. It starts at 0,
    so eps decides how long the first steps are and how fast they grow.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32, bfloat16, float16 and
            complex64 are fused, everything else runs on the reference backend.
        lr: gamma >= 0, what u is multiplied with, a float or a tensor of one element (default 1.0).
        rho: decay rate of both means, in [0, 1] (default 0.9).
        eps: >= 0, added inside both roots (default 1e-6). With 0 no parameter ever moves.
        weight_decay: lambda >= 0, coupled: added to the gradient (default 0).
        foreach: accepted and ignored: a step is always one pass.
        capturable: step counters live on the GPU, so that a CUDA graph can capture the step (default False); an error at the
            step for parameters on the CPU, as in torch.
        maximize: ascend instead of descend (default False).
        differentiable: autograd sees the step, which runs on the reference backend (default False).
        fused: accepted, though torch's has no such argument; True lets ``torch.amp.GradScaler`` leave unscaling to the step, and
            keeps counters on the GPU.
        state_format: of the states: None is the parameter's dtype, as in torch; "fp32", "bf16", "fp16" or their torch
            dtypes; "int8" or "int4": acc_delta in codes with a scale per 64 elements, where rows are a multiple of that
            (docs/formats.md), and square_avg in bfloat16: in codes of few bits it makes steps wrong.
        weight_format: for bfloat16 and float16 parameters: None (default) rounds to nearest; "stochastic" keeps small changes
            on average; "split24" and "split32" keep 8 and 16 bits more of each beside it.
        **settings: ``backend``, ``max_grad_norm`` and others that every optimizer takes: :class:`precond.Settings`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    Warns:
        PrecisionWarning: once, for bfloat16 means with rho > 0.995, which round to nearest and cannot decay, and for float16
            ones, which underflow.

    State: ``step``, ``square_avg`` (v), ``acc_delta`` (a), as torch. No formula reads ``step``.

    Source: Zeiler 2012, arXiv 1212.5701, algorithm 1, with the factor lr of torch.optim.Adadelta.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.Adadelta([w], eps=1e-2)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.687652, -1.684756]
    """

    _name = "adadelta"
    _group_options = {**FusedOptimizer._group_options, "fused": None}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        FusedOptimizer.__init__(self, params, defaults, settings=settings)


class AdadeltaW(_RatioOfMeans):
    r"""Adadelta with intrinsic decay, L2 and L1, in one pass.

    .. math::
        v_t = \rho v_{t-1} + (1-\rho) g_t^2, \quad \mathrm{den} = \frac{\sqrt{v_t + \epsilon}}{\sqrt{a_{t-1} + \epsilon}}, \quad
        u_t = g_t / \mathrm{den}, \quad a_t = \rho a_{t-1} + (1-\rho) u_t^2

        q = p_{t-1} - \gamma\lambda\, p_{t-1} - \gamma\, u_t, \qquad
        p_t = S_\tau(q), \quad \tau = \gamma \min(\lambda_1\, \mathrm{den}^{-1/2},\, c)

    Adadelta is gradient descent in z where p = P z, P = den^(-1/2); both decays are penalties on z. a is the mean square of the
    gradient's part of past steps, without that of the decays.

    Args:
        params, lr, rho, eps, foreach, capturable, maximize, differentiable: as for :class:`precond.Adadelta`.
        fused, state_format, weight_format, settings: the same.
        weight_decay: intrinsic L2, lambda >= 0. A step removes lr * weight_decay of a parameter, and lr is 1 here: the default
            is 1e-5, which is what AdamW's 1e-2 removes at its lr of 1e-3.
        l1_decay: intrinsic L1, lambda_1 >= 0 (default 0: the plain rule, bit for bit).
        l1_form: "proximal" (exact zeros; default) or "subgradient" (subtracts the threshold times the sign of p).
        l1_cap: c > 0, an upper bound of the threshold over lr (default 10). Coordinates that never had a gradient, where v is 0,
            have no threshold.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    Warns:
        PrecisionWarning: once, for bfloat16 means with rho > 0.995, which round to nearest and cannot decay, and for float16
            ones, which underflow.

    State: ``step``, ``square_avg`` (v), ``acc_delta`` (a).

    Source: Zeiler 2012, arXiv 1212.5701, algorithm 1; intrinsic decay: Ye, arXiv 2410.00232, whose abstract states the idea; the
    formulas for Adadelta are derived in docs/theory.md, A.2.2.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.1]))
        >>> opt = precond.AdadeltaW([w], eps=1e-2, weight_decay=0.0, l1_decay=0.1)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.648134, -1.656682, 0.0]
    """

    _name = "adadeltaw"
    _group_options = {**FusedOptimizer._group_options, "fused": None, **L1_OPTIONS, "l1_cap": 10.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 1e-5,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
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
        super().__init__(params, defaults, settings=settings)
