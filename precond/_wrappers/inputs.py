"""The inputs of layers: hooks that see them, and their moments, pooled between steps and over processes."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Layer

#: Elements of an input that are centred at a time: 512 KB of float32 stay in cache.
_CHUNK = 1 << 17


@dataclasses.dataclass
class Inputs:
    """What a layer has seen since the last step: the rows of its outputs, and the moments of ``count`` values per channel.

    Samples are images of a convolution, and rows of any other layer: docs/theory.md, A.3.4.
    """

    rows: int
    samples: int
    count: int
    mean: Tensor
    squares: Tensor  # sum of squared deviations from the mean
    recomputed: bool  # by a checkpoint, whose first forward ran without gradients

    def add(self, other: Inputs) -> None:
        """Pool two sets (Chan, Golub, LeVeque 1979)."""
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.squares = self.squares + other.squares + delta.square() * (self.count * other.count / total)
        self.rows, self.samples, self.count = self.rows + other.rows, self.samples + other.samples, total


class Observer:
    """A forward hook that passes what a layer sees in training to a method, as long as the method's object lives. The hook of a
    copied layer does nothing. In a compiled model it is an operator, since a hook between graphs would cut them at each layer.
    """

    def __init__(self, layer: nn.Module | None, method: Callable[[nn.Module, Tensor, Tensor], None] | None) -> None:
        self.layer = None if layer is None else weakref.ref(layer)
        self.method = None if method is None else weakref.WeakMethod(method)
        number = next(_NUMBERS)
        _OBSERVERS[number] = self
        self.token = torch.tensor(number, dtype=torch.int64, device="cpu")

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not layer.training or not torch.is_grad_enabled():
            return
        x, weight = args[0] if args else kwargs["input"], layer._parameters.get("weight")
        # Under torch.func a compiler cannot read the level, and leaves it to the method, which sees what x is.
        if weight is not None and torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is None:
            torch.ops.precond.observe(self.token, weight.detach(), x.detach(), output.detach())
        elif self.method is not None and (method := self.method()) is not None:
            method(layer, x, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return Observer, (None, None)


_NUMBERS = itertools.count()
_OBSERVERS: weakref.WeakValueDictionary[int, Observer] = weakref.WeakValueDictionary()


def _observe(token: Tensor, weight: Tensor, x: Tensor, output: Tensor) -> None:
    """What runs in a graph in place of a hook. ``token`` is the observer's number, on the host."""
    observer = _OBSERVERS.get(int(token))
    if observer is None or observer.layer is None or observer.method is None:
        return
    layer, method = observer.layer(), observer.method()
    own = None if layer is None else layer._parameters.get("weight")
    # A graph is handed other objects with the same memory; torch.func.functional_call has another weight.
    if layer is not None and method is not None and own is not None and own.data_ptr() == weight.data_ptr():
        method(layer, x, output)


# The token counts as written, so that no compiler leaves the operator out. CUDA graphs must: a replay would see nothing. Not
# by torch.library.custom_op: it raises the version of what it writes, and the backward of a checkpointed layer fails.
_LIBRARY = torch.library.Library("precond", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "observe(Tensor(a!) token, Tensor weight, Tensor x, Tensor output) -> ()",
    tags=[tag for tag in torch.Tag.__members__.values() if tag.name == "cudagraph_unsafe"],  # torch before 2.8 has none
)
_LIBRARY.impl("observe", _observe, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("precond::observe", lambda token, weight, x, output: None, lib=_LIBRARY)


def statistics_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the moments of a layer's inputs."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def moments(x: Tensor, dim: int, dtype: torch.dtype) -> tuple[int, Tensor, Tensor]:
    """How many values a channel has, their mean and the sum of their squared deviations."""
    x = x.unsqueeze(0) if dim == 0 else x
    dim = max(dim, 1)
    dims = [d for d in range(x.dim()) if d != dim]
    count = x.numel() // x.shape[dim]
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x.to(dtype), dims, correction=0)
        return count, mean, var * count
    # In chunks that stay in cache: 2.0 ms where torch.var_mean takes 28, 4096 x 1024 float32 on one core.
    mean = x.mean(dims, dtype=dtype)
    longest = max(dims, key=lambda d: x.shape[d])
    shift = mean.view(-1, *[1] * (x.dim() - 1 - dim))
    squares = torch.zeros_like(mean)
    per = max(1, _CHUNK * x.shape[longest] // x.numel())
    for chunk in torch.split(x, per, longest):
        squares += (chunk - shift).square_().sum(dims)
    return count, mean, squares


def add_seen(pending: dict[Tensor, Inputs], weight: Tensor, x: Tensor, output: Tensor) -> None:
    """Pool the inputs of one forward with what was seen since the last step."""
    # Activation checkpointing runs a layer again during the backward. That run counts only if the first one had gradients
    # disabled and therefore did not.
    recomputed = torch._C._current_graph_task_id() != -1
    known = pending.get(weight)
    if x.numel() == 0 or (recomputed and known is not None and not known.recomputed):
        return
    count, mean, squares = moments(x.detach(), x.dim() + 1 - weight.dim(), statistics_dtype(weight))
    rows = output.numel() // weight.shape[0]
    images = len(x) if x.dim() == weight.dim() else 1
    inputs = Inputs(rows, images if weight.dim() > 2 else rows, count, mean, squares, recomputed)
    if known is None:
        pending[weight] = inputs
    else:
        known.add(inputs)
        known.recomputed &= recomputed


def pooled(pending: dict[Tensor, Inputs], layers: dict[Tensor, Layer], process_group: Any) -> dict[Tensor, Inputs]:
    """What all processes have seen, in one reduction of sums in float64, with one copy to a device and one back."""
    counts, sums = [], []
    for weight, layer in layers.items():
        if (inputs := pending.get(weight)) is None:
            counts.append([0, 0, 0])
            sums.append(torch.zeros(2 * layer.channels, dtype=torch.float64, device=weight.device))
        else:
            mean = inputs.mean.double()
            counts.append([inputs.rows, inputs.samples, inputs.count])
            sums.append(torch.cat([mean, inputs.squares / inputs.count + mean.square()]) * inputs.count)
    head = torch.tensor(counts, dtype=torch.float64, device=sums[0].device)
    total = torch.cat([head.flatten(), *sums])
    torch.distributed.all_reduce(total, group=process_group)
    of_head, *of_layers = torch.split(total, [head.numel(), *map(len, sums)])
    found = {}
    for weight, numbers, part in zip(layers, of_head.view_as(head).tolist(), of_layers, strict=True):
        rows, samples, count = map(int, numbers)
        if count:
            mean, square = (part / count).view(2, -1)
            squares = (square - mean.square()).clamp_min(0.0) * count
            dtype = statistics_dtype(weight)
            found[weight] = Inputs(rows, samples, count, mean.to(dtype), squares.to(dtype), False)
    return found
