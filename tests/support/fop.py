"""What tests of FOP share: layouts, an explicit d x d preconditioner, a smooth loss, steps on random gradients."""

from __future__ import annotations

import math

import pytest
import torch

F64 = torch.float64
# A shape, a mode, and what M mixes: rows before, rows mixed, rows behind in the flattened parameter; None: elementwise.
LAYOUTS = [
    ((5, 3), "output", (1, 5, 3)),
    ((5, 3), "input", (5, 3, 1)),
    ((5, 3), "spatial", (5, 3, 1)),
    ((4, 3, 2, 3), "output", (1, 4, 18)),
    ((4, 3, 2, 3), "input", (4, 3, 6)),
    ((4, 3, 2, 3), "spatial", (12, 6, 1)),
    ((4, 3, 5), "spatial", (12, 5, 1)),
    ((4, 3, 1, 1), "spatial", (4, 3, 1)),
    ((4, 1, 3, 3), "input", (4, 1, 9)),
    ((4, 3), "diagonal", None),
    ((7,), "output", None),
    ((), "spatial", None),
]
layouts = pytest.mark.parametrize(("shape", "mode", "around"), LAYOUTS, ids=lambda of: str(of))


def explicit(M, around):
    """M as it acts on the flattened parameter: d x d."""
    if around is None:
        return torch.diag(M.flatten())
    before, _, behind = around
    eye = torch.eye(before, dtype=M.dtype), torch.eye(behind, dtype=M.dtype)
    return torch.kron(torch.kron(eye[0], M), eye[1])


def loss_of(shape, seed=0):
    """A smooth function of a parameter, with every derivative."""
    d = math.prod(shape)
    features = torch.randn(2 * d + 3, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return lambda w: (features @ w.flatten() - 1.0).cosh().log().sum() / d + 0.1 * (w**4).sum()


def start(shape, dtype=F64, seed=1):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype))


def train(optimizer, params, steps, seed=0, first=0):
    """Steps on random gradients, which depend on the step only."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 * seed + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def layers(dtype=torch.float32):
    return [start(shape, dtype) for shape in ((6, 4), (6,), (5, 3, 3, 3), (4, 3, 1, 1))]
