"""docs/theory.md, B: where descent in a dual space ends (Ghane, Akhtiamov, Hassibi, arXiv 2603.10485)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import precond

from .row import F64, Make, Row, generator

# B.4: where preconditioned descent on an underdetermined problem ends.


class Interpolation:
    """min |X W - Y|^2 / 2 with n = 20 < d = 50: docs/theory.md, B.4, with its random numbers."""

    def __init__(self, columns: int = 4) -> None:
        """With one column, from 0."""
        draw = generator(0)
        self.X = torch.randn(20, 50, generator=draw, dtype=F64)
        self.W0 = torch.zeros(50, 1, dtype=F64) if columns == 1 else 0.1 * torch.randn(50, 4, generator=draw, dtype=F64)
        truth = torch.randn(50, columns, generator=draw, dtype=F64)
        self.Y = self.X @ truth
        self.W_gd = self.W0 + torch.linalg.pinv(self.X) @ (self.Y - self.X @ self.W0)
        self.s1 = torch.linalg.matrix_norm(self.X, 2).item()
        self.distance = (self.W_gd - self.W0).norm().item()

    def descend(
        self,
        make: Make,
        steps: int,
        tolerance: float = 1e-12,
        schedule: Callable[[float], float] | None = None,
        dtype: torch.dtype = F64,
        transposed: bool = False,
    ) -> tuple[Tensor, float, int]:
        """W, its residual relative to Y, and the number of steps. ``transposed``: the parameter is a weight as torch has it."""
        X, Y = self.X.to(dtype), self.Y.to(dtype)

        def turn(t: Tensor) -> Tensor:
            return t.T.contiguous() if transposed else t

        p = nn.Parameter(turn(self.W0.to(dtype)).clone())
        optimizer = make([p])
        group = optimizer.param_groups[0]
        lr, bound = group["lr"], tolerance * Y.norm()
        for t in range(steps):
            R = X @ turn(p.detach()) - Y
            if R.norm() <= bound:
                break
            p.grad = turn(X.T @ R)
            if schedule is not None:
                group["lr"] = lr * schedule(t / steps)
            optimizer.step()
        W = turn(p.detach())
        return W.double(), ((X @ W - Y).norm() / Y.norm()).item(), t

    def delta(self, W: Tensor) -> float:
        return (W - self.W_gd).norm().item() / self.distance

    def c(self, W: Tensor) -> float:
        return (W - self.W0).norm().item() / self.distance

    def outside(self, W: Tensor) -> float:
        """The largest entry of the part of W - W0 that X^T does not reach."""
        moved = W - self.W0
        return (moved - torch.linalg.pinv(self.X) @ (self.X @ moved)).abs().max().item()


ETAS = (0.02, 0.2, 0.9, 1.8)
#: kernel, granularity, steps at the four eta (None: no expectation), and of what ends elsewhere delta, c and the spread.
DUAL: list[tuple[str, str, Sequence[int | None], tuple[float, float, float] | None]] = [
    ("identity", "tensor", (27561, 2745, 601, 294), None),
    ("smoothed", "global", (83489, 8339, 1845, 917), None),
    ("clip", "global", (None,) * 4, None),
    ("log", "global", (None,) * 4, None),
    ("smoothed", "spectral", (None,) * 4, None),
    ("clip", "spectral", (None,) * 4, None),
    ("smoothed", "unit", (None,) * 4, None),
    ("adam", "entry", (33246, 3315, 728, 358), (0.3775, 1.06895, 4.1e-3)),
    ("smoothed", "entry", (31889, None, None, 343), (0.4235, 1.0859, 5.6e-3)),
    ("clip", "entry", (31542, None, None, 340), (0.4435, 1.0939, 7.1e-3)),
    ("asinh", "entry", (28700, None, None, 307), (0.253, 1.03155, 8.4e-3)),
]


def dual_bias(figures: dict[str, Any]) -> Iterator[Row]:
    table = "B.4 implicit bias"
    problem = Interpolation()
    yield Row(table, "kappa(X)", 4.72, torch.linalg.cond(problem.X).item(), tolerance=1e-3)
    bars = figures.setdefault("dual", {})
    for kernel, granularity, steps, elsewhere in DUAL:
        name = f"{kernel}, {granularity}"
        ends = {}
        for eta, expected in zip(ETAS, steps, strict=True):
            if eta == 0.02 and expected is None:
                continue

            def make(params, eta=eta, kernel=kernel, granularity=granularity):
                return precond.DualDescent(params, eta / problem.s1**2, kernel, granularity)

            W, _, took = problem.descend(make, 100_000, transposed=granularity == "unit")
            ends[eta] = W
            if expected is not None:
                yield Row(table, f"{name}: steps at eta {eta}", expected, took, tolerance=2e-3)
            if elsewhere is None:
                yield Row(table, f"{name}: delta at eta {eta}", 0.0, problem.delta(W), at_most=1e-8)
            else:
                yield Row(table, f"{name}: delta at eta {eta}", elsewhere[0], problem.delta(W), tolerance=5e-3)
                yield Row(table, f"{name}: c at eta {eta}", elsewhere[1], problem.c(W), tolerance=1e-3)
            identity = abs(problem.c(W) ** 2 - 1 - problem.delta(W) ** 2)
            yield Row(table, f"{name}: |c^2 - 1 - delta^2| at eta {eta}", 0.0, identity, at_most=1e-6)
            bars.setdefault(name, {})[str(eta)] = problem.delta(W)
        if elsewhere is not None:
            spread = (ends[0.02] - ends[1.8]).norm().item() / problem.distance
            yield Row(table, f"{name}: spread between eta 0.02 and 1.8", elsewhere[2], spread, factor=1.2)


def thresholds(figures: dict[str, Any]) -> Iterator[Row]:
    """eta M s1^2 = 2 divides what converges from what does not."""
    table, problem = "B.3 largest rate", Interpolation()
    for granularity, stalls in (("entry", {2.05: 3.5e-3, 2.2: 7.6e-3}), ("tensor", {2.05: 8.8e-4, 2.2: 1.8e-3})):
        for eta in (1.0, 1.9, 1.99, *stalls):

            def make(params, eta=eta, granularity=granularity):
                return precond.DualDescent(params, eta / problem.s1**2, "smoothed", granularity)

            residual = problem.descend(make, 6000, tolerance=1e-14)[1]
            name = f"smoothed, {granularity}: residual at eta {eta}"
            if eta < 2:
                yield Row(table, name, "<= 3e-15", residual, at_most=1e-13)
            else:
                yield Row(table, name, stalls[eta], residual, factor=10)
    # At 1e-4 normalised descent would need 200,000 steps.
    for granularity, floors in (("entry", {1e-2: 0.36, 1e-3: 0.041}), ("tensor", {1e-2: 0.055, 1e-3: 0.0042})):
        for lr, floor in floors.items():

            def make(params, lr=lr, granularity=granularity):
                return precond.DualDescent(params, lr, "normalize", granularity)

            steps = int((6 if granularity == "entry" else 25) / lr)
            residual = problem.descend(make, steps)[1] * problem.Y.norm().item()
            yield Row(table, f"normalize, {granularity}: floor at lr {lr}", floor, residual, factor=10)


def adam_bias(figures: dict[str, Any]) -> Iterator[Row]:
    """Real Adam: one column, from 0, 40,000 steps."""
    table = "B.4 Adam"
    problem = Interpolation(columns=1)
    lrs, steps = (1e-3, 1e-2, 1e-1, 1.0), 40_000
    x = problem.W0.T.repeat(len(lrs), 1).clone()
    params = [nn.Parameter(row) for row in x]
    optimizer = precond.Adam([dict(params=[p], lr=lr) for p, lr in zip(params, lrs, strict=True)])
    H, b = problem.X.T @ problem.X, problem.X.T @ problem.Y[:, 0]
    for t in range(steps):
        G = x @ H - b
        for p, g, group, lr in zip(params, G, optimizer.param_groups, lrs, strict=True):
            p.grad, group["lr"] = g, lr * (1 - t / steps)
        optimizer.step()
    deltas = []
    for row, lr, delta in zip(x, lrs, (0.592, 0.569, 0.512, 0.885), strict=True):
        W = row[:, None]
        deltas.append(problem.delta(W))
        yield Row(table, f"delta at lr {lr}", delta, problem.delta(W), tolerance=5e-3)
        identity = abs(problem.c(W) ** 2 - 1 - problem.delta(W) ** 2)
        yield Row(table, f"|c^2 - 1 - delta^2| at lr {lr}", 0.0, identity, at_most=1e-3)
    for row, lr, spread in zip(x[1:], lrs[1:], (0.034, 0.163, 0.631), strict=True):
        measured = (row - x[0]).norm().item() / problem.distance
        yield Row(table, f"distance between the ends at lr {lr} and 1e-3", spread, measured, tolerance=0.02)
    figures["adam_delta"] = dict(zip(map(str, lrs), deltas, strict=True))


def spectral_momentum(figures: dict[str, Any]) -> Iterator[Row]:
    table, problem = "B.4 Muon", Interpolation()

    def exact(params):
        return precond.DualDescent(params, 0.3, "normalize", "spectral", momentum=0.95, nesterov=True)

    W, _, _ = problem.descend(exact, 4000, schedule=lambda part: (1 - part) ** 2)
    yield Row(table, "polar: outside of the row space", 6e-14, problem.outside(W), at_most=1e-12)
    yield Row(table, "polar: distance to W_GD", 3e-8, (W - problem.W_gd).norm().item(), at_most=1e-6)
    W, _, _ = problem.descend(
        lambda params: precond.Muon(params, lr=0.3, weight_decay=0.0), 4000, schedule=lambda part: (1 - part) ** 2
    )
    # Newton-Schulz runs in bfloat16 here, in float64 there.
    outside = W - problem.W0 - torch.linalg.pinv(problem.X) @ (problem.X @ (W - problem.W0))
    part = outside.norm().item() / problem.distance
    yield Row(table, "Newton-Schulz, bf16: outside of the row space, relative", "7e-14 in fp64", part, at_most=0.05)
    yield Row(table, "Newton-Schulz, bf16: delta", "3e-8 in fp64", problem.delta(W), at_most=0.05)


def soap_bias(figures: dict[str, Any]) -> Iterator[Row]:
    table, problem = "B.4 SOAP", Interpolation()
    for dtype, eps, expected in ((F64, 1e-8, 0.11), (torch.float32, 1e-8, 0.28), (torch.float32, 1e-15, math.inf)):

        def make(params, eps=eps):
            return precond.SOAP(params, lr=0.1, eps=eps, weight_decay=0.0)

        W, residual, _ = problem.descend(make, 800, schedule=lambda part: (1 - part) ** 2, dtype=dtype)
        name = f"{str(dtype).removeprefix('torch.')}, eps {eps:g}"
        if math.isfinite(expected):
            yield Row(table, f"{name}: delta", expected, problem.delta(W), at_most=0.4, at_least=0.03)
        else:
            yield Row(table, f"{name}: delta", "diverged", problem.delta(W), at_most=0.4, at_least=0.03)
        yield Row(table, f"{name}: relative residual", "small", residual, at_most=2e-6)
