"""docs/theory.md, A: fixed points of intrinsic L1 (Ye, arXiv 2410.00232), and condition numbers of BNP."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import precond

from .row import F64, Row, generator

# A.2.2: fixed points of intrinsic L1.


def l1_fixed_points(figures: dict[str, Any]) -> Iterator[Row]:
    table = "A.2.2 intrinsic L1"
    draw = generator(0)
    a = torch.randn(60, 30, generator=draw, dtype=F64) * torch.logspace(-1, 1, 30, dtype=F64)
    truth = torch.zeros(30, dtype=F64)
    truth[::3] = torch.randn(10, generator=draw, dtype=F64)
    b = a @ truth + 0.3 * torch.randn(60, generator=draw, dtype=F64)
    # The loss is |A p - b|^2 / 120.
    H, c = a.T @ a / 60, a.T @ b / 60
    lams, steps = (0.3, 0.1), 60_000
    x = torch.zeros(len(lams), 30, dtype=F64)
    params = [nn.Parameter(row) for row in x]
    optimizer = precond.AdamW(
        [dict(params=[p], l1_decay=lam) for p, lam in zip(params, lams, strict=True)], eps=1e-12, weight_decay=0.0
    )
    for t in range(steps):
        for p, g, group in zip(params, x @ H - c, optimizer.param_groups, strict=True):
            p.grad, group["lr"] = g, 2e-2 * (1 - t / steps)
        optimizer.step()
    for row, lam, zeros in zip(x, lams, (9, 20), strict=True):
        g, active = (row @ H - c).abs(), row != 0
        yield Row(table, f"lambda {lam}: mean |g| of active", lam**2, g[active].mean().item(), tolerance=1e-3)
        spread = (g[active] - lam**2).abs().max().item()
        yield Row(table, f"lambda {lam}: largest deviation of |g|", 0.0, spread, at_most=1e-6 if lam == 0.3 else 1e-4)
        largest = g[~active].max().item() if (~active).any() else 0.0
        yield Row(table, f"lambda {lam}: largest |g| of zeros", f"<= {lam**2:g}", largest, at_most=lam**2 + 1e-6)
        # Other random numbers: for information.
        yield Row(table, f"lambda {lam}: nonzeros", zeros, int(active.sum()))
        figures.setdefault("l1", {})[str(lam)] = [g.tolist(), row.tolist()]


# A.3.6: what BNP's preconditioner does to condition numbers.


def kappa(a: Tensor) -> float:
    s = torch.linalg.svdvals(a)
    return (s[0] / s[-1]).item()


def best_scaling(a: Tensor) -> float:
    """The smallest condition number of a with scaled columns, by descent on the logarithms."""
    log_d = (-a.norm(dim=0).log()).requires_grad_()
    gram, best = a.T @ a, math.inf
    optimizer = torch.optim.Adam([log_d])
    for i in range(600):
        d = log_d.exp()
        eigenvalues = torch.linalg.eigvalsh(d[:, None] * gram * d)
        value = (eigenvalues[-1] / eigenvalues[0]).log()
        best = min(best, math.exp(value.item() / 2))
        optimizer.zero_grad()
        value.backward()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - i / 600)
        optimizer.step()
    return best


#: kappa of Hhat, Hhat U and Hhat U D, of the Hessian before and after, of the best diagonal scaling, steps before and after.
BNP = {
    "independent": (5.9e4, 9.7e3, 1.304, 3.5e9, 1.70, 1.284, 2.4e10, 19.0),
    "correlated": (9.5e4, 1.9e4, 4.40, 9.1e9, 19.4, 3.985, 6.3e10, 141.0),
}


def bnp_conditioning(figures: dict[str, Any]) -> Iterator[Row]:
    table = "A.3.6 BNP"
    N, m = 1000, 20
    for case, expected in BNP.items():
        draw = generator(0)
        sigma = torch.logspace(-2, 2, m, dtype=F64)
        H = torch.randn(N, m, generator=draw, dtype=F64)
        if case == "correlated":
            H = H @ (torch.eye(m, dtype=F64) + 0.5 * torch.randn(m, m, generator=draw, dtype=F64) / math.sqrt(m))
        H = H * sigma + torch.linspace(-5, 5, m, dtype=F64) * sigma
        layer = nn.Linear(m, 1, dtype=F64)
        optimizer = precond.BNP(layer, torch.optim.SGD(layer.parameters()), stat_momentum=0.0, eps1=0.0, eps2=1e-12)
        layer(H).sum().backward()
        optimizer.step()
        own = optimizer.own[layer.weight]
        U = torch.eye(m + 1, dtype=F64)
        U[0, 1:] = -own["mean"]
        extended = torch.cat([torch.ones(N, 1, dtype=F64), H], 1)
        scaled = extended @ U / torch.cat([torch.ones(1, dtype=F64), own["var"].sqrt()])
        centred, best = kappa(extended @ U), best_scaling(extended @ U)
        before, after = kappa(extended), kappa(scaled)
        measured = [before, centred, after, before**2, after**2, best]
        measured += [math.log(1e6) / 2 * (k**2 + 1) for k in (before, after)]
        names = ["kappa(Hhat)", "kappa(Hhat U)", "kappa(Hhat U D)", "Hessian before", "Hessian after", "best scaling"]
        names += ["steps before", "steps after"]
        # The expected numbers are of other random correlations.
        allowed = 1.05 if case == "independent" else 2.5
        for name, number, ours in zip(names, expected, measured, strict=True):
            squared = name.startswith(("Hessian", "steps"))
            yield Row(table, f"{case}: {name}", number, ours, factor=round(allowed ** (2 if squared else 1), 2))
        yield Row(
            table,
            f"{case}: over the best scaling",
            expected[2] / expected[5],
            after / best,
            at_least=1.0,
            at_most=math.sqrt(m + 1),
        )
        figures.setdefault("bnp", {})[case] = measured
