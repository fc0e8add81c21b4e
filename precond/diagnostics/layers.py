"""Condition numbers of the inputs of a layer, normalised in several ways."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.precision import at_stated_precision
from .._wrappers.standardised import squared_scales
from .preconditioner import at_least_single


class Standardized(NamedTuple):
    """Inputs of mean 0 and variance 1, and the constants for inputs to come: ``(x - mean) / scale``."""

    values: Tensor
    mean: Tensor
    scale: Tensor


@at_stated_precision
def standardize(inputs: Tensor) -> Standardized:
    """Standardizes inputs to mean 0 and variance 1 in each feature. BNP preconditions as if a layer had such inputs.

    Args:
        inputs: (..., m), real, a feature per column; all other dimensions are samples.

    Returns:
        ``Standardized(values, mean, scale)``, float32 for 16-bit inputs. Use the same constants for test inputs. A constant
        feature becomes 0, with scale 1. The variance is the biased one.

    Raises:
        ValueError: there is no sample.

    Source: docs/theory.md, A.3.2.

    Example:
        >>> import torch
        >>> from precond import diagnostics
        >>> values, mean, scale = diagnostics.standardize(torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
        >>> values.tolist(), mean.tolist(), scale.tolist()
        ([[-1.0, 0.0], [1.0, 0.0]], [2.0, 7.0], [1.0, 1.0])
    """
    samples = _samples(inputs)
    samples = samples.to(at_least_single(samples))
    constant = (samples == samples[0]).all(0)  # its deviations from a rounded mean would be blown up
    mean = torch.where(constant, samples[0], samples.mean(0))
    scale = torch.where(constant, 1.0, samples.var(0, correction=0).sqrt())
    return Standardized(((samples - mean) / scale).view(inputs.shape), mean, scale)


@at_stated_precision
def layer_conditions(
    inputs: Tensor,
    *,
    eps1: float = 1e-2,
    eps2: float = 1e-4,
    batch_size: int | None = None,
    eps: float = 1e-5,
) -> dict[str, float]:
    r"""Condition numbers of a dense layer's extended inputs, [1, inputs], as they are and normalised in several ways.

    The Hessian of a mean loss with respect to the bias and the weights of one output is X^T S X, where X is the extended inputs
    and S is diagonal, so kappa(H) <= kappa(X)^2 kappa(S). The best value is 1.

    ==============  ======================================================================================================
    "inputs"        as they are
    "centred"       minus their means: BNP's U
    "standardized"  (x - mean) / sqrt(var): BNP's U D without regularisation
    "bnp"           (x - mean) / sqrt(var + eps1 max(var) + eps2): BNP's U D as it is used
    "batch_norm"    (x - mean) / sqrt(var + eps) within each batch
    "layer_norm"    (x - mean) / sqrt(var + eps) within each sample
    ==============  ======================================================================================================

    Args:
        inputs: (..., m), a feature per column; all other dimensions are samples, of which there should be more than features.
        eps1, eps2: the constants of BNP, >= 0 (defaults 1e-2 and 1e-4, as recalled from the paper). eps1 is relative to the
            largest variance: features with less than 1 % of it stay small.
        batch_size: batch size of batch normalisation, >= 1; None (default): all samples are one batch.
        eps: eps of batch and layer normalisation, >= 0 (default 1e-5, torch's).

    Returns:
        For each name the ratio of the largest to the smallest nonzero singular value, computed in float64; nan if all are 0.
        Values below the numerical rank count as 0: layer normalisation makes the columns sum to 0, and gradient descent does not
        move along that direction.

    Raises:
        ValueError: there is no sample, or an argument is out of range.

    Source: BNP (Lange, Helfrich, Ye, JMLR 23(72), 2022); docs/theory.md, A.3.

    Example:
        >>> import torch
        >>> from precond import diagnostics
        >>> x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1.0, 10.0, 100.0])
        >>> {name: round(kappa, 1) for name, kappa in diagnostics.layer_conditions(x).items() if name != "layer_norm"}
        {'inputs': 1029.9, 'centred': 1029.9, 'standardized': 1.1, 'bnp': 103.0, 'batch_norm': 1.1}
    """
    for name, value in (("eps1", eps1), ("eps2", eps2), ("eps", eps)):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be None or >= 1, got {batch_size}")
    x = _samples(inputs).detach().double()
    mean, var = x.mean(0), x.var(0, correction=0)

    def normalized(t: Tensor, dim: int) -> Tensor:
        return (t - t.mean(dim, keepdim=True)) / (t.var(dim, correction=0, keepdim=True) + eps).sqrt()

    size = len(x) if batch_size is None else batch_size
    forms = {
        "inputs": x,
        "centred": x - mean,
        "standardized": standardize(x).values,
        "bnp": (x - mean) / squared_scales(var, eps1, eps2).sqrt(),
        "batch_norm": torch.cat([normalized(x[i : i + size], 0) for i in range(0, len(x), size)]),
        "layer_norm": normalized(x, 1),
    }
    return {name: _kappa(t) for name, t in forms.items()}


def _samples(inputs: Tensor) -> Tensor:
    if inputs.ndim < 1 or inputs.numel() == 0 or not inputs.is_floating_point():
        raise ValueError(
            f"inputs must be real floats (..., m) with samples, got {tuple(inputs.shape)} of {inputs.dtype}"
        )
    return inputs.reshape(-1, inputs.shape[-1])


def _kappa(x: Tensor) -> float:
    """The condition number of [1, x] among singular values that are not 0."""
    extended = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
    values = torch.linalg.svdvals(extended)
    values = values[values > values[0] * max(extended.shape) * torch.finfo(values.dtype).eps]
    return (values[0] / values[-1]).item() if len(values) else math.nan
