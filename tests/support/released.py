"""A small training run with released gradients or without, and what is left of it."""

from __future__ import annotations

import torch
from torch import nn

from support.cases import bits_equal

STEPS = 4


def batch(step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(dtype)


def backward(net: nn.Module, step: int, factor: float = 1.0) -> None:
    dtype = next(net.parameters()).dtype
    (factor * net(batch(step, dtype)).float().square().mean()).backward()


def train(net, optimizer, steps=range(STEPS), passes=1):
    for step in steps:
        for each in range(passes):
            backward(net, passes * step + each)
        optimizer.step()
        optimizer.zero_grad()


def clip_of(optimizer) -> str | None:
    return None if optimizer._own["max_grad_norm"] is None else "previous"


def everything(net, optimizer) -> dict[str, torch.Tensor]:
    """Parameters and states, by names."""
    found = {}
    for name, p in net.named_parameters():
        found[name] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{name} {key}"] = torch.as_tensor(value)
    return found


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not bits_equal(a[name], b[name])]
