"""P and its transpose as functions of lists of tensors, from whatever stands for a preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.conversions import to_torch_state_dict
from .._core.optimizer import FusedOptimizer
from ..adagrad import AdagradW
from ..rmsprop import RMSpropW
from ..sgd import SGDW

Map = Callable[[list[Tensor]], Sequence[Tensor]]
#: None; P elementwise, per parameter; an optimizer; or P and its transpose as functions of lists of tensors.
Preconditioner = None | Mapping[Tensor, Tensor] | Sequence[Tensor] | torch.optim.Optimizer | tuple[Map, Map]


def maps_of(preconditioner: Preconditioner, params: list[Tensor]) -> tuple[Map, Map]:
    """P and its transpose."""
    given: Any = preconditioner
    if given is None:
        return list, list
    if isinstance(given, torch.optim.Optimizer):
        given = preconditioner_of(given)
    if isinstance(given, Mapping):
        missing = sum(p not in given for p in params)
        if missing:
            raise ValueError(
                f"preconditioner must have every parameter, got none for {missing} of {len(params)}: "
                "an optimizer has one after a step on it"
            )
        given = [given[p] for p in params]
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
    if not all(bool(t.isfinite().all()) for t in given):
        raise ValueError("preconditioner must be finite, got inf or NaN in it")
    scales = [t.detach().to(p) for t, p in zip(given, params, strict=True)]

    def scaled(vectors: list[Tensor]) -> list[Tensor]:
        return [scale * u for scale, u in zip(scales, vectors, strict=True)]

    return scaled, scaled


def preconditioner_of(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    r"""The diagonal P in whose variables z = P^{-1} p an optimizer is gradient descent, from its states.

    .. math::
        P = \mathrm{den}^{-1/2}, \qquad \mathrm{den} = \sqrt{v / (1 - \beta_2^t)} + \epsilon
        \;\text{(Adam)}, \quad \sqrt{s} + \epsilon \;\text{(Adagrad)}, \quad \sqrt{v} + \epsilon \;\text{(RMSprop)}

    amsgrad takes the largest v, centered RMSprop the variance. Momentum is not part of P. SGD has P = 1.

    Args:
        optimizer: Adam, Adagrad, RMSprop or SGD of torch or precond, or one of precond's with a W; with any ``state_format``.

    Returns:
        P, in float32 or wider, for every real parameter that has been stepped; for SGD for all parameters.

    Raises:
        TypeError: another optimizer: Lion's sign is not a P, and one that mixes coordinates needs a pair of functions.

    Source: Ye, arXiv 2410.00232; the table of METHODS A.1.

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
    optim = torch.optim
    if isinstance(optimizer, optim.SGD | SGDW):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return {p: torch.ones_like(p, dtype=at_least_single(p), requires_grad=False) for p in params}
    if isinstance(optimizer, optim.Adam | optim.AdamW):
        den_of = _adam_den
    elif isinstance(optimizer, optim.Adagrad | AdagradW):
        den_of = _adagrad_den
    elif isinstance(optimizer, optim.RMSprop | RMSpropW):
        den_of = _rmsprop_den
    else:
        raise TypeError(
            f"optimizer must be an Adam, Adagrad, RMSprop or SGD of torch or precond, got a {type(optimizer).__name__}"
        )
    grouped = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    # A state dict numbers the parameters in this order, and that one has decoded states.
    decoded = to_torch_state_dict(optimizer)["state"] if isinstance(optimizer, FusedOptimizer) else None
    found = {}
    for i, (group, p) in enumerate(grouped):
        state = optimizer.state.get(p, {}) if decoded is None else decoded.get(i, {})
        if float(state.get("step", 0)) > 0 and not p.is_complex():
            found[p] = den_of(group, state).pow(-0.5).to(at_least_single(p))
    return found


def at_least_single(p: Tensor) -> torch.dtype:
    """The dtype of a tensor, float32 where it is shorter."""
    return torch.promote_types(p.dtype, torch.float32)


def _adam_den(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    v: Tensor = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    correction: float = 1 - float(group["betas"][1]) ** float(state["step"])
    return (v.double() / correction).sqrt() + float(group["eps"])


def _adagrad_den(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    s: Tensor = state["sum"]
    return s.double().sqrt() + float(group["eps"])


def _rmsprop_den(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    v: Tensor = state["square_avg"].double()
    if group["centered"]:
        v = (v - state["grad_avg"].double().square()).clamp(min=0)
    return v.sqrt() + float(group["eps"])
