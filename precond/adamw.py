"""AdamW with intrinsic L2 and L1 decay."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._optimizer import FusedOptimizer, ParamsT, PrecisionWarning, check_nonnegative, number
from ._plan import Row


class AdamW(FusedOptimizer):
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
        params: parameters, named parameters or groups, as for any torch optimizer. Any shape; float32 and bfloat16 are
            fused, everything else runs on the reference backend.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-3).
        betas: decay rates of the two moments, each in [0, 1) (default (0.9, 0.999)).
        eps: >= 0, added to the root of the second moment (default 1e-8).
        weight_decay: intrinsic L2, lambda >= 0 (default 1e-2).
        amsgrad: use the largest second moment so far (default False).
        maximize: ascend instead of descend (default False).
        foreach: accepted and ignored: a step is always one pass.
        capturable: step counters live on the GPU, so that a CUDA graph can capture the step (default False); an error at the
            step for parameters on the CPU, as in torch.
        differentiable: must be False.
        fused: accepted; True also lets ``torch.amp.GradScaler`` leave unscaling to the step, and keeps counters on the GPU.
        l1_decay: intrinsic L1, lambda_1 >= 0 (default 0: the plain rule, bit for bit). If the loss is multiplied by c,
            multiply it by sqrt(c); so unscale gradients first.
        l1_form: "proximal" (exact zeros; default) or "subgradient" (subtracts the threshold times the sign of p).
        l1_cap: c > 0, an upper bound of the threshold over lr (default 10). Coordinates that never had a gradient have no
            threshold.
        state_format: dtype of the moments: None is the parameter's, as in torch, or "fp32", "bf16" or their torch dtypes.
        backend: None picks the best per parameter, or "cpu", "cuda", "triton", "reference".

    Raises:
        ValueError: a hyper-parameter is out of range.
        RuntimeError: at the step, for a sparse gradient, a wrong shape or device, or overlapping memory.

    Warns:
        PrecisionWarning: once, for a bfloat16 second moment with betas[1] > 0.995: rounding to nearest, it cannot decay.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` (amsgrad), as torch.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2. Intrinsic decay: Ye, arXiv 2410.00232, whose abstract
    states the L2 case and that an L1 generalisation exists; the L1 formula and the cap are derived here (METHODS A.2.2).

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = precond.AdamW([w], lr=0.1)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> [round(x, 6) for x in w.tolist()]
        [0.899, -1.898]
    """

    _state_names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _counts_steps = True
    _group_options = {"l1_decay": 0.0, "l1_form": "proximal", "l1_cap": 10.0, "state_format": None}

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
        state_format: str | None = None,
        backend: str | None = None,
    ) -> None:
        if isinstance(lr, Tensor):
            if foreach and not capturable:
                raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
            if lr.numel() != 1:
                raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
        check_nonnegative("learning rate", "lr", lr)
        check_nonnegative("epsilon value", "eps", eps)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta} (it must be in [0, 1))")
        check_nonnegative("weight_decay value", "weight_decay", weight_decay)
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor) or not all(
            isinstance(b, float | Tensor) for b in betas
        ):
            raise ValueError(f"betas must be either both floats or both Tensors, got {betas}")
        for i, beta in enumerate(betas):
            if isinstance(beta, Tensor):
                if foreach and not capturable:
                    raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
                if beta.numel() != 1:
                    raise ValueError(f"Tensor betas[{i}] must be 1-element, got {beta.numel()} elements")
        defaults: dict[str, Any] = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            l1_decay=l1_decay,
            l1_form=l1_form,
            l1_cap=l1_cap,
            state_format=state_format,
        )
        super().__init__(params, defaults, backend=backend)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_nonnegative("l1_decay value", "l1_decay", group.get("l1_decay", 0.0))
        if not group.get("l1_cap", 10.0) > 0.0:
            raise ValueError(f"l1_cap must be > 0, got {group['l1_cap']}")
        if group.get("l1_form", "proximal") not in ("proximal", "subgradient"):
            raise ValueError(f"l1_form must be 'proximal' or 'subgradient', got {group['l1_form']!r}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("capturable", False)
            group["decoupled_weight_decay"] = True

    def _row(self, group: dict[str, Any]) -> Row:
        if (
            group["capturable"]
            and not _backend.cuda_on_host()
            and any(p.device.type == "cpu" and p.grad is not None for p in group["params"])
        ):
            raise RuntimeError("capturable must be False for parameters on the CPU, got capturable=True")
        l1_decay = float(group.get("l1_decay", 0.0))
        rule = "adamw"
        if l1_decay != 0.0:
            rule += "_l1" if group.get("l1_form", "proximal") == "proximal" else "_l1_subgradient"
        if group["amsgrad"]:
            rule += "_amsgrad"
        beta1, beta2 = group["betas"]
        hyper = {
            "lr": number(group["lr"]),
            "beta1": number(beta1),
            "beta2": number(beta2),
            "eps": number(group["eps"]),
            "weight_decay": number(group["weight_decay"]),
            "l1_decay": l1_decay,
            "l1_cap": float(group.get("l1_cap", 10.0)),
        }
        return Row(rule, -1.0 if group["maximize"] else 1.0, hyper)

    def _warn_precision(self, name: str, dtype: torch.dtype, group: dict[str, Any]) -> None:
        if name == "exp_avg_sq" and dtype == torch.bfloat16 and group["betas"][1] > 0.995 and not self._warned:
            self._warned = True
            warnings.warn(
                f"a bfloat16 exp_avg_sq with betas[1] = {group['betas'][1]} > 0.995 cannot decay under rounding to nearest; "
                "state_format='fp32' keeps the moments in float32",
                PrecisionWarning,
                stacklevel=2,
            )
