"""The reference itself: against torch.optim in float64, and against what docs/theory.md, A.2 derives."""

from __future__ import annotations

import math

import pytest
import torch
from families import ALL_RULES, WITH_PEER

from precond import _C, reference

F64 = torch.float64
L1_RULES = {"proximal": "adamw_l1", "subgradient": "adamw_l1_subgradient"}


def hyper_of(**values):
    return {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "l1_decay": 0.0,
            "l1_cap": math.inf} | values  # fmt: skip


def test_the_three_texts_have_the_same_rules():
    from precond import triton_kernels

    assert set(reference.RULES) == set(_C.rules) == set(triton_kernels.RULES) == {row.rule for row in ALL_RULES}


@pytest.mark.parametrize("row", WITH_PEER, ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_it_is_torch_in_float64(row, dtype):
    ours = [torch.randn(s, dtype=dtype).requires_grad_() for s in ((7, 5), (3,), ())]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    a = row.cls(ours, **row.kwargs)
    b = row.peer(theirs, **row.kwargs)
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=row.peer_rtol, atol=row.peer_rtol / 10)
        for key, state in b.state[q].items():
            torch.testing.assert_close(a.state[p][key], state, rtol=row.peer_rtol, atol=row.peer_rtol / 10)


def quadratic(seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=generator, dtype=F64)
    return a @ a.T / n, torch.randn(n, generator=generator, dtype=F64)


@pytest.mark.parametrize("penalty", ["l2", "proximal", "subgradient"])
def test_intrinsic_decay_is_the_penalty_on_z(penalty):
    """With den frozen, the rule in p-space is gradient descent with a penalty on z = p / P, P = den^(-1/2)."""
    h, b = quadratic()
    v = torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=F64) + 0.1
    lr, lam = 0.03, 0.4
    den = v.sqrt()
    scale = den**-0.5
    # beta2 close to 1 and a huge step count freeze v and switch the bias corrections off.
    hyper = hyper_of(lr=lr, beta1=0.0, beta2=1.0 - 1e-300, eps=0.0)
    rule = reference.RULES["adamw" if penalty == "l2" else L1_RULES[penalty]].update
    hyper |= {"weight_decay": lam} if penalty == "l2" else {"l1_decay": lam}

    def frozen(p, g):
        new_p, _ = rule(p, g, (torch.zeros_like(p), v), hyper | {"beta2": FROZEN}, 1, False)
        return new_p

    p = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=F64)
    z = p / scale
    for _ in range(300):
        p = frozen(p, h @ p - b)
        grad_z = scale * (h @ (scale * z) - b)
        if penalty == "l2":
            z = z - lr * (grad_z + lam * z)
        elif penalty == "proximal":
            z = reference.soft_threshold(z - lr * grad_z, torch.full_like(z, lr * lam))
        else:
            z = z - lr * (grad_z + lam * torch.sign(z))
    assert (p - scale * z).abs().max() <= 1e-12


class _Frozen(float):
    """A beta2 that leaves v alone and makes every bias correction 1: beta2 = 1, 1 - beta2 = 0, beta2^t = 0."""

    def __mul__(self, other):
        return other

    __rmul__ = __mul__

    def __rsub__(self, other):
        return 0.0

    def __pow__(self, other):
        return 0.0


FROZEN = _Frozen(1.0)


def lasso():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, 30, generator=generator, dtype=F64) * torch.logspace(-1, 1, 30, dtype=F64)
    x = torch.zeros(30, dtype=F64)
    x[::3] = torch.randn(10, generator=generator, dtype=F64)
    b = a @ x + 0.3 * torch.randn(60, generator=generator, dtype=F64)
    return a, b


@pytest.mark.parametrize("lam", [0.3, 0.1])
def test_fixed_points_have_gradients_of_lambda_squared(lam):
    """Full-batch Adam with intrinsic L1 solves L + lam^2 |p|_1: docs/theory.md, A.2.2, deterministic limit."""
    a, b = lasso()
    hessian, linear = a.T @ a / 60, a.T @ b / 60
    rule = reference.RULES["adamw_l1"].update
    p, states = torch.zeros(30, dtype=F64), (torch.zeros(30, dtype=F64),) * 2
    steps = 20_000
    for t in range(1, steps + 1):
        hyper = hyper_of(lr=2e-2 * (1 - t / (steps + 1)), eps=1e-12, l1_decay=lam, l1_cap=10.0)
        p, states = rule(p, hessian @ p - linear, states, hyper, t, t == 1)
    g = (hessian @ p - linear).abs()
    active = p != 0
    assert 0 < active.sum() < 30
    assert (g[active] - lam**2).abs().max() <= (1e-4 if lam == 0.3 else 5e-4)
    assert (g[~active] <= lam**2 + 1e-6).all()


def test_the_loss_scale_law():
    """Multiplying L by c, l1_decay by sqrt(c) and eps by c leaves the trajectory unchanged."""
    h, b = quadratic()
    c = 1e4
    rule = reference.RULES["adamw_l1"].update

    def train(scale):
        p, states = torch.ones(12, dtype=F64), (torch.zeros(12, dtype=F64),) * 2
        hyper = hyper_of(lr=0.02, eps=1e-8 * scale, weight_decay=0.1, l1_decay=0.2 * math.sqrt(scale), l1_cap=math.inf)
        for t in range(1, 301):
            p, states = rule(p, scale * (h @ p - b), states, hyper, t, t == 1)
        return p

    assert (train(1.0) - train(c)).abs().max() <= 1e-13


def test_kkt_conditions_with_frozen_p():
    """Active coordinates: g = -lam sqrt(den) sign(p); the others: |g| <= lam sqrt(den)."""
    h, b = quadratic(3)
    v = torch.rand(12, generator=torch.Generator().manual_seed(4), dtype=F64) + 0.5
    lam = 0.35
    hyper = hyper_of(lr=0.1, beta1=0.0, eps=0.0, l1_decay=lam) | {"beta2": FROZEN}
    p = torch.zeros(12, dtype=F64)
    for _ in range(20_000):
        p, _ = reference.RULES["adamw_l1"].update(p, h @ p - b, (torch.zeros_like(p), v), hyper, 1, False)
    g = h @ p - b
    limit = lam * v.sqrt().sqrt()
    active = p != 0
    assert 0 < active.sum() < 12
    assert (g[active] + (limit * torch.sign(p))[active]).abs().max() < 1e-6
    assert (g[~active].abs() / limit[~active]).max() <= 1.0
