"""A layer in the variables of standardised inputs: the transforms of its gradients and parameters, for BNP."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._core import backend as _backend
from .._core.precision import at_stated_precision


def moved(mean: Tensor, var: Tensor, batch: tuple[Tensor, Tensor], momentum: float) -> tuple[Tensor, Tensor]:
    """Running mean and variance after those of a batch. A channel of which the batch's are not finite keeps its own.

    They are those of all rows so far, by their weights. Without ``apart`` the variance of batches of one row would go to 0.
    """
    share = 1.0 - momentum
    apart = batch[0] - mean
    spread = batch[1].addcmul(apart, apart, value=momentum)
    finite = torch.isfinite(batch[0]) & torch.isfinite(spread)
    mean_now, var_now = mean.lerp(batch[0], share), var.lerp(spread, share)
    return torch.where(finite, mean_now, mean), torch.where(finite, var_now, var)


def squared_scales(var: Tensor, eps1: float | Tensor, eps2: float) -> Tensor:
    """s^2 of inputs with these variances (..., C)."""
    return var + eps1 * var.amax(-1, keepdim=True) + eps2


def squared_q(weight: Tensor, rows: int, samples: int) -> float:
    """q^2 of a layer with so many rows in a batch of so many samples: docs/theory.md, A.3.4."""
    return max(math.prod(weight.shape[1:]), rows) / samples


class Coordinates:
    """A layer in the variables z = P^-1 p: z_W = s W and z_b = b + W mu."""

    def __init__(self, weight: Tensor, bias: Tensor | None, mean: Tensor, s2: Tensor, q2: float) -> None:
        self.weight, self.bias, self.mean, self.s2, self.q2 = weight, bias, mean, s2, q2

    def params(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def _named(self, values: tuple[Tensor, Tensor | None]) -> dict[Tensor, Tensor]:
        pairs = zip((self.weight, self.bias), values, strict=True)
        return {q: value for q, value in pairs if q is not None and value is not None}

    @at_stated_precision
    def gradients(self) -> dict[Tensor, Tensor]:
        """P P^T g / q^2."""
        assert self.weight.grad is not None
        bias_grad = None if self.bias is None else self.bias.grad
        return self._named(
            precondition_gradients(self.weight.grad, bias_grad, self.mean, self.s2.reciprocal(), 1.0 / self.q2)
        )

    def _columns(self) -> tuple[Tensor, Tensor]:
        """mu and s in a shape that meets the weight's."""
        return _per_column(self.mean, self.weight), _per_column(self.s2.sqrt(), self.weight)

    @at_stated_precision
    def z(self) -> dict[Tensor, Tensor]:
        """P^-1 p."""
        mean, scale = self._columns()
        centred = None if self.bias is None else self.bias + _row_sums(self.weight, mean)
        return self._named((self.weight * scale, centred))

    @at_stated_precision
    def z_gradients(self, g: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """P^T g."""
        mean, scale = self._columns()
        if self.bias is None:
            return {self.weight: g[self.weight] / scale}
        centred = torch.addcmul(g[self.weight], _per_row(g[self.bias], self.weight), mean, value=-1.0)
        return {self.weight: centred.div_(scale), self.bias: g[self.bias].clone()}

    @at_stated_precision
    def move(self, p: dict[Tensor, Tensor], z: dict[Tensor, Tensor]) -> None:
        """From parameters that hold the new z to new parameters: p + P (z_new - z)."""
        mean, scale = self._columns()
        zero = self.weight == 0.0
        step = (self.weight - z[self.weight]).div_(scale)
        # z_W is 0 exactly where W is, and an L1 decay of base sets exact zeros.
        self.weight.copy_((p[self.weight] + step).masked_fill_(zero, 0.0))
        if self.bias is not None:
            self.bias.copy_(p[self.bias] + (self.bias - z[self.bias]) - _row_sums(step, mean))


def step_in_z(
    layers: list[Coordinates], decays: dict[Tensor, float], step: Callable[[dict[Tensor, Tensor]], None]
) -> None:
    """Put z in the place of p, let ``step`` move it by the gradients P^T g, and move p by P (z_new - z)."""
    p = {q: q.clone() for layer in layers for q in layer.params()}
    z, gradients = {}, {}
    for layer in layers:
        values = layer.z()
        # Coupled decay is a penalty on p: add its gradient here, and subtract the decay of z that the optimizer will add.
        given = {q: q.grad.add(q, alpha=decays.get(q, 0.0)) for q in layer.params() if q.grad is not None}
        for q, g in layer.z_gradients(given).items():
            gradients[q] = g.sub_(values[q], alpha=decays.get(q, 0.0))
        z.update(values)
    try:
        for q, value in z.items():
            q.copy_(value)
        step(gradients)
    except BaseException:
        for q, value in p.items():
            q.copy_(value)
        raise
    for layer in layers:
        layer.move({q: p[q] for q in layer.params()}, {q: z[q] for q in layer.params()})


@at_stated_precision
def precondition_gradients(
    gW: Tensor, gb: Tensor | None, mean: Tensor, inv_s2: Tensor, inv_q2: float
) -> tuple[Tensor, Tensor | None]:
    """P P^T g / q^2 for gradients of a weight (O, C / groups, ...) and a bias (O), from statistics (C): docs/theory.md, A.3.3.

    Without a bias gradient it is a division. In float32 on the CPU it is one pass in C++.
    """
    if gb is None:
        return (gW * _per_column(inv_s2 * inv_q2, gW)).to(gW.dtype), None
    if _backend._C is not None and _all_plain(gW, gb, mean, inv_s2):
        return _by_kernel(gW, gb, mean, inv_s2 * inv_q2, inv_q2)
    mu, scale = _per_column(mean, gW), _per_column(inv_s2 * inv_q2, gW)
    wide_b = gb.to(mean.dtype)
    GW = torch.addcmul(gW.to(mean.dtype), _per_row(wide_b, gW), mu, value=-1.0).mul_(scale)
    Gb = wide_b * inv_q2 - _row_sums(GW, mu)
    return GW.to(gW.dtype), Gb.to(gb.dtype)


def _by_kernel(gW: Tensor, gb: Tensor, mean: Tensor, scale: Tensor, inv_q2: float) -> tuple[Tensor, Tensor]:
    """The transform by csrc/cpu/bnp.h, which reads each gradient once."""
    assert _backend._C is not None
    rows, taps = gW.shape[0], math.prod(gW.shape[2:])
    if taps > 1:
        mean, scale = mean.repeat_interleave(taps), scale.repeat_interleave(taps)
    length = gW.shape[1] * taps
    groups = mean.numel() // length
    GW, Gb = torch.empty_like(gW), torch.empty_like(gb)
    addresses = (t.data_ptr() for t in (gW, gb, mean, scale, GW, Gb))
    _backend._C.bnp(*addresses, rows, length, rows // groups, inv_q2, torch.get_num_threads())
    return GW, Gb


def _all_plain(*tensors: Tensor) -> bool:
    return all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() and _backend.has_plain_memory(t)
        for t in tensors
    )


def _per_column(values: Tensor, weight: Tensor) -> Tensor:
    """A number per input channel in a shape that meets the weight's (O, C / groups, ...)."""
    per_group = values.view(-1, 1, weight.shape[1])
    groups = per_group.shape[0]
    if groups > 1:
        per_group = per_group.expand(groups, weight.shape[0] // groups, weight.shape[1])
    return per_group.reshape(-1, weight.shape[1], *[1] * (weight.dim() - 2))


def _per_row(values: Tensor, weight: Tensor) -> Tensor:
    """A number per output in a shape that meets the weight's."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def _row_sums(weight: Tensor, columns: Tensor) -> Tensor:
    """The sum over a row of weight * columns, where the taps of a channel share a column."""
    if weight.dim() > 2:
        weight, columns = weight.sum(tuple(range(2, weight.dim()))), columns.flatten(1)
    return torch.mv(weight, columns[0]) if columns.shape[0] == 1 else (weight * columns).sum(1)
