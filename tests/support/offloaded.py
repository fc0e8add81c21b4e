"""Small training runs whose states the host has, and others, on a CUDA device; and what is left of them."""

from __future__ import annotations

import torch
from torch import nn

from precond import _C
from precond._core.sharding import local
from support import device
from support.cases import bits_equal, random_values

CUDA = device.device()
SHAPES = [(3, 5), (0,), (), (70, 128), (513,), (33_001,)]
STEPS = 4
FORMATS = {"state_format": "int8", "weight_format": "split24"}


def parameters(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(1)
    return [nn.Parameter(random_values(shape, dtype).to(CUDA.name)) for shape in shapes]


def give(params, step, dtype=None):
    torch.manual_seed(100 + step)
    for p in params:
        p.grad_dtype = dtype or p.dtype
        p.grad = random_values(p.shape, p.grad_dtype).to(CUDA.name)


def train(make, dtype=torch.float32, moves=None, steps=range(STEPS), params=None, gradients=None, moving=slice(None)):
    """``moves``: by the step before which it happens, where the states of the parameters ``moving`` go."""
    params = parameters(dtype) if params is None else params
    optimizer = make(params)
    for step in steps:
        if moves and step in moves:
            for p in params[moving]:
                optimizer.move(p, moves[step])
        give(params, step, gradients)
        optimizer.step()
    optimizer.wait()
    return params, optimizer


def found(params, optimizer):
    every = {}
    for i, p in enumerate(params):
        every[str(i)] = p.detach().cpu()
        for key, value in optimizer.state.get(p, {}).items():
            every[f"{i} {key}"] = torch.as_tensor(value).detach().cpu()
    return every


def assert_same(ours, theirs):
    a, b = found(*ours), found(*theirs)
    assert a.keys() == b.keys()
    assert not [name for name in a if not bits_equal(a[name], b[name])]


def on_host(optimizer, p):
    """Whether a parameter's states are in pinned memory."""
    states = [local(t) for t in optimizer.state[p].values() if isinstance(t, torch.Tensor) and t.dim() and t.numel()]
    return bool(states) and all(_C.Pinned.has(t.data_ptr()) for t in states)
