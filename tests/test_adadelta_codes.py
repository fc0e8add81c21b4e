"""Why Adadelta keeps its second moment out of codes: the figures of docs/theory.md, A.2.2."""

from __future__ import annotations

import pytest
import torch

from precond._core.formats.codec import decode, encode
from precond._core.formats.random import random_words

SHAPE = torch.Size((64, 64))
STEPS, LAST, RHO, EPS = 600, 100, 0.9, 1e-6


def lengths(square_format, delta_format):
    """Error and length of the last steps with states in these formats, relative to those with float32 states."""
    generator = torch.Generator().manual_seed(0)
    scale = 0.1 * torch.exp(1.5 * torch.randn(SHAPE.numel(), generator=generator))
    exact, stored = [[torch.zeros_like(scale), torch.zeros_like(scale)] for _ in range(2)]
    errors, ratios = [], []
    for step in range(1, STEPS + 1):
        g = torch.randn(SHAPE.numel(), generator=generator) * scale
        deltas = []
        for states in (exact, stored):
            v, acc = states
            v = RHO * v + (1 - RHO) * g * g
            delta = ((acc + EPS) / (v + EPS)).sqrt() * g
            states[:] = v, RHO * acc + (1 - RHO) * delta * delta
            deltas.append(delta)
        if step > STEPS - LAST:
            norm = deltas[0].norm()
            errors.append(((deltas[1] - deltas[0]).norm() / norm).item())
            ratios.append((deltas[1].norm() / norm).item())
        words = random_words(7, step, (0, 0, 0), SHAPE, scale.device)
        for k, name in enumerate((square_format, delta_format)):
            packed = encode(stored[k].view(SHAPE), name, words, 1 + k)
            stored[k] = decode(*packed, name, SHAPE).reshape(-1).float()
    return sum(errors) / LAST, sum(ratios) / LAST


@pytest.mark.parametrize(
    ("square_format", "delta_format", "error", "length"),
    [
        ("uint8", "uint8", 0.53, 0.95),
        ("uint4", "uint4", 2.98, 3.15),
        ("bf16_stochastic", "uint8", 0.026, 1.0),
        ("bf16_stochastic", "uint4", 0.36, 1.0),
    ],
)
def test_a_second_moment_in_codes_makes_steps_wrong(square_format, delta_format, error, length):
    assert lengths(square_format, delta_format) == pytest.approx((error, length), rel=0.03)
