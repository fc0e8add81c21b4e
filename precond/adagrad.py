"""Adagrad, and AdagradW with intrinsic decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import L1_OPTIONS, arguments, check_lr, check_nonnegative, number
from ._core.formats import StateFormat
from ._core.metric import Metric
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.rows import Row
from ._core.settings import Settings


class _SumOfSquares(FusedOptimizer):
    """What Adagrad and AdagradW share; ``_name`` is that of the rule."""

    _name: str

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        check_lr(defaults["lr"])
        for name in ("lr_decay", "weight_decay", "initial_accumulator_value"):
            check_nonnegative(f"{name} value", name, defaults[name])
        check_nonnegative("epsilon value", "eps", defaults["eps"])

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, settings: Settings) -> None:
        FusedOptimizer.__init__(self, params, defaults, settings=settings)
        self._make_states()  # as torch: they exist before the first step

    def _make_states(self) -> None:
        states = self.states
        for index, group in enumerate(self.param_groups):
            for position, p in enumerate(group["params"]):
                states.ensure(f"parameter {position} of group {index}", p, group, self._row(group))

    def _row(self, group: dict[str, Any]) -> Row:
        rule = self._decayed(self._name, group)
        return Row(rule, -1.0 if group["maximize"] else 1.0, self._hyper(group, "lr_decay", "eps"))

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint. Accelerate and DeepSpeed put shards into the groups after the constructor has made states; torch's
        method raises KeyError for those. Here the parameters that are in the groups now have them.
        """
        known = {p for group in self.param_groups for p in group["params"]}
        gone = [p for p in self.state if p not in known]
        for p in gone:
            del self.state[p]
        if gone:
            self._make_states()
        return super().state_dict()

    @classmethod
    def _initial(cls, p: Tensor, group: dict[str, Any]) -> complex:
        value = group["initial_accumulator_value"]
        value = float(value.detach() if isinstance(value, Tensor) else number(value))
        return complex(value, value) if p.is_complex() else value

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        if not self._steps(p):
            return None
        return Metric(self._decoded(p, group, "sum"), eps=float(group["eps"]))


class Adagrad(_SumOfSquares, torch.optim.Adagrad):
    r"""Adagrad, a drop-in for :class:`torch.optim.Adagrad`, in one pass.

    .. math::
        d_t = g_t + \lambda p_{t-1}, \quad s_t = s_{t-1} + d_t^2, \quad
        p_t = p_{t-1} - \frac{\gamma}{1 + (t-1)\eta}\, \frac{d_t}{\sqrt{s_t} + \epsilon}

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32, bfloat16, float16 and
            complex64 are fused, everything else runs on the reference backend, as do sparse gradients.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-2).
        lr_decay: eta >= 0 (default 0).
        weight_decay: lambda >= 0, coupled: added to the gradient (default 0).
        initial_accumulator_value: what s starts from, >= 0 (default 0).
        eps: >= 0, added to the root of s (default 1e-10).
        foreach: accepted and ignored: a step is always one pass.
        maximize: ascend instead of descend (default False).
        differentiable: autograd sees the step, which runs on the reference backend (default False).
        fused: accepted; True also lets ``torch.amp.GradScaler`` leave unscaling to the step, and keeps counters on the GPU.
        state_format: of s: None is the parameter's dtype, as in torch; "fp32", "bf16", "fp16" or their torch
            dtypes; "int8" or "int4": codes with a scale per 64 elements, where rows are a multiple of that (docs/formats.md).
        weight_format: for bfloat16 and float16 parameters: None (default) rounds to nearest; "stochastic" keeps small changes
            on average; "split24" and "split32" keep 8 and 16 bits more of each beside it.
        **settings: ``backend``, ``max_grad_norm`` and others that every optimizer takes: :class:`precond.Settings`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient with weight decay, a wrong shape or device, or overlapping memory.

    Warns:
        PrecisionWarning: once, for an s in 16 bits, which stops growing or underflows.

    State, from the constructor on as in torch: ``step``, ``sum``.

    Source: Duchi, Hazan and Singer 2011, JMLR 12, figure 1, the diagonal case.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.Adagrad([w], lr=0.1)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.9, -1.9]
    """

    _name = "adagrad"
    _sparse_rules = frozenset({"adagrad"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        _SumOfSquares.__init__(self, params, defaults, settings=settings)


class AdagradW(_SumOfSquares):
    r"""Adagrad with intrinsic decay, L2 and L1, in one pass.

    .. math::
        s_t = s_{t-1} + g_t^2, \quad \mathrm{den} = \sqrt{s_t} + \epsilon, \quad \gamma_t = \frac{\gamma}{1 + (t-1)\eta}

        q = p_{t-1} - \gamma_t\lambda\, p_{t-1} - \gamma_t\, \frac{g_t}{\mathrm{den}}, \qquad
        p_t = S_\tau(q), \quad \tau = \gamma_t \min(\lambda_1\, \mathrm{den}^{-1/2},\, c)

    Adagrad is gradient descent in z where p = den^(-1/2) z; both decays are penalties on z. s grows with every step and the
    gradient's part shrinks as t^(-1/2), which the L2 decay does not: its weight against the loss grows as sqrt(s), that of L1
    as s^(1/4).

    Args:
        params, lr, lr_decay, initial_accumulator_value, eps, foreach, maximize, differentiable: as for :class:`precond.Adagrad`.
        fused, state_format, weight_format, settings: the same.
        weight_decay: intrinsic L2, lambda >= 0 (default 1e-2, as for AdamW).
        l1_decay: intrinsic L1, lambda_1 >= 0 (default 0: the plain rule, bit for bit).
        l1_form: "proximal" (exact zeros; default) or "subgradient" (subtracts the threshold times the sign of p).
        l1_cap: c > 0, an upper bound of the threshold over lr (default 10). Coordinates that never had a gradient, where s is 0,
            have no threshold.

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    Warns:
        PrecisionWarning: once, for an s in 16 bits, which stops growing or underflows.

    State, from the constructor on as in torch: ``step``, ``sum``.

    Source: Duchi, Hazan and Singer 2011; intrinsic decay: Ye, arXiv 2410.00232, whose abstract states the idea; the formulas
    for Adagrad are derived in docs/theory.md, A.2.2.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.1]))
        >>> opt = precond.AdagradW([w], lr=0.1, weight_decay=0.0, l1_decay=0.1)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.892929, -1.895, 0.0]
    """

    _name = "adagradw"
    _group_options = {**FusedOptimizer._group_options, **L1_OPTIONS, "l1_cap": 10.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 1e-2,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
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
