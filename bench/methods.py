"""Methods whose step is more than a rule: against their own text in plain PyTorch, what of a step is matrix products, and the
time per byte of its passes. Part of ``python -m bench cpu``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import precond
from precond._plan import StepPlan

from . import timing

SHAPE, COUNT = (512, 512), 16
#: Operators that count as matrix products, decompositions with them.
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "svd", "qr", "eigh")

# Each method, and the bytes per element that its passes move: a parameter or buffer 8, a gradient 4 (2 in bfloat16), a state 8.
METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any], float]] = {
    "DualDescent, entry, adam": (precond.DualDescent, dict(granularity="entry", kernel="adam"), 12),
    "DualDescent, entry, log, momentum": (
        precond.DualDescent,
        dict(granularity="entry", kernel="log", momentum=0.9),
        20,
    ),
    "DualDescent, tensor, clip": (precond.DualDescent, dict(granularity="tensor"), 12),
    "DualDescent, global, clip, momentum": (precond.DualDescent, dict(momentum=0.9), 20 + 12),
    "DualDescent, unit, clip": (precond.DualDescent, dict(granularity="unit"), 12),
    "DualDescent, spectral, clip": (precond.DualDescent, dict(granularity="spectral"), 12),
    "Muon": (precond.Muon, {}, 16 + 10),
    "GaussNewton, gradient": (precond.GaussNewton, dict(curvature="gradient"), 28),
    "GaussNewton, gradient, kronecker": (
        precond.GaussNewton,
        dict(curvature="gradient", basis="kronecker"),
        28 + 12,
    ),
    "Sophia": (precond.Sophia, {}, 28),
    "SOAP": (precond.SOAP, {}, 28 + 12),
}


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(SHAPE)) for _ in range(COUNT)]
    for p in params:
        p.grad = torch.randn(SHAPE)
    return params


def time_of_passes(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Seconds per step in the compiled passes."""
    spent = [0.0]
    run = StepPlan.run

    def timed(self, *arguments):
        start = time.perf_counter()
        result = run(self, *arguments)
        spent[0] += time.perf_counter() - start
        return result

    StepPlan.run = timed  # type: ignore[method-assign]
    try:
        for _ in range(steps):
            optimizer.step()
    finally:
        StepPlan.run = run  # type: ignore[method-assign]
    return spent[0] / steps


def share_of_products(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """What part of a step's time is spent in matrix products and decompositions."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        whole = time.perf_counter() - start
    events = profile.key_averages()
    products = sum(e.self_cpu_time_total for e in events if e.key.rpartition("_")[2].rpartition(":")[2] in PRODUCTS)
    return products / 1e6 / whole


def check(name: str) -> None:
    """Refuse to time what is not its own text: a few steps against the reference backend."""
    cls, kwargs, _ = METHODS[name]
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(48, 32)) for _ in range(2)]
        optimizer = cls(params, lr=1e-2, **kwargs, backend=backend)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(48, 32)
            if isinstance(optimizer, precond.Sophia):
                optimizer.update_curvature()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    # bfloat16 products and refreshed bases make one ulp of a buffer many of a step.
    difference = (results[0] - results[1]).abs().max() / 4e-2
    if not difference < 2e-2:
        raise AssertionError(f"{name}: the fused step differs by {difference:.1e} of the steps' size")


def measured(name: str, seconds: float, adamw: float) -> dict[str, object]:
    check(name)
    cls, kwargs, bytes_per_element = METHODS[name]
    optimizers = {b: cls(parameters(), lr=1e-6, **kwargs, backend=b) for b in ("cpu", "reference")}
    times = timing.interleaved({b: optimizer.step for b, optimizer in optimizers.items()}, seconds, least=5)
    medians = {b: statistics.median(values) * 1e3 for b, values in times.items()}
    steps = 10 if medians["cpu"] > 20 else 40
    per_byte = min(time_of_passes(optimizers["cpu"], steps) for _ in range(3)) / bytes_per_element / adamw
    ratio = timing.ratio(times, "cpu", "reference")
    share = share_of_products(optimizers["cpu"], 10)
    return {
        "case": f"{name}: 16 matrices of 512 x 512, {100 * share:.0f} % products",
        "ms": {"plain PyTorch": medians["reference"], "precond": medians["cpu"]},
        "products": share,
        "targets": [
            {"of": "precond", "to": "plain PyTorch", "ratio": ratio, "target": 1.0, "met": ratio <= 1.0},
            {"of": "passes", "to": "AdamW, per byte", "ratio": per_byte, "target": 1.2, "met": per_byte <= 1.2},
        ],
    }


def results(seconds: float, only: str) -> list[dict[str, object]]:
    """An entry per method."""
    names = [name for name in METHODS if only in name]
    if not names:
        return []
    optimizer = precond.AdamW(parameters())
    time_of_passes(optimizer, 5)
    adamw = min(time_of_passes(optimizer, 40) for _ in range(3)) / 28
    return [measured(name, seconds, adamw) for name in names]
