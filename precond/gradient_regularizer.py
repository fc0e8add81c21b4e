"""Gradient regularisation in the variable that an optimizer descends in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._core.optimizer import FusedOptimizer
from ._core.passes import Job, Pass
from ._core.sharding import local
from ._wrappers.wrapper import Wrapper

T = TypeVar("T")


class GradientRegularizer(Wrapper):
    r"""Penalises the gradient in the intrinsic variable z of p = P z, by a second gradient near the first.

    .. math::
        u = P P^T g_1, \qquad g_1 = \nabla L(p), \quad g_2 = \nabla L(p + r u), \qquad
        \tilde g = g_1 + \frac{\rho}{r}\,(g_2 - g_1) \approx \nabla\Big(L + \frac{\rho}{2}\,\|P^T \nabla L\|^2\Big)

    with P held constant, as the last step left it; base then steps on the last. For AdamW u is the gradient over den, so sharp
    directions are measured where the optimizer moves, not in p. rho = r gives g_2 alone, as sharpness-aware minimisation. Moving
    to p + r u is one fused pass that saves p; p comes back bit for bit.

    Args:
        base: an optimizer of precond. P P^T = 1 / den for the Adam, Adagrad and RMSprop classes and for GaussNewton and Sophia
            without a basis; the identity for SGD, and for Lion, DualDescent and Muon, which have no P of this form.
        rho: >= 0, the strength (default 0.01). A quadratic needs lr (l + rho l^2) < 2, l the largest eigenvalue of P^T H P.
        radius: r > 0, of the finite difference (default 1e-3). Its error grows with r, rounding with 1 / r.

    Raises:
        TypeError: base is not one of precond's, or rotates.
        ValueError: rho or radius out of range.
        RuntimeError: a step without a closure, a sparse gradient.

    ``step(closure)`` evaluates the closure twice and returns its first value: layers that draw random numbers draw again, and
    running statistics see both points. The first step of each parameter, and coordinates that never had a gradient, have no P
    yet: there p is not moved. ``.grad`` is afterwards the combination. Clipping and other settings of base apply to it.

    State: none; a copy of the parameters during the step.

    Source: Ye, arXiv 2410.00232, whose first version's abstract names the method; the two-gradient form, what feeds base's
    moments and the defaults are this project's (METHODS A.2.3).

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> base = precond.SGD([w], lr=0.1)
        >>> opt = precond.GradientRegularizer(base, rho=0.1)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = (0.5 * torch.tensor([1.0, 4.0]) * w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(2):
        ...     _ = opt.step(closure)
        >>> [round(x, 3) for x in w.tolist()]  # curvatures 1 and 4 count as 1.1 and 5.6
        [0.792, 0.194]
    """

    _prefix = "gradient_regularizer"

    def __init__(self, base: FusedOptimizer, rho: float = 0.01, radius: float = 1e-3) -> None:
        super().__init__(base)
        if not isinstance(base, FusedOptimizer):
            raise TypeError(f"base must be an optimizer of precond, got {type(base).__name__}")
        if not rho >= 0.0:
            raise ValueError(f"rho must be >= 0, got {rho}")
        if not radius > 0.0:
            raise ValueError(f"radius must be > 0, got {radius}")
        self.rho, self.radius = float(rho), float(radius)

    def _set_up(self) -> None:
        super()._set_up()
        self._passes: dict[str, Pass] = {}
        self._backups: dict[Tensor, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("_passes", "_backups")}

    def step(self, closure: Callable[[], T] | None = None) -> T:
        """Evaluate the closure here and at p + r u, and step on the combination of both gradients."""
        if closure is None:
            raise RuntimeError("GradientRegularizer.step needs a closure that evaluates the loss and its gradients")
        with torch.enable_grad():
            loss = closure()
        if self.rho > 0.0:
            self._combine(closure)
        self.base.step()
        return loss

    @torch.no_grad()
    def _combine(self, closure: Callable[[], T]) -> None:
        first = {p: p.grad for p in self._params() if p.grad is not None and self._has_metric(p)}
        jobs: dict[str, list[Job]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p in first:
                    rule, job = self._job(p, first[p], group)
                    jobs.setdefault(rule, []).append(job)
        if not jobs:
            return
        base: Any = self.base
        split = base.states.remainders.watched()
        base.states.begin(split)
        others = {p: p.grad for p in self._params() if p not in first}
        for p in self._params():
            p.grad = None  # a closure may zero gradients in place
        for rule, of_rule in jobs.items():
            names = ("backup", "v") if rule == "perturb_adaptive" else ("backup",)
            if rule not in self._passes:
                self._passes[rule] = Pass(rule, names, base.engine.settings["backend"], counts=False)
            self._passes[rule].run(of_rule)
        try:
            with torch.enable_grad():
                closure()
        finally:
            for p in first:
                p.copy_(self._backups[p])
            # What a split weight lacks of its master still belongs to it.
            base.states.end(split)
        for p, g in first.items():
            p.grad = g if p.grad is None else g.lerp(p.grad, self.rho / self.radius)
        for p, grad in others.items():
            p.grad = grad

    def _has_metric(self, p: Tensor) -> bool:
        """False before a parameter's first step where P comes from states."""
        return not getattr(self.base, "_second_moment", None) or bool(self.base.state.get(p))

    def _job(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> tuple[str, Job]:
        base: Any = self.base
        if g.layout != torch.strided:
            raise RuntimeError(f"a gradient must have layout torch.strided, got {g.layout}")
        if p not in self._backups or self._backups[p].shape != p.shape or self._backups[p].dtype != p.dtype:
            self._backups[p] = torch.empty_like(p, requires_grad=False)
        state = {"backup": self._backups[p]}
        v, scale, eps = base._metric(p, group)
        hyper: dict[str, float | Tensor] = {"radius": self.radius, "scale": scale, "eps": eps}
        sign = -1.0 if group.get("maximize") else 1.0
        if v is None:
            return "perturb", Job(p, g, state, hyper, sign)
        values = base.states.values(p, group, base.rule_of(group), v) if isinstance(v, str) else v
        whole = base.state[p][v] if isinstance(v, str) and values is local(base.state[p][v]) else values
        return "perturb_adaptive", Job(p, g, {**state, "v": whole}, hyper, sign)
