"""Methods whose step is more than a rule: against their own text in plain PyTorch, what of a step is matrix products, and the
time per byte of its passes. Part of ``python -m bench cpu``.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import precond
from precond._core.plan import StepPlan
from precond._wrappers.accumulated import Earlier
from precond.bnp import precondition_gradients

from . import timing

#: Matrices, and their sides; ``quick`` has smaller ones, because a decomposition takes time as their third power.
COUNT, SIDE, QUICK_SIDE = 16, 512, 256
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


def parameters(side: int) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(side, side)) for _ in range(COUNT)]
    for p in params:
        p.grad = torch.randn(side, side)
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


def measured(name: str, seconds: float, quick: bool) -> dict[str, object]:
    check(name)
    side = QUICK_SIDE if quick else SIDE
    cls, kwargs, bytes_per_element = METHODS[name]
    optimizers = {b: cls(parameters(side), lr=1e-6, **kwargs, backend=b) for b in ("cpu", "reference")}
    times = timing.interleaved(
        {b: optimizer.step for b, optimizer in optimizers.items()}, seconds, least=3 if quick else 5
    )
    medians = {b: statistics.median(values) * 1e3 for b, values in times.items()}
    few = medians["cpu"] > 20
    if quick:
        steps, repeats = 2 if few else 20, 1
    else:
        steps, repeats = 10 if few else 40, 3
    passes = min(time_of_passes(optimizers["cpu"], steps) for _ in range(repeats))
    per_byte = passes / bytes_per_element / adamw_per_byte(side)
    ratio = timing.ratio(times, "cpu", "reference")
    return {
        "ms": {"plain PyTorch": medians["reference"], "precond": medians["cpu"]},
        "products": share_of_products(optimizers["cpu"], min(steps, 10)),
        "targets": [
            {"of": "precond", "to": "plain PyTorch", "ratio": ratio, "target": 1.0, "met": ratio <= 1.0},
            {"of": "passes", "to": "AdamW, per byte", "ratio": per_byte, "target": 1.2, "met": per_byte <= 1.2},
        ],
    }


@functools.cache
def adamw_per_byte(side: int) -> float:
    """Seconds of AdamW's pass per byte of an element."""
    optimizer = precond.AdamW(parameters(side))
    time_of_passes(optimizer, 5)
    return min(time_of_passes(optimizer, 40) for _ in range(3)) / 28


def against_plain(ours: Callable[[], object], plain: Callable[[], object], seconds: float) -> dict[str, object]:
    """What a wrapper adds to a step, against the same in plain PyTorch."""
    times = timing.interleaved({"precond": ours, "plain PyTorch": plain}, seconds)
    ratio = timing.ratio(times, "precond", "plain PyTorch")
    return {
        "ms": {key: statistics.median(values) * 1e3 for key, values in times.items()},
        "targets": [{"of": "precond", "to": "plain PyTorch", "ratio": ratio, "target": 1.0, "met": ratio <= 1.0}],
    }


def transform_of_gradients(seconds: float, side: int) -> dict[str, object]:
    """BNP's, of gradients of weights and biases."""
    gradients = [p.grad for p in parameters(side)]
    biases = [torch.randn(side) for _ in gradients]
    mean, inv = torch.randn(side), torch.rand(side) + 0.5

    def transformed(g: torch.Tensor, gb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = (g - gb[:, None] * mean) * (inv * 0.5)
        return weight, gb * 0.5 - weight @ mean

    for ours, plain in zip(
        precondition_gradients(gradients[0], biases[0], mean, inv, 0.5),
        transformed(gradients[0], biases[0]),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)
    return against_plain(
        lambda: [precondition_gradients(g, gb, mean, inv, 0.5) for g, gb in zip(gradients, biases, strict=True)],
        lambda: [transformed(g, gb) for g, gb in zip(gradients, biases, strict=True)],
        seconds,
    )


def there_and_back(seconds: float, side: int) -> dict[str, object]:
    """GradientRegularizer's step to the other point and back."""
    params = parameters(side)
    base = precond.AdamW(params, lr=1e-6)
    base.step()
    regularizer = precond.GradientRegularizer(base)

    def ours() -> None:
        given = [p.grad for p in params]

        def closure() -> None:
            for p, g in zip(params, given, strict=True):
                p.grad = g

        regularizer._combine(closure, Earlier(params))

    @torch.no_grad()
    def plain() -> None:
        for p in params:
            state = base.state[p]
            backup, g = p.clone(), p.grad
            p += 1e-3 * g / ((state["exp_avg_sq"] / 1e-3).sqrt() + 1e-8)
            p.copy_(backup)
            p.grad = g + 10.0 * (g - g)

    return against_plain(ours, plain, seconds)


def fop_around_adamw(seconds: float, side: int) -> dict[str, object]:
    """FOP's step beside its base's."""
    base = precond.AdamW(parameters(side), lr=1e-6)
    fop = precond.FOP(precond.AdamW(parameters(side), lr=1e-6), 1e-3, mode="output", compose="gradient")
    fop.step()
    times = timing.interleaved({"FOP": fop.step, "AdamW": base.step}, seconds)
    return {
        "ms": {key: statistics.median(values) * 1e3 for key, values in times.items()},
        "products": share_of_products(fop, 10),
        "targets": [],
    }


def cases(seconds: float, quick: bool) -> dict[str, Callable[[], dict[str, object]]]:
    """What measures each method and each wrapper, by the name of its case."""
    side = QUICK_SIDE if quick else SIDE
    found = {name: functools.partial(measured, name, seconds, quick) for name in METHODS}
    found |= {
        "BNP, transform of gradients": functools.partial(transform_of_gradients, seconds, side),
        "GradientRegularizer, there and back": functools.partial(there_and_back, seconds, side),
        "FOP, output, around AdamW": functools.partial(fop_around_adamw, seconds, side),
    }
    return {f"{name}: {COUNT} matrices of {side} x {side}": measure for name, measure in found.items()}
