"""Gradient regularisation in the variable that an optimizer descends in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from ._core.metric import Metric, of_parts
from ._core.optimizer import FusedOptimizer
from ._core.passes import Job, Pass
from ._core.precision import at_stated_precision
from ._core.sharding import aligned_gradients, like
from ._methods.of_parameters import OfParameters
from ._methods.rotated import Rotated
from ._wrappers.accumulated import Earlier, unshared
from ._wrappers.wrapper import Wrapper

T = TypeVar("T")


class GradientRegularizer(Wrapper):
    r"""Penalises the norm of the gradient in the variable z of p = P z, by a second gradient at a nearby point.

    .. math::
        u = P P^T g_1, \qquad g_1 = \nabla L(p), \quad g_2 = \nabla L(p + r u), \qquad
        \tilde g = g_1 + \frac{\rho}{r}\,(g_2 - g_1) \approx \nabla\Big(L + \frac{\rho}{2}\,\|P^T \nabla L\|^2\Big)

    ``base`` then steps on the combined gradient. P is held constant, as the last step left it. For AdamW u is the gradient over
    den, so sharpness is measured along the directions in which the optimizer moves. rho = r takes g_2 alone, as sharpness-aware
    minimisation does. One fused pass saves p and moves to p + r u; afterwards p is restored bit for bit.

    Args:
        base: an optimizer of precond. P P^T = 1 / den for the adaptive classes of the family, and for GaussNewton and Sophia
            without a basis; the identity for SGD, and also for Lion, DualDescent and Muon, which have no P of this form.
        rho: >= 0, the strength (default 0.01). For a quadratic, lr (l + rho l^2) must be below 2, where l is the largest
            eigenvalue of P^T H P.
        radius: r > 0, step of the finite difference (default 1e-3). Its error grows with r, rounding errors with 1 / r.

    Raises:
        TypeError: base is not one of precond's, or has a basis (SOAP, GaussNewton).
        ValueError: rho or radius is out of range.
        RuntimeError: at a step without a closure, for a sparse gradient, or where the closure added to gradients that were there
            before the step and its own differ between the two points; everything is then as it was.

    ``step(closure)`` evaluates the closure twice and returns its first value. The closure evaluates all micro-batches of a step.
    Layers that draw random numbers draw again, and running statistics see both points. P is unknown before the first step of a
    parameter, and for coordinates that never had a gradient: these are not moved for the second evaluation. ``.grad`` then holds
    the combination, and clipping and other settings of base apply to it.

    State: none; a copy of the parameters is kept between steps but not saved.

    Source: Ye, arXiv 2410.00232, whose first version names the method in its abstract; the two-gradient form, what feeds base's
    moments and the defaults are this project's (docs/theory.md, A.2.3).

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
    _needs_closure = True

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
        self._backups = OfParameters()

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("_passes", "_backups")}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], T]) -> T: ...
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], T] | None = None) -> T | None:
        """Evaluate the closure at p and at p + r u, and step on the combination of both gradients."""
        if closure is None:
            if not self._asked_for_states_only():
                raise RuntimeError("GradientRegularizer.step needs a closure that evaluates the loss and its gradients")
            self._step_base()
            return None
        if self.rho == 0.0:
            loss = self._evaluated(closure)
        else:
            earlier = Earlier(self._params())
            try:
                with earlier.handed_out():
                    loss = self._evaluated(closure)
                self._combine(closure, earlier)
            except BaseException:
                earlier.restore()
                raise
        self._step_base()
        return loss

    @torch.no_grad()
    def _combine(self, closure: Callable[[], T], earlier: Earlier) -> None:
        base: Any = self.base
        for group in base.param_groups:
            part = base.part_of(group)
            if isinstance(part, Rotated) and part.rotates(group):
                raise TypeError(f"base must have no basis, got a {type(part).__name__}")
        aligned = aligned_gradients(self.param_groups)
        first = {p: unshared(aligned.get(p, p.grad)) for p in self._params()}
        moved: list[Tensor] = []
        jobs: dict[str, list[Job]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                g = first[p]
                metric = None if g is None else base.metric_of(p, group)
                if g is not None and metric is not None:
                    moved.append(p)
                    rule, job = self._job(p, g, group, metric)
                    jobs.setdefault(rule, []).append(job)
        self._backups.keep([*first])
        if not jobs:
            return
        kept = earlier.kept()
        split = base.states.watched(self._params())
        base.states.begin(split)
        for p in first:
            p.grad = None  # else a closure could zero the first gradient in place
        earlier.hand_out_again(kept)
        for rule, of_rule in jobs.items():
            names = ("backup", "v") if rule == "perturb_adaptive" else ("backup",)
            if rule not in self._passes:
                self._passes[rule] = Pass(rule, names, base.engine.settings["backend"])
            self._passes[rule].run(of_rule)
        try:
            self._evaluated(closure)
        finally:
            for p in moved:
                backup = self._backups.get(p)
                assert backup is not None
                p.copy_(backup)
            # p is what it was, so the remainder of a split weight still belongs to it.
            came_back = {id(p) for p in moved}
            base.states.end(p for p in split if id(p) in came_back)
        second = {p: p.grad for p in first} | aligned_gradients(self.param_groups)
        if kept and not all(_same(g, second[p]) for p, g in first.items()):
            raise RuntimeError(
                f"the closure must evaluate all micro-batches, got {len(kept)} parameters with an earlier gradient in .grad, "
                "which cannot be evaluated again at the second point: call zero_grad before the step or in the closure"
            )
        for p, g in first.items():
            p.grad = g
        for p in moved:
            g, other = first[p], second[p]
            if g is not None and other is not None:
                p.grad = g.lerp(other, self.rho / self.radius)

    @at_stated_precision
    def _job(self, p: Tensor, g: Tensor, group: dict[str, Any], metric: Metric) -> tuple[str, Job]:
        """The rule that moves a parameter along P P^T g, or along g where base has no P, and its operands."""
        name = self._name_of(p)
        if g.layout != torch.strided:
            raise RuntimeError(f"the gradient of {name} must have layout torch.strided, got {g.layout}")
        backup = self._backups.get(p)
        if backup is None or (backup.shape, backup.dtype, backup.device) != (p.shape, p.dtype, p.device):
            backup = torch.empty_like(p, requires_grad=False)
            self._backups.put(p, backup)
        state = {"backup": backup}
        hyper: dict[str, float | Tensor] = {"radius": self.radius, "scale": metric.scale, "eps": metric.eps}
        sign = -1.0 if group.get("maximize") else 1.0
        if metric.v is None:
            return "perturb", Job(p, g, state, hyper, sign, name=name)
        v = metric.v
        if metric.known is not None:
            v = of_parts(lambda v, known: torch.where(known > 0, v, 0.0), v, metric.known)
        v = v if hasattr(v, "placements") else like(p, v)
        return "perturb_adaptive", Job(p, g, {**state, "v": v}, hyper, sign, name=name)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
