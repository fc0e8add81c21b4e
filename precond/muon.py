"""Muon: spectral descent on the momentum of a matrix."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import Unpack

from ._core.arguments import arguments
from ._core.formats import StateFormat
from ._core.metric import Metric
from ._core.optimizer import FusedOptimizer, ParamsT
from ._core.passes import plain_step
from ._core.rows import Row, name_of
from ._core.settings import Settings
from ._core.sharding import like, local
from ._methods.kronecker import check_whole
from ._methods.multipass import MultiPass
from ._methods.newton_schulz import METHODS, orthogonalized

#: torch's, from 2.9 on.
_TorchMuon: Final[Any] = getattr(torch.optim, "Muon", torch.optim.Optimizer)


class Muon(MultiPass, _TorchMuon):  # type: ignore[misc]
    r"""Muon, a drop-in for :class:`torch.optim.Muon`: two fused passes around a Newton-Schulz iteration.

    .. math::
        m_t = \mu m_{t-1} + (1-\mu)\,g_t, \qquad u_t = m_t + (1-\mu)(g_t - m_t), \qquad
        p_t = p_{t-1} - \gamma\lambda\,p_{t-1} - \gamma\,s\,\mathrm{NS}(u_t)

    NS brings the singular values of u to about 1 (Uniform(0.5, 1.5)), and s is sqrt(max(1, rows / columns)). The result
    approximates ``DualDescent(kernel="normalize", granularity="spectral")`` by matrix products, which are batched over matrices
    of the same shape. Averaging and the step, with decay, are one fused pass each over all matrices. The step does not
    synchronise with the device.

    Args:
        params: matrices, named or in groups, as for any torch optimizer. Give everything else (biases, norms, embeddings, the
            output layer) to another optimizer: :func:`precond.param_groups` separates them.
        lr: learning rate gamma >= 0, a float or a tensor of one element (default 1e-3).
        weight_decay: lambda >= 0, decoupled, not scaled by s (default 0.1).
        momentum: mu in [0, 1) (default 0.95).
        nesterov: False takes u = m (default True).
        ns_coefficients: of the quintic iteration (default (3.4445, -4.775, 2.0315)).
        eps: lower bound of the norm that u is divided by before the iteration (default 1e-7).
        ns_steps: number of iterations, below 100 (default 5). They run in bfloat16.
        adjust_lr_fn: None or "original": s as above; "match_rms_adamw": s = 0.2 sqrt(max(rows, columns)).
        method: None for torch's iteration, with fewer operations; "gram" for the fewest, with more rounding; "polar_express" for
            the optimal polynomials instead of ``ns_coefficients``, which bring singular values closer to 1 (default None).
            docs/newton_schulz.md compares them.
        maximize: ascend instead of descend (default False).
        state_format, weight_format: as for :class:`precond.AdamW`, of the momentum and of 16-bit parameters.
        **settings: ``backend`` and ``seed``: :class:`precond.Settings`.

    Raises:
        ValueError: an argument is out of range, or a parameter is not a matrix.
        RuntimeError: when built and at the step, for a sharded parameter or a setting that clips: clip with torch's functions
            before the step; at the step, for a sparse or complex gradient.

    State: ``momentum_buffer``, as torch.

    Source: Jordan et al. 2024 as torch.optim.Muon defines it; "match_rms_adamw": Liu et al., arXiv 2502.16982.

    Example:
        >>> import torch, precond
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = precond.Muon([w], lr=0.1)
        >>> w.grad = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
        >>> opt.step()
        >>> [round(x, 1) for x in w.diagonal().tolist()]
        [-0.1, -0.1]
    """

    _why_not_one_pass = "for Muon"
    _group_options = {**MultiPass._group_options, "maximize": False, "method": None}
    _older_options = {}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        method: str | None = None,
        maximize: bool = False,
        state_format: StateFormat = None,
        weight_format: str | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        defaults = arguments(locals())
        FusedOptimizer.__init__(self, params, defaults, settings=settings)

    def _check_defaults(self, defaults: dict[str, Any]) -> None:
        lr = defaults["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
        for name, what in (("lr", "Learning rate"), ("momentum", "momentum"), ("weight_decay", "weight decay")):
            if not defaults[name] >= 0.0:
                raise ValueError(f"{what} should be >= 0 but is: {defaults[name]}")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"Adjust learning rate function {group['adjust_lr_fn']} is not supported")
        if group.get("method") not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {group['method']!r}")
        if not 0 <= group["ns_steps"] < 100:
            raise ValueError(
                f"Number of steps must be less than 100 for computational efficiency, got ns_steps={group['ns_steps']}"
            )
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(f"Coefficients must be a tuple of exactly 3 values, got {group['ns_coefficients']!r}")
        if not group["momentum"] < 1.0:
            raise ValueError(f"momentum must be < 1, got {group['momentum']}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices."""
        super().add_param_group(param_group)
        group, index = self.param_groups[-1], len(self.param_groups) - 1
        for position, p in enumerate(group["params"]):
            if p.ndim != 2:
                del self.param_groups[-1]
                raise ValueError(
                    f"Muon only supports 2D parameters whereas we found a parameter with size: {p.size()}: "
                    f"{name_of(group, index, position)}"
                )

    def _check_whole(self, name: str, p: Tensor, group: dict[str, Any]) -> None:
        check_whole(name, p)

    def _metric(self, p: Tensor, group: dict[str, Any]) -> Metric | None:
        return Metric(why_not="it takes all singular values to 1")

    def _row(self, group: dict[str, Any]) -> Row:
        hyper = self._hyper(group, "momentum")
        hyper["lookahead"] = 1.0 - float(group["momentum"]) if group["nesterov"] else 0.0
        return Row("average", -1.0 if group.get("maximize") else 1.0, hyper)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _update(self) -> None:
        rows = [self._checked_row(group) for group in self.param_groups]
        found = [
            (group, row, name, p, g)
            for group, row in zip(self.param_groups, rows, strict=True)
            for name, p, g in self._gradients(group, row)
            if p.numel() > 0
        ]
        means = []
        for group, row, name, p, g in found:
            if p.is_complex():
                raise RuntimeError(f"Muon does not support complex parameters, got {p.dtype} for {name}")
            self._init_state(p, group, row, name)
            names = ("momentum_buffer", "momentum_buffer_scale")
            means.append(self._job(name, p, self._buffer(p, torch.bfloat16), g, names, row.hyper, row.sign))
        self._pass("average", ("momentum_buffer",)).run(means)
        alike: dict[tuple[Any, ...], list[int]] = {}
        for i, (group, _, _, p, _) in enumerate(found):
            alike.setdefault((id(group), p.shape, p.device), []).append(i)
        steps = []
        for indices in alike.values():
            group = found[indices[0]][0]
            stack = torch.stack([local(means[i].p) for i in indices])
            for i, direction in zip(indices, orthogonalized(stack, group), strict=True):
                _, row, name, p, _ = found[i]
                scale = _scale(group["adjust_lr_fn"], p.shape)
                step = plain_step(row.hyper["lr"] * scale, row.hyper["weight_decay"] / scale)
                turned = like(p, direction.contiguous())
                steps.append(self._job(name, p, p, turned, ("remainder",), step, 1.0, group.get("weight_format")))
        self._pass("sgdw").run(steps)


def _scale(adjust_lr_fn: str | None, shape: torch.Size) -> float:
    rows, columns = shape
    return (
        0.2 * math.sqrt(max(rows, columns)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
    )
