"""P and its transpose, as functions of lists of tensors, of anything that is accepted as a preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.metric import Metric
from .._core.optimizer import FusedOptimizer
from .._core.precision import at_stated_precision

Map = Callable[[list[Tensor]], Sequence[Tensor]]
#: None; P elementwise, per parameter; an optimizer; or P and its transpose as functions of lists of tensors.
Preconditioner = None | Mapping[Tensor, Tensor] | Sequence[Tensor] | torch.optim.Optimizer | tuple[Map, Map]


@at_stated_precision
def maps_of(preconditioner: Preconditioner, params: list[Tensor]) -> tuple[Map, Map]:
    """P and its transpose."""
    given: Any = preconditioner
    if given is None:
        return list, list
    if isinstance(given, torch.optim.Optimizer):
        metrics = _chosen(_metrics_of(given), params)
        return _diagonal_maps(
            [_diagonal(metric, p) for metric, p in zip(metrics, params, strict=True)], metrics, params
        )
    if isinstance(given, Mapping):
        given = _chosen(given, params)
    if not isinstance(given, Sequence) or not all(isinstance(t, Tensor) for t in given):
        if isinstance(given, Sequence) and len(given) == 2 and all(map(callable, given)):
            return tuple(given)
        raise TypeError(
            "preconditioner must be None, an optimizer, a mapping or sequence of tensors, or a pair of functions, "
            f"got a {type(given).__name__}"
        )
    shapes = [tuple(p.shape) for p in params], [tuple(t.shape) for t in given]
    if shapes[0] != shapes[1]:
        raise ValueError(f"preconditioner must have the parameters' shapes {shapes[0]}, got {shapes[1]}")
    return _diagonal_maps(given, [Metric()] * len(params), params)


def _chosen(given: Mapping[Tensor, Any], params: list[Tensor]) -> list[Any]:
    """What a mapping has for each parameter."""
    missing = sum(p not in given for p in params)
    if missing:
        raise ValueError(
            f"preconditioner must have every parameter, got none for {missing} of {len(params)}: "
            "an optimizer has one after a step on it"
        )
    return [given[p] for p in params]


def _diagonal_maps(diagonals: Sequence[Tensor], metrics: Sequence[Metric], params: list[Tensor]) -> tuple[Map, Map]:
    """U D and D U^T, from the diagonals D and the bases U of metrics."""
    if found := [position for position, t in enumerate(diagonals) if not bool(t.isfinite().all())]:
        raise ValueError(f"preconditioner must be finite, got inf or NaN in it at positions {found}")
    scales = [t.detach().to(p) for t, p in zip(diagonals, params, strict=True)]
    bases = [metric.basis for metric in metrics]

    def into(vectors: list[Tensor]) -> list[Tensor]:
        scaled = [scale * z for scale, z in zip(scales, vectors, strict=True)]
        return [
            t if basis is None else basis.rotate_back(t.to(at_least_single(t))).to(t)
            for t, basis in zip(scaled, bases, strict=True)
        ]

    def out_of(vectors: list[Tensor]) -> list[Tensor]:
        rotated = [
            t if basis is None else basis.rotate(t, at_least_single(t)).to(t)
            for t, basis in zip(vectors, bases, strict=True)
        ]
        return [scale * t for scale, t in zip(scales, rotated, strict=True)]

    return into, out_of


@at_stated_precision
def preconditioner_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    r"""The diagonal P of an optimizer, as its last step left it: the optimizer is gradient descent in z = P^{-1} p.

    .. math::
        P = \mathrm{den}^{-1/2}, \qquad \mathrm{den} = \sqrt{v / (1 - \beta_2^t)} + \epsilon
        \;\text{(Adam, NAdam)}, \quad \sqrt{s} + \epsilon \;\text{(Adagrad)}, \quad \sqrt{v} + \epsilon \;\text{(RMSprop)},
        \quad (h + \epsilon)^{-\mathrm{power}} \;\text{(GaussNewton)}

    With amsgrad v is the largest one, with centered RMSprop the variance; Adamax has its maximum in place of the root. Momentum
    is not part of P, nor is the clamp of GaussNewton and Sophia. SGD has P = 1.

    Args:
        optimizer: one of precond with any ``state_format``, or one of torch's that has a drop-in.

    Returns:
        P, in float32 or wider, for each real parameter that has taken a step or whose curvature has been updated; for SGD, for
        all parameters.

    Raises:
        TypeError: the step of the optimizer is not P P^T times a mean of gradients (Lion, Muon, DualDescent); or it has a basis,
            so that P is not diagonal: pass the optimizer itself to the other functions.

    Source: Ye, arXiv 2410.00232; the table of docs/theory.md, A.1.

    Example:
        >>> import torch, precond
        >>> from precond import diagnostics
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> opt = precond.RMSprop([w], alpha=0.0, eps=0.0)
        >>> w.grad = torch.tensor([4.0, 100.0])
        >>> opt.step()
        >>> [round(x, 6) for x in diagnostics.preconditioner_of(opt)[w].tolist()]
        [0.5, 0.1]
    """
    metrics = _metrics_of(optimizer)
    if any(metric.basis is not None for metric in metrics.values()):
        raise TypeError(f"optimizer must have no basis to have a diagonal P, got a {type(optimizer).__name__}")
    return {p: _diagonal(metric, p) for p, metric in metrics.items()}


def _metrics_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, Metric]:
    """P P^T of every real parameter that has one by now."""
    ours = _as_ours(optimizer)
    metrics = {}
    for group in ours.param_groups:
        for p in group["params"]:
            metric = None if p.is_complex() else ours.metric_of(p, group)
            if metric is None:
                continue
            if metric.why_not:
                raise TypeError(
                    f"optimizer must have a preconditioner, got a {type(optimizer).__name__}: {metric.why_not}"
                )
            metrics[p] = metric
    return metrics


def _as_ours(optimizer: torch.optim.Optimizer) -> FusedOptimizer:
    """An optimizer of torch as the drop-in for it, on the same parameters and states."""
    if isinstance(optimizer, FusedOptimizer):
        return optimizer
    for drop_in in _subclasses(FusedOptimizer):
        # A drop-in derives from torch's class, and has its groups and states.
        theirs = {cls for cls in type(optimizer).__mro__ if issubclass(cls, torch.optim.Optimizer)}
        if theirs & set(drop_in.__bases__) - {torch.optim.Optimizer}:
            made = drop_in.__new__(drop_in)
            groups = [dict(group) for group in optimizer.param_groups]
            made.__setstate__({"defaults": dict(optimizer.defaults), "state": optimizer.state, "param_groups": groups})
            return made
    raise TypeError(
        "optimizer must be one of precond's that has a preconditioner, or one of torch's that precond has a drop-in for, "
        f"got a {type(optimizer).__name__}"
    )


def _subclasses(cls: type[FusedOptimizer]) -> Iterator[type[FusedOptimizer]]:
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


def _diagonal(metric: Metric, p: Tensor) -> Tensor:
    """den^(-1/2), in float32 or wider."""
    dtype = at_least_single(p)
    if metric.v is None:
        return torch.ones_like(p, dtype=dtype, requires_grad=False)
    den = (metric.v.double() * metric.scale).sqrt() + metric.eps
    return den.pow(-0.5).to(dtype)


def at_least_single(p: Tensor) -> torch.dtype:
    """The dtype of a tensor, float32 where it is shorter."""
    return torch.promote_types(p.dtype, torch.float32)
