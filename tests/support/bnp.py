"""Layers, inputs and networks of BNP's tests."""

from __future__ import annotations

import torch
from torch import nn

F64 = torch.float64


#: A layer without padding, and the shape of its inputs.
LAYERS = {
    "linear": (lambda **k: nn.Linear(5, 3, **k), (12, 5)),
    "linear_few_rows": (lambda **k: nn.Linear(40, 3, **k), (6, 40)),
    "linear_leading": (lambda **k: nn.Linear(5, 3, **k), (3, 4, 2, 5)),
    "linear_one_row": (lambda **k: nn.Linear(5, 3, **k), (5,)),
    "conv1d": (lambda **k: nn.Conv1d(4, 3, 3, stride=2, **k), (6, 4, 9)),
    "conv1d_unbatched": (lambda **k: nn.Conv1d(4, 3, 3, **k), (4, 9)),
    "conv2d": (lambda **k: nn.Conv2d(4, 6, (3, 2), dilation=2, **k), (3, 4, 9, 8)),
    "conv2d_few_rows": (lambda **k: nn.Conv2d(4, 6, 3, **k), (1, 4, 4, 4)),
    "conv2d_groups": (lambda **k: nn.Conv2d(4, 6, 3, groups=2, **k), (3, 4, 5, 6)),
    "conv2d_depthwise": (lambda **k: nn.Conv2d(4, 8, 3, groups=4, **k), (3, 4, 5, 6)),
    "conv3d": (lambda **k: nn.Conv3d(2, 3, 2, **k), (3, 2, 4, 4, 4)),
}


def layer_of(name, **kwargs):
    make, shape = LAYERS[name]
    return make(dtype=F64, **kwargs), shape


def inputs(shape, channel, seed=0):
    """Inputs whose channels have scales over a decade and means of two deviations."""
    generator = torch.Generator().manual_seed(seed)
    width = shape[channel]
    scales = torch.logspace(-0.5, 0.5, width, dtype=F64)
    x = torch.randn(shape, generator=generator, dtype=F64).movedim(channel, -1)
    return ((x + torch.linspace(-2, 2, width, dtype=F64)) * scales).movedim(-1, channel)


def channel_of(layer, shape):
    return len(shape) + 1 - layer.weight.dim()


def loss_of(y):
    return torch.tanh(y - 0.3).square().mean() + 0.1 * y.sin().mean()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def small_net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 8), nn.Linear(8, 3)
    ).to(dtype)


def snapshot(opt):
    kept = ("rows", "samples")
    return [
        (tuple(w.shape), own["mean"].tolist(), own["var"].tolist(), *map(own.get, kept)) for w, own in opt.own.items()
    ]
