"""The layers of a model whose gradients can be preconditioned by their inputs: dense ones and convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass
class Layer:
    """What belongs to a weight: the bias that centres its gradients, if there is one, and its input channels."""

    bias: Tensor | None
    channels: int


def plain_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The dense layers and convolutions whose forward is that of torch's class."""
    # nn.MultiheadAttention multiplies by this layer's weight itself and never runs it.
    never_run = {of.out_proj for of in module.modules() if isinstance(of, nn.MultiheadAttention)}
    for layer in module.modules():
        if layer in never_run:
            plain = False
        elif isinstance(layer, nn.Linear):
            plain = type(layer).forward is nn.Linear.forward
        elif isinstance(layer, _CONVOLUTIONS):
            kind = next(kind for kind in _CONVOLUTIONS if isinstance(layer, kind))
            plain = type(layer).forward is kind.forward and type(layer)._conv_forward is kind._conv_forward
        else:
            plain = False
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise ValueError(f"module must have no lazy layers: run it once before, got a {type(layer).__name__}")
        if plain and layer._parameters.get("weight") is not None:
            yield layer


def layers_of(
    module: nn.Module, params: Iterable[Tensor], name_of: Callable[[Tensor], str], *, in_z: bool
) -> dict[Tensor, Layer]:
    """The layers of a module whose weight is among these parameters, by weight. ``name_of``: what errors call one. ``in_z``:
    weights will be moved in the variables of standardised inputs, for which 16-bit ones are too coarse.
    """
    ours = set(params)
    found: dict[Tensor, Layer] = {}
    for layer in plain_layers(module):
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if weight not in ours or weight is None or weight.is_complex() or weight.numel() == 0:
            continue
        if hasattr(weight, "placements"):
            raise ValueError(
                f"{name_of(weight)} must be a plain tensor, got a {type(weight).__name__} of {tuple(weight.shape)}"
            )
        if in_z and weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"compose='direction' needs float32 or float64 weights, got {weight.dtype} for {name_of(weight)}"
            )
        new = Layer(bias if bias in ours else None, int(getattr(layer, "groups", 1)) * weight.shape[1])
        known = found.setdefault(weight, new)
        if known.channels != new.channels:
            raise ValueError(
                "layers that share a weight must have the same number of input channels, "
                f"got {known.channels} and {new.channels} for {name_of(weight)}"
            )
        if known.bias is not new.bias:
            known.bias = None
    # A bias that several weights share cannot centre any of them.
    users = [layer.bias for layer in found.values() if layer.bias is not None]
    for known in found.values():
        if known.bias is not None and sum(known.bias is other for other in users) > 1:
            known.bias = None
    return found
