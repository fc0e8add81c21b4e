"""Stochastic gradient descent: SGD, and SGDW with intrinsic decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import L1_OPTIONS, arguments, check_lr, check_nonnegative
from ._core.formats import StateFormat
from ._core.metric import Metric
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.rows import Row
from ._core.settings import Settings


class _Momentum(FusedOptimizer):
    """What SGD and SGDW share; ``_name`` is that of the rule without momentum."""

    _name: str
    _older_options = {**FusedOptimizer._older_options, "nesterov": False}

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        check_nonnegative("momentum value", "momentum", defaults["momentum"])
        check_nonnegative("weight_decay value", "weight_decay", defaults["weight_decay"])
        if defaults["nesterov"] and (defaults["momentum"] <= 0 or defaults["dampening"] != 0):
            raise ValueError(
                "Nesterov momentum requires a momentum and zero dampening, "
                f"got momentum={defaults['momentum']} and dampening={defaults['dampening']}"
            )

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        return Metric()

    def _row(self, group: dict[str, Any]) -> Row:
        suffix = "" if group["momentum"] == 0 else "_nesterov" if group["nesterov"] else "_momentum"
        hyper = self._hyper(group, "momentum", "dampening")
        return Row(self._decayed(self._name, group, suffix), -1.0 if group["maximize"] else 1.0, hyper)


class SGD(_Momentum, torch.optim.SGD):
    r"""Stochastic gradient descent with momentum, a drop-in for :class:`torch.optim.SGD`, in one pass.

    .. math::
        d_t = g_t + \lambda p_{t-1}, \quad
        b_t = \mu b_{t-1} + (1 - \tau) d_t \;(b_1 = d_1), \quad
        p_t = p_{t-1} - \gamma\, (b_t \text{ or, with Nesterov, } d_t + \mu b_t)

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32, bfloat16, float16 and
            complex64 are fused, everything else runs on the reference backend, as do sparse gradients.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-3).
        momentum: mu >= 0 (default 0: no momentum buffer).
        dampening: tau (default 0).
        weight_decay: lambda >= 0, coupled: added to the gradient (default 0).
        nesterov: Nesterov momentum; needs momentum > 0 and dampening = 0 (default False).
        maximize: ascend instead of descend (default False).
        foreach: accepted and ignored: a step is always one pass.
        differentiable: autograd sees the step, which runs on the reference backend (default False).
        fused: accepted; True also lets ``torch.amp.GradScaler`` leave unscaling to the step.
        state_format: of the momentum buffer: None is the parameter's dtype, as in torch; "fp32", "bf16", "fp16" or their torch
            dtypes; "int8" or "int4": codes with a scale per 64 elements, where rows are a multiple of that (docs/formats.md).
        weight_format: for bfloat16 and float16 parameters: None (default) rounds to nearest; "stochastic" keeps small changes
            on average; "split24" and "split32" keep 8 and 16 bits more of each beside it.
        **settings: ``backend``, ``max_grad_norm`` and others that every optimizer takes: :class:`precond.Settings`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient with weight decay, a wrong shape or device, or overlapping memory.

    The first step sets the buffer to the undampened gradient, as torch does. State: ``momentum_buffer``, dense also where
    gradients are sparse.

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

    _name = "sgd"
    _sparse_rules = frozenset({"sgd", "sgd_momentum", "sgd_nesterov"})

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
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        FusedOptimizer.__init__(self, params, defaults, settings=settings)


class SGDW(_Momentum):
    r"""SGD with momentum and decoupled decay, L2 and L1, in one pass.

    .. math::
        b_t = \mu b_{t-1} + (1 - \tau) g_t \;(b_1 = g_1), \quad
        q = p_{t-1} - \gamma\lambda\, p_{t-1} - \gamma\, (b_t \text{ or, with Nesterov, } g_t + \mu b_t), \quad
        p_t = S_{\gamma\lambda_1}(q)

    SGD descends in p itself (den = 1), so without momentum both decays are the plain L2 and L1 penalties on p. The momentum
    buffer is not normalised: a constant gradient is amplified by 1 / (1 - mu) and the decay is not, so that, compared with
    ``SGD``, the same ``weight_decay`` pulls (1 - mu) times as strongly.

    Args:
        params, lr, momentum, dampening, nesterov, maximize, foreach, differentiable: as for :class:`precond.SGD`.
        fused, state_format, weight_format, settings: the same.
        weight_decay: lambda >= 0, decoupled (default 1e-2, as for AdamW).
        l1_decay: lambda_1 >= 0, decoupled L1 (default 0: the plain rule, bit for bit).
        l1_form: "proximal" (a soft threshold S, exact zeros; default) or "subgradient".

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    State: ``momentum_buffer``.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 1 (with a constant schedule multiplier, and the decay
    scaled by lr as in AdamW); the L1 form is derived in docs/theory.md, A.2.2.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.01]))
        >>> opt = precond.SGDW([w], lr=0.1, weight_decay=0.0, l1_decay=0.5)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.75, -1.55, 0.0]
    """

    _name = "sgdw"
    _group_options = {**FusedOptimizer._group_options, **L1_OPTIONS}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 1e-2,
        nesterov: bool = False,
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
