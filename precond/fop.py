"""First-order preconditioning (FOP): a preconditioner learnt from gradients alone, around any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._core.arguments import check_nonnegative
from ._core.optimizer import FusedOptimizer
from ._core.precision import at_stated_precision
from ._core.sharding import aligned_gradients, like, local
from ._methods import hypergradient
from ._methods.hypergradient import Rule, Work
from ._wrappers.decays import check_direction, decoupled_decays
from ._wrappers.wrapper import T, Wrapper

MODES = ("spatial", "input", "output", "diagonal")
NORMALIZATIONS = ("step", "matrix", "hypergradient")
COMPOSITIONS = ("direction", "gradient")


class FOP(Wrapper):
    r"""First-order preconditioning: every step of ``base`` is multiplied by a learnt :math:`M M^\top`.

    .. math::
        A_t = \frac{G_t D_{t-1}^\top}{\|G_t\| \|D_{t-1}\|}, \quad M_t = M_{t-1} + \rho\, (A_t + A_t^\top) M_{t-1}, \quad
        p_{t+1} = p_t - M_t M_t^\top D_t

    G is the gradient and D the step of ``base``, without its decoupled weight decay, as matrices of r rows; M_1 = I.
    :math:`-(G_t D_{t-1}^\top + D_{t-1} G_t^\top) M_{t-1}` is the derivative of the loss at p_t by the M that led there, its
    hypergradient. The first step is a plain step of ``base``, and with ``hyper_lr=0`` every step is.

    ============  ==========================  ==============================  =================
    mode          rows: the dimensions        r, convolution O x C x k x k    r, linear out x in
    ============  ==========================  ==============================  =================
    "spatial"     from the third on           k^2                             in, as "input"
    "input"       the second                  C                               in
    "output"      the first                   O                               out
    "diagonal"    M is elementwise            M: O x C x k x k                M: out x in
    ============  ==========================  ==============================  =================

    A parameter of less than two dimensions (bias, scale) has an elementwise M in every mode,
    :math:`m_t = m_{t-1} + 2\rho\, g_t d_{t-1} m_{t-1} / (\|g_t\| \|d_{t-1}\|)`. A 1 x 1 convolution is a linear layer:
    "spatial" is its "input".

    Args:
        base: any ``torch.optim.Optimizer`` with an ``lr`` in its groups and a step that needs no closure. It keeps its groups,
            states and hyper-parameters. Its decoupled weight decay is left as it is.
        hyper_lr: rho >= 0 (default 1e-3). Without unit; on images try 1e-2. Without ``normalize="hypergradient"``
            its unit is 1 / (gradient x step), and it must be tuned for each problem.
        mode: the dimensions that M mixes: "spatial" (default), "input", "output" or "diagonal".
        normalize: None, one name or several. "hypergradient" (default): A is divided by both norms, so that M depends neither on
            the scale of the loss nor on lr; without it A is that of G and D as they are. "matrix": after each change M is scaled
            to the Frobenius norm of I. "step": M M^T D is scaled to the norm of D.
        max_norm: > 1 and finite, a bound of M's spectral norm (default 10.0: steps grow at most 100 times). A change beyond it,
            or to a value that is not finite, is not made; where M is elementwise, this holds per element. The norm is
            overestimated by at most a factor :math:`r^{1/32}`: 1.07 for 9 rows, 1.3 for 4096.
        compose: "direction" (default) applies M to the step of ``base``, as above. It needs float32 or float64 parameters, and a
            ``base`` without ``l1_decay``, ``cautious`` and ``ema_decay`` that is not schedule-free. "gradient" gives ``base``
            the gradient M M^T G: D is the gradient times the lr of the group's present step, and all decays of ``base`` are
            added after M. Around plain SGD both are one method; with momentum or an adaptive ``base`` the hypergradient of
            "gradient" is an approximation that needs a smaller ``hyper_lr``.

    Raises:
        TypeError: ``base`` is not an optimizer, or one that needs a closure.
        ValueError: an argument is out of range, a group of ``base`` has no ``lr``, or an option that "direction" does not take.
        RuntimeError: for a sharded parameter, unless ``mode="diagonal"`` and ``normalize=None``; for a parameter of 16 bits,
            unless ``compose="gradient"``; at the step, for a sparse or complex gradient, and for an M that was saved in another
            mode and has another shape.

    State: per parameter, "fop_preconditioner" (M, in float32, or float64 where gradients are) and "fop_previous_step", or with
    "gradient" "fop_previous_grad", among the states of ``base``; a checkpoint does not have the arguments. ``own[p]`` has them
    without the prefix.

    Source: Moskovitz et al. 2019, arXiv 1910.08461, for the method; the formulas are derived in docs/theory.md, D, and what an
    M of a linear layer mixes, the normalisations and the defaults are this project's.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.ones(2, 1))
        >>> base = torch.optim.SGD([w], lr=0.1)
        >>> opt = precond.FOP(base, hyper_lr=0.02, mode="output")
        >>> for _ in range(100):
        ...     opt.zero_grad()
        ...     (torch.tensor([[0.01], [1.0]]) * w**2).sum().backward()
        ...     opt.step()
        >>> bool(w.abs().max() < 0.01)  # SGD alone: 0.82
        True
    """

    _prefix = "fop"

    def __init__(
        self,
        base: torch.optim.Optimizer,
        hyper_lr: float = 1e-3,
        mode: str = "spatial",
        *,
        normalize: str | Iterable[str] | None = "hypergradient",
        max_norm: float = 10.0,
        compose: str = "direction",
    ) -> None:
        super().__init__(base)
        self._check_steps_alone()
        names = (normalize,) if isinstance(normalize, str) else tuple(normalize or ())
        check_nonnegative("hypergradient learning rate", "hyper_lr", hyper_lr)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        if unknown := [name for name in names if name not in NORMALIZATIONS]:
            raise ValueError(f"normalize must be None or of {NORMALIZATIONS}, got {unknown[0]!r}")
        if compose not in COMPOSITIONS:
            raise ValueError(f"compose must be one of {COMPOSITIONS}, got {compose!r}")
        if not 1.0 < max_norm < math.inf:
            raise ValueError(f"max_norm must be finite and > 1, the norm of the first M, got {max_norm}")
        if any("lr" not in group for group in base.param_groups):
            raise ValueError(f"base must have an lr in each of its groups, got {type(base).__name__}")
        self.hyper_lr, self.mode, self.normalize, self.max_norm = hyper_lr, mode, frozenset(names), max_norm
        self.compose = compose
        for p in self._params():
            self._check_param(p)
        self._check_groups()
        self._decays()
        self._join_states()

    def _make_entries(self) -> None:
        for p in self._params():
            if p.requires_grad and not p.is_complex() and not self._why_not_sharded(p) and self._own_of(p) is None:
                of_grad = self.compose == "gradient" and getattr(p, "grad_dtype", None)
                self._make_m(p, torch.zeros_like(p, dtype=of_grad or p.dtype, requires_grad=False))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to ``base``."""
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                self._check_param(p)
            self._check_groups()
            self._decays()
        except (RuntimeError, ValueError):
            del self.param_groups[-1]
            raise

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], T] | None = None) -> T | None:  # type: ignore[override]
        """Update each M, step ``base``, and multiply its step, or before it its gradient, by M M^T."""
        loss = self._evaluated(closure)
        self._check_groups()
        if self._asked_for_states_only():
            self._step_base()
            self._make_entries()
            return loss
        aligned = aligned_gradients(self.param_groups)
        gradients = [
            (p, grad := aligned.get(p, p.grad), self._checked(p, grad), lr)
            for group, lr in zip(self.param_groups, map(self._lr_of, self.param_groups), strict=True)
            for p in group["params"]
            if p.grad is not None
        ]
        if self.compose == "gradient":
            self._with_gradients(self._preconditioned(gradients))
        else:
            self._step_and_turn(gradients)
        return loss

    def _mixed(self, p: Tensor) -> tuple[int, ...]:
        """The dimensions that M mixes; none where M is elementwise."""
        if self.mode == "diagonal" or p.dim() < 2:
            return ()
        if self.mode == "spatial" and math.prod(p.shape[2:]) > 1:
            return tuple(range(2, p.dim()))
        return (0,) if self.mode == "output" else (1,)

    def _shape(self, p: Tensor) -> torch.Size:
        """The shape of M."""
        dims = self._mixed(p)
        r = math.prod(p.shape[dim] for dim in dims)
        return torch.Size((r, r)) if dims else p.shape

    def _checked(self, p: Tensor, grad: Tensor) -> tuple[Tensor, Tensor] | None:
        """What ``_own_of`` says. Raise for a gradient that this class cannot precondition, and for an M of another mode."""
        if grad.layout != torch.strided or grad.is_complex():
            raise RuntimeError(
                f"the gradient of {self._name_of(p)} must be dense and real for FOP, got layout {grad.layout} and {grad.dtype}"
            )
        self._check_param(p)
        own, M = self._own_of(p), self._m_of(p)
        if (M is not None and (shape := M.shape) != self._shape(p)) or (own and (shape := own[1].shape) != p.shape):
            raise RuntimeError(
                f"M of {self._name_of(p)} must have shape {tuple(self._shape(p))} with mode={self.mode!r}, got {tuple(shape)}: "
                "it is of another mode, or the parameter was resized"
            )
        return own

    def _check_param(self, p: Tensor) -> None:
        if why := self._why_not_sharded(p):
            raise RuntimeError(why)
        if self.compose == "direction" and p.requires_grad and p.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(
                f"{self._name_of(p)} must be float32 or float64 with compose='direction', which measures its steps, got {p.dtype}"
            )

    def _check_groups(self) -> None:
        """Raise for bases whose steps are not a direction and a decay that can be told apart."""
        if self.compose != "direction":
            return
        check_direction(self.base)
        for group in self.param_groups:
            for name in ("l1_decay", "cautious"):
                if value := group.get(name):
                    raise ValueError(f"{name} must be off with compose='direction', got {value!r}")

    def _why_not_sharded(self, p: Tensor) -> str:
        """What is wrong with the way a parameter is sharded; nothing where M is elementwise."""
        if type(p) in (Tensor, torch.nn.Parameter):  # nearly all; what has no placements takes long to say so
            return ""
        cut = [
            dim
            for dim, placement in enumerate(getattr(p, "placements", ()))
            if not placement.is_replicate() and p.device_mesh.size(dim) > 1  # type: ignore[attr-defined]
        ]
        if not cut or not (self._mixed(p) or self.normalize):
            return ""
        return (
            f"{self._name_of(p)} is sharded and must have mode='diagonal' and normalize=None, "
            f"got {self.mode!r} and {sorted(self.normalize)} for shape {tuple(p.shape)}"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, also one of the time when there was no ``compose``."""
        super().__setstate__({"compose": "gradient"} | state)

    @property
    def _previous(self) -> str:
        return "previous_grad" if self.compose == "gradient" else "previous_step"

    def _own_of(self, p: Tensor) -> tuple[Tensor, Tensor] | None:
        """M and the last gradient or step of a parameter that has both; the last one is 0 until there was one."""
        M, previous = self._m_of(p), (self.state.get(p) or {}).get(f"{self._start}{self._previous}")
        return None if M is None or previous is None else (M, previous)

    def _m_of(self, p: Tensor) -> Tensor | None:
        return (self.state.get(p) or {}).get(f"{self._start}preconditioner")

    def _make_m(self, p: Tensor, previous: Tensor) -> None:
        """The first M, or the one of a checkpoint of the other ``compose``, whose previous gradient or step is another."""
        if not self.hyper_lr or not p.numel():
            return
        dtype = torch.promote_types(previous.dtype, torch.float32)
        if (kept := self._m_of(p)) is not None:
            M = kept
        elif self._mixed(p):
            M = torch.eye(self._shape(p)[0], dtype=dtype, device=previous.device)
        else:
            M = torch.ones_like(previous, dtype=dtype)
        self.own[p] = {"preconditioner": M, self._previous: previous}

    @at_stated_precision
    def _preconditioned(
        self, gradients: Iterable[tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, float | Tensor]]
    ) -> dict[Tensor, Tensor]:
        """M M^T g of each parameter, after M was updated by g and the gradient before; g itself at the first one."""
        found: dict[Tensor, Tensor] = {}
        works: list[Work] = []
        for p, grad, own, lr in gradients:
            if own is None:
                self._make_m(p, grad.clone())
                found[p] = grad
            else:
                g = local(grad)
                works.append(Work(p, local(own[0]), g, local(own[1]), self._mixed(p), lr, g))
        found.update(hypergradient.preconditioned(works, self._rule()))
        return found

    def _rule(self) -> Rule:
        return Rule(self.hyper_lr, self.normalize, self.max_norm)

    def _decays(self) -> dict[Tensor, float | Tensor]:
        """What M leaves alone of a step: factors of parameters. Raises where that cannot be known."""
        return decoupled_decays(self.base) if self.compose == "direction" else {}

    @at_stated_precision
    def _step_and_turn(
        self, gradients: list[tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, float | Tensor]]
    ) -> None:
        """Step ``base``, and then take M M^T s for s, the step that it took without its decoupled decay."""
        decays = self._decays()
        rises = {p for group in self.param_groups if group.get("maximize") for p in group["params"]}
        # Bases of others write gradients, such as torch's SGD with Nesterov's momentum.
        ours = isinstance(self._innermost(), FusedOptimizer)
        learning = [(p, grad, own) for p, grad, own, _ in gradients if own is not None or self.hyper_lr]
        seen = {p: local(grad) if ours else local(grad).clone() for p, grad, _ in learning}
        before = {p: local(p).clone() for p, *_ in learning}
        self._with_gradients({p: grad for p, grad, *_ in gradients})
        if learning:
            self.wait()
        works: list[Work] = []
        for p, _, own in learning:
            old, new = before[p], local(p)
            s = old - new
            if p in decays:
                # Where nothing moved, base skipped the step and its decay.
                s.sub_(old * decays[p] * (new != old).any())
            before[p] = s
            if own is None:
                self._make_m(p, like(p, s))
            else:
                g = -seen[p] if p in rises else seen[p]
                # The step has lr in it already.
                works.append(Work(p, local(own[0]), g, local(own[1]), self._mixed(p), 1.0, s))
        for p, turned in hypergradient.preconditioned(works, self._rule()):
            # In this order a -0 stays one where M is I.
            local(p).sub_(local(turned).sub_(before[p]))
