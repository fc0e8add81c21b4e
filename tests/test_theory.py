"""What docs/theory.md promises, of the classes as they are. What it says of the rules alone is in test_reference.py, of BNP in
test_bnp.py, of estimates in test_curvature.py, of geodesics in test_bases.py and of FOP in test_fop.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import precond
from precond import reference

F64 = torch.float64
ROOT = Path(__file__).resolve().parent.parent


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(shape, generator=generator(seed), dtype=F64)


def orthogonal(d, seed):
    return torch.linalg.qr(randn(d, d, seed=seed))[0]


def spd(d, seed):
    a = randn(d, d, seed=seed)
    return a @ a.T / d


# A penalty on z = P^-1 p, where P is not diagonal.


def penalised(penalty, lam):
    if penalty == "l2":
        return dict(weight_decay=lam)
    return dict(l1_decay=lam, l1_form=penalty, l1_cap=math.inf)


def step_in_z(z, grad_z, lr, lam, penalty):
    if penalty == "l2":
        return z - lr * (grad_z + lam * z)
    if penalty == "proximal":
        return reference.soft_threshold(z - lr * grad_z, torch.full_like(z, lr * lam))
    return z - lr * (grad_z + lam * torch.sign(z))


@pytest.mark.parametrize("power", [-1.0, -0.5])
@pytest.mark.parametrize("penalty", ["l2", "proximal", "subgradient"])
@pytest.mark.parametrize("basis", ["flat", "pair"])
def test_gauss_newton_in_a_basis_penalises_z(basis, penalty, power):
    """P = U (h + eps)^(power / 2), frozen: 200 steps against gradient descent on z."""
    rows, columns = 4, 3
    d = rows * columns
    left, right = orthogonal(rows, 1), orthogonal(columns, 2)
    U = orthogonal(d, 3) if basis == "flat" else torch.kron(left, right)
    H, b = spd(d, 4) + 0.1 * torch.eye(d, dtype=F64), randn(d, seed=5)
    h, eps = torch.rand(d, generator=generator(6), dtype=F64) + 0.1, 1e-3
    P = U * (h + eps) ** (power / 2)
    lr, lam = 0.05, 0.2
    p = torch.nn.Parameter(randn(rows, columns, seed=7))
    optimizer = precond.GaussNewton(
        [p], lr=lr, betas=(0.0, 0.9), eps=eps, power=power, curvature="hutchinson",
        basis=U if basis == "flat" else (left, right), **penalised(penalty, lam),
    )  # fmt: skip
    optimizer.update_curvature(estimates=[h.view(rows, columns)])
    z = torch.linalg.solve(P, p.detach().flatten())
    zeros = 0
    for _ in range(200):
        p.grad = (H @ p.detach().flatten() - b).view(rows, columns)
        optimizer.step()
        z = step_in_z(z, P.T @ (H @ (P @ z) - b), lr, lam, penalty)
        zeros += int((z == 0.0).sum())
    assert (p.detach().flatten() - P @ z).abs().max() <= 1e-12
    assert (zeros > 0) == (penalty == "proximal")


def test_gradient_regularisation_is_that_of_the_gradient_in_z():
    """The second gradient of two, at p + radius u with u = g / den, is that of L + rho / 2 |P^T g|^2 for a quadratic."""
    H, b = spd(12, 0), randn(12, seed=1)
    v = torch.rand(12, generator=generator(2), dtype=F64) + 0.1
    eps, lr, rho, radius = 1e-3, 0.02, 0.3, 0.05
    P = (v.sqrt() + eps) ** -0.5
    perturb = reference.RULES["perturb_adaptive"].update
    p = randn(12, seed=3)
    z = p / P
    for _ in range(300):
        g = H @ p - b
        there, (kept, _) = perturb(p, g, (torch.zeros_like(p), v), dict(radius=radius, eps=eps, scale=1.0), 1, False)
        assert torch.equal(kept, p)
        mixed = (1.0 - rho / radius) * g + rho / radius * (H @ there - b)
        p = p - lr * P * P * mixed
        grad_z = P * (H @ (P * z) - b)
        z = z - lr * (grad_z + rho * P * (H @ (P * grad_z)))
    assert (p - P * z).abs().max() <= 1e-12


# Intrinsic L1 of the class: its groups, its steps and their count.


def test_adamw_with_intrinsic_l1_settles_where_gradients_are_lambda_squared():
    """4000 steps instead of 60,000, on a better conditioned problem and with a shorter memory of squares."""
    a = randn(60, 30, seed=0) * torch.logspace(-0.5, 0.5, 30, dtype=F64)
    x = torch.zeros(30, dtype=F64)
    x[::3] = randn(10, seed=1)
    H, c = a.T @ a / 60, a.T @ (a @ x + 0.3 * randn(60, seed=2)) / 60
    lams = [0.4, 0.3]
    runs = [torch.nn.Parameter(torch.zeros(30, dtype=F64)) for _ in lams]
    optimizer = precond.AdamW(
        [dict(params=[p], l1_decay=lam) for p, lam in zip(runs, lams, strict=True)],
        betas=(0.9, 0.9), eps=1e-12, weight_decay=0.0,
    )  # fmt: skip
    steps = 4000
    for t in range(steps):
        for p, group in zip(runs, optimizer.param_groups, strict=True):
            p.grad = H @ p.detach() - c
            group["lr"] = 2e-2 * (1 - t / steps)
        optimizer.step()
    for p, lam in zip(runs, lams, strict=True):
        g, active = (H @ p.detach() - c).abs(), p.detach() != 0
        assert 0 < active.sum() < 30
        assert (g[active] - lam**2).abs().max() <= 1e-6
        assert g[~active].max() <= lam**2


# Implicit bias: the instance of docs/theory.md, B.4, to its random numbers.


class Interpolation:
    """min |X W - Y|^2 / 2 with n < d, and where gradient descent from W0 ends."""

    def __init__(self):
        draw = generator(0)
        self.X, W0, truth = (torch.randn(s, generator=draw, dtype=F64) for s in ((20, 50), (50, 4), (50, 4)))
        self.W0 = 0.1 * W0
        self.Y = self.X @ truth
        self.W_gd = self.W0 + torch.linalg.pinv(self.X) @ (self.Y - self.X @ self.W0)
        self.s1 = torch.linalg.matrix_norm(self.X, 2).item()
        self.distance = (self.W_gd - self.W0).norm()

    def descend(self, make, steps, tolerance=1e-12, transposed=False, schedule=None, dtype=F64):
        """W, its residual relative to Y, and the number of steps."""
        X, Y = self.X.to(dtype), self.Y.to(dtype)
        turn = (lambda t: t.T.contiguous()) if transposed else lambda t: t
        p = torch.nn.Parameter(turn(self.W0.to(dtype)).clone())
        optimizer = make([p])
        lr = optimizer.param_groups[0]["lr"]
        for t in range(steps):
            R = X @ turn(p.detach()) - Y
            if R.norm() <= tolerance * Y.norm():
                break
            p.grad = turn(X.T @ R)
            if schedule is not None:
                optimizer.param_groups[0]["lr"] = lr * schedule(t / steps)
            optimizer.step()
        W = turn(p.detach())
        return W.double(), ((X @ W - Y).norm() / Y.norm()).item(), t

    def delta(self, W):
        return ((W - self.W_gd).norm() / self.distance).item()

    def c(self, W):
        return ((W - self.W0).norm() / self.distance).item()

    def outside(self, W):
        """The part of W - W0 that no X^T reaches, in entries."""
        moved = W - self.W0
        return (moved - torch.linalg.pinv(self.X) @ (self.X @ moved)).abs().max().item()


@pytest.fixture(scope="module")
def interpolation():
    return Interpolation()


def dual(interpolation, eta, **kwargs):
    return lambda params: precond.DualDescent(params, lr=eta / interpolation.s1**2, scale=1.0, **kwargs)


def test_the_instance_is_that_of_the_theory(interpolation):
    assert torch.linalg.cond(interpolation.X).item() == pytest.approx(4.72, abs=5e-3)
    assert interpolation.descend(dual(interpolation, 1.8, kernel="identity"), 1000)[2] == 294


@pytest.mark.parametrize("granularity", ["global", "tensor", "unit", "spectral"])
@pytest.mark.parametrize("kernel", ["smoothed", "clip", "log", "rational", "asinh", "adam"])
def test_maps_that_only_mix_columns_end_at_the_solution_nearest_to_the_start(interpolation, kernel, granularity):
    """ "unit" divides rows of a torch weight: columns of W."""
    make = dual(interpolation, 1.8, kernel=kernel, granularity=granularity)
    W, residual, _ = interpolation.descend(make, 2000, transposed=granularity == "unit")
    assert residual <= 1e-12
    assert (W - interpolation.W_gd).norm() <= 1e-8
    assert interpolation.c(W) == pytest.approx(1.0, abs=1e-8)


# docs/theory.md, B.4: delta and steps, both at eta = 1.8.
ENTRYWISE = {"adam": (0.378, 358), "smoothed": (0.424, 343), "clip": (0.444, 340), "asinh": (0.253, 307)}


@pytest.mark.parametrize("kernel", ENTRYWISE)
def test_maps_of_entries_end_elsewhere_and_where_depends_on_the_rate(interpolation, kernel):
    delta, steps = ENTRYWISE[kernel]
    ends = []
    for eta in (1.8, 0.2):
        W, residual, took = interpolation.descend(dual(interpolation, eta, kernel=kernel, granularity="entry"), 5000)
        assert residual <= 1e-12
        assert interpolation.delta(W) == pytest.approx(delta, abs=2e-3)
        assert interpolation.c(W) ** 2 == pytest.approx(1 + interpolation.delta(W) ** 2, abs=1e-6)
        if eta == 1.8:
            assert abs(took - steps) <= 2
        ends.append(W)
    assert 2e-3 <= (ends[0] - ends[1]).norm() / interpolation.distance <= 1e-2


@pytest.mark.parametrize(("granularity", "stall"), [("entry", 3.5e-3), ("tensor", 8.8e-4)])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_the_largest_rate_is_2_over_m_s1_squared(interpolation, granularity, stall, scale):
    """M = 1 / scale. Beyond it, the residual in numbers of Y stands still; the sizes here are those of scale 1."""

    def residual(eta, steps):
        lr = eta * scale / interpolation.s1**2
        make = lambda ps: precond.DualDescent(ps, lr=lr, kernel="smoothed", granularity=granularity, scale=scale)  # noqa: E731
        return interpolation.descend(make, steps)[1]

    assert residual(1.99, 4000) <= 1e-12
    assert stall / 10 <= residual(2.05, 4000) <= 10 * stall


def test_exact_signs_stop_at_a_floor_in_proportion_to_the_rate(interpolation):
    floors = []
    for lr in (1e-2, 1e-3):
        make = lambda ps, lr=lr: precond.DualDescent(ps, lr=lr, kernel="normalize", granularity="entry")  # noqa: E731
        floors.append(interpolation.descend(make, 4000)[1])
    assert floors[1] > 1e-5
    assert 5 < floors[0] / floors[1] < 20


def test_adam_ends_elsewhere_and_where_depends_on_the_rate(interpolation):
    """docs/theory.md, B.4 has 40,000 steps, one column and a start at 0: see bench/papers/ghane.py."""
    ends = []
    for lr in (1e-2, 1e-1):
        make = lambda ps, lr=lr: precond.Adam(ps, lr=lr)  # noqa: E731
        W, residual, _ = interpolation.descend(make, 4000, schedule=lambda part: 1 - part)
        assert residual <= 1e-3
        assert 0.2 < interpolation.delta(W) < 1.0
        assert interpolation.c(W) ** 2 == pytest.approx(1 + interpolation.delta(W) ** 2, abs=1e-3)
        ends.append(W)
    assert (ends[0] - ends[1]).norm() / interpolation.distance > 0.05


def test_spectral_descent_with_momentum_stays_in_the_row_space(interpolation):
    """docs/theory.md, B.4: 6e-14 outside, at the residual's distance from W_GD."""

    def make(params):
        return precond.DualDescent(
            params, lr=0.3, kernel="normalize", granularity="spectral", momentum=0.95, nesterov=True
        )

    W, residual, _ = interpolation.descend(make, 1500, schedule=lambda part: (1 - part) ** 2)
    assert residual <= 1e-4
    assert interpolation.outside(W) <= 1e-12
    assert interpolation.delta(W) <= 10 * residual


def test_muon_stays_in_the_row_space_as_far_as_bfloat16_goes(interpolation):
    """Each step leaves it by a rounding error of 2^-9 or so of its length; a map of entries by a fixed part of it."""
    W, residual, _ = interpolation.descend(
        lambda ps: precond.Muon(ps, lr=0.3, weight_decay=0.0), 1500, schedule=lambda part: (1 - part) ** 2
    )
    assert residual <= 1e-3
    assert interpolation.delta(W) <= 0.05


# The gradient of K.


#: Of each kernel h, c being the scale, and the Lipschitz constant of h'; None where there is none.
POTENTIALS = {
    "identity": (lambda r, c: r * r / 2, lambda c: 1.0),
    "normalize": (lambda r, c: r, None),
    "smoothed": (lambda r, c: torch.sqrt(r * r + c * c), lambda c: 1 / c),
    "adam": (lambda r, c: r - c * torch.log1p(r / c), lambda c: 1 / c),
    "clip": (lambda r, c: torch.where(r < c, r * r / 2, c * r - c * c / 2), lambda c: 1.0),
    "rational": (lambda r, c: c * r - c * c * torch.log1p(r / c), lambda c: 1.0),
    "asinh": (lambda r, c: c * r * torch.asinh(r / c) - c * torch.sqrt(c * c + r * r) + c * c, lambda c: 1.0),
    "log": (lambda r, c: c * ((r + c) * torch.log1p(r / c) - r), lambda c: 1.0),
    "power": (lambda r, c: c * c / 1.4 * (r / c) ** 1.4, None),
}
#: The magnitudes that K is a sum over, of all parameters together.
MAGNITUDES = {
    "global": lambda gs: torch.cat([g.flatten() for g in gs]).norm().view(1),
    "tensor": lambda gs: torch.stack([g.norm() for g in gs]),
    "unit": lambda gs: torch.cat([g.flatten(1).norm(dim=1) for g in gs]),
    "entry": lambda gs: torch.cat([g.flatten() for g in gs]).abs(),
    "spectral": lambda gs: torch.cat([torch.linalg.svdvals(g.flatten(1)) for g in gs]),
}
SHAPES = [(5, 3), (2, 3, 2)]


def applied(kernel, granularity, scale, gradients):
    """grad K as a step of lr 1 takes it."""
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    optimizer = precond.DualDescent(params, 1.0, kernel, granularity, scale, exponent=0.4)
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    optimizer.step()
    return [-p.detach() for p in params]


def test_every_kernel_and_granularity_has_a_potential_here():
    assert set(POTENTIALS) == set(reference.KERNELS)
    assert set(MAGNITUDES) == set(precond.dual.GRANULARITIES)


@pytest.mark.parametrize("granularity", MAGNITUDES)
@pytest.mark.parametrize("kernel", POTENTIALS)
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_a_step_is_the_gradient_of_k(kernel, granularity, scale):
    for seed in range(5):
        gradients = [randn(*shape, seed=seed).mul_(2.0**seed / 4).requires_grad_() for shape in SHAPES]
        K = POTENTIALS[kernel][0](MAGNITUDES[granularity](gradients), scale).sum()
        expected = torch.autograd.grad(K, gradients)
        found = applied(kernel, granularity, scale, [g.detach() for g in gradients])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("granularity", MAGNITUDES)
@pytest.mark.parametrize("kernel", POTENTIALS)
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_grad_k_is_cocoercive(kernel, granularity, scale):
    """<grad K(a) - grad K(b), a - b> >= |grad K(a) - grad K(b)|^2 / M, near and far; >= 0 where K is not smooth."""
    lipschitz = POTENTIALS[kernel][1]
    for seed in range(10):
        size, apart = 2.0 ** (seed % 5 - 2), 10.0 ** -(seed % 3)
        a = [size * randn(*shape, seed=2 * seed) for shape in SHAPES]
        b = [s + apart * size * randn(*s.shape, seed=2 * seed + 1) for s in a]
        moved = [x - y for x, y in zip(*(applied(kernel, granularity, scale, g) for g in (a, b)), strict=True)]
        inner = sum((m * (s - t)).sum() for m, s, t in zip(moved, a, b, strict=True)).item()
        square = sum(m.square().sum() for m in moved).item()
        assert square > 0.0 or kernel in ("normalize", "clip")
        assert inner >= (0.0 if lipschitz is None else square / lipschitz(scale)) - 1e-12 * (1.0 + square)


def test_a_lipschitz_constant_is_no_larger_than_it_must_be():
    """Near 0, M |grad K(a) - grad K(b)|^-1 is the distance: else the test above would hold for any M."""
    for kernel, (_, lipschitz) in POTENTIALS.items():
        if lipschitz is not None:
            (moved,) = applied(kernel, "entry", 0.3, [torch.full((1, 1), 1e-9, dtype=F64)])
            assert moved.item() == pytest.approx(1e-9 * lipschitz(0.3), rel=1e-6)


# Dual space preconditioning as Maddison et al. have it.


def test_a_quartic_contracts_by_the_factors_of_its_dual():
    """f = sum (a x)^4 / 4, K' = |.|^(1/3): x (1 - eta a^(4/3)); factors .9536, .9, .7846, .5358, 0."""
    a = torch.logspace(0, 1, 5, dtype=F64)
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0, -0.5, 1.0], dtype=F64))
    optimizer = precond.DualDescent(
        [p], lr=(1 / a.max() ** (4 / 3)).item(), kernel="power", granularity="entry", exponent=1 / 3
    )
    factors = 1 - (a / a.max()) ** (4 / 3)
    torch.testing.assert_close(factors, torch.tensor([0.9536, 0.9, 0.7846, 0.5358, 0.0], dtype=F64), rtol=0, atol=5e-5)
    expected = p.detach().clone()
    f0 = ((a * expected) ** 4).sum().item() / 4
    for i in range(1, 200):
        before = p.detach().clone()
        p.grad = a**4 * before**3
        optimizer.step()
        expected = expected * factors
        torch.testing.assert_close(p.detach()[:4], expected[:4], rtol=1e-11, atol=0)
        assert p[4].abs() <= 1e-14
        # The linear rate of relative smoothness: D_f* between mu and L of K's, here as of a^(4/3).
        f = ((a * p.detach()) ** 4).sum().item() / 4
        assert f <= (1 - 10 ** (-4 / 3)) ** i * f0 * (1 + 1e-12)


def test_with_k_the_conjugate_of_f_one_step_is_enough():
    """K'(y) = |y / a^4|^(1/3), so a scale of a^-2; a group for each a."""
    a = torch.logspace(0, 1, 5, dtype=F64)
    params = [torch.nn.Parameter(x.view(1)) for x in torch.tensor([1.0, -2.0, 3.0, -0.5, 1.0], dtype=F64)]
    groups = [dict(params=[p], scale=s**-2) for p, s in zip(params, a.tolist(), strict=True)]
    optimizer = precond.DualDescent(groups, lr=1.0, kernel="power", granularity="entry", exponent=1 / 3)
    for p, s in zip(params, a, strict=True):
        p.grad = s**4 * p.detach() ** 3
    optimizer.step()
    assert max(p.abs().item() for p in params) <= 1e-14


# Instances on which Adam beats Gauss-Newton, over a search of the learning rate.


def searched(make, gradient, loss, start, steps, decay, exponents=range(-20, 4), curvature=None):
    """The best end of runs with lr 2^(i / 2): one parameter of one storage, and one group, for each."""
    lrs = [2.0 ** (i / 2) for i in exponents]
    x = start.repeat(len(lrs), 1)
    params = [torch.nn.Parameter(row) for row in x]
    optimizer = make([dict(params=[p], lr=lr) for p, lr in zip(params, lrs, strict=True)])
    for t in range(steps):
        for p, g in zip(params, gradient(x), strict=True):
            p.grad = g
        if curvature is not None:
            optimizer.update_curvature(estimates=list(curvature(x)))
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr * (1 - t / steps if decay else 1.0)
        optimizer.step()
    return loss(x).nan_to_num(math.inf).min().item()


def gauss_newton(power):
    """The curvature is exact and that of the present point: betas are 0."""
    return lambda groups: precond.GaussNewton(groups, betas=(0.0, 0.0), eps=0.0, power=power, curvature="hutchinson")


def adam(groups):
    return precond.Adam(groups, betas=(0.0, 0.99), eps=1e-300)


def block_covariance():
    r = torch.tensor([0.99, 0.9, 0.5, -0.5, -0.9, -0.99], dtype=F64)
    blocks = torch.eye(2, dtype=F64) + r[:, None, None] * (1 - torch.eye(2, dtype=F64))
    return torch.block_diag(*blocks)


def test_on_a_block_wise_covariance_adam_beats_gauss_newton():
    """docs/theory.md, C.3.1, T = 100: Gauss-Newton of either power 1.3e-3, Adam 3e-156."""
    H, ones = block_covariance(), torch.ones(12, dtype=F64)
    assert torch.linalg.cond(H).item() == pytest.approx(199.0)
    assert torch.equal(H.diagonal(), ones)

    def of(make, decay, curvature=None):
        return searched(
            make, lambda x: x @ H, lambda x: ((x @ H) * x).sum(1) / 2, ones, 100, decay, curvature=curvature
        )

    assert min(of(adam, decay) for decay in (False, True)) < 1e-10
    for power in (-1.0, -0.5):
        ends = [of(gauss_newton(power), decay, lambda x: torch.ones_like(x)) for decay in (False, True)]
        assert min(ends) == pytest.approx(1.3e-3, rel=0.05)


def test_on_saturated_logistic_regression_adam_beats_gauss_newton():
    """docs/theory.md, C.3.2, T = 50: Gauss-Newton 1.6e-2, its root 5.0e-3, Adam < 1e-16."""
    s, share = torch.tensor([1.0, 0.1], dtype=F64), 0.2
    best = math.log((1 - share) / share) / s
    start = torch.stack([torch.tensor(-8.0, dtype=F64), best[1] - 5.0])
    softplus = torch.nn.functional.softplus

    def value(x):
        return (share * softplus(s * x) + (1 - share) * softplus(-s * x)).sum(-1)

    def of(make, curvature=None):
        ends = [
            searched(
                make,
                lambda x: s * (torch.sigmoid(s * x) - (1 - share)),
                lambda x: value(x) - value(best),
                start,
                50,
                decay,
                range(-24, 12),
                curvature,
            )
            for decay in (False, True)
        ]
        return min(ends)

    def curvature(x):
        return s * s * torch.sigmoid(s * x) * torch.sigmoid(-s * x)

    ends = [of(adam), of(gauss_newton(-1.0), curvature), of(gauss_newton(-0.5), curvature)]
    assert ends[0] < 1e-16
    assert ends[1:] == pytest.approx([1.6e-2, 5.0e-3], rel=0.05)


def test_gauss_newton_in_the_eigenbasis_is_newton():
    """docs/theory.md, C.3.1: 6e-31 after one step."""
    H = block_covariance()
    values, U = torch.linalg.eigh(H)
    p = torch.nn.Parameter(torch.ones(12, dtype=F64))
    optimizer = precond.GaussNewton([p], lr=1.0, betas=(0.0, 0.0), eps=0.0, power=-1.0, curvature="hutchinson", basis=U)
    p.grad = H @ p.detach()
    optimizer.update_curvature(estimates=[values])
    optimizer.step()
    assert (p.detach() @ H @ p.detach()).item() / 2 <= 1e-28


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.99)])
def test_the_root_of_squared_gradients_in_a_basis_is_adam_on_rotated_variables(betas):
    """With its eps inside the root: so is the text here; and with eps 0, the class."""
    U, H = orthogonal(8, 0), spd(8, 1)
    for eps in (0.0, 1e-2):
        p, q = (torch.nn.Parameter(t) for t in (torch.ones(8, dtype=F64), U.T @ torch.ones(8, dtype=F64)))
        ours = precond.GaussNewton([p], 0.01, betas, eps, power=-0.5, curvature="gradient", basis=U)
        peer = precond.Adam([q], 0.01, betas, eps=0.0)
        x = q.detach().clone()
        m = v = torch.zeros(8, dtype=F64)
        for t in range(1, 41):
            p.grad, q.grad = H @ p.detach(), U.T @ H @ U @ q.detach()
            g = U.T @ H @ U @ x
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
            x = x - 0.01 * m / (1 - betas[0] ** t) / torch.sqrt(v / (1 - betas[1] ** t) + eps)
            ours.step()
            peer.step()
        torch.testing.assert_close(p.detach(), U @ x, rtol=1e-10, atol=1e-10)
        if eps == 0.0:
            torch.testing.assert_close(p.detach(), U @ q.detach(), rtol=1e-10, atol=1e-10)


def test_a_pair_of_bases_is_their_kronecker_product():
    left, right, H = orthogonal(4, 0), orthogonal(3, 1), spd(12, 2)
    ends = []
    for basis in ((left, right), torch.kron(left, right)):
        p = torch.nn.Parameter(torch.ones(4, 3, dtype=F64))
        optimizer = precond.GaussNewton([p], 0.05, power=-0.5, curvature="gradient", basis=basis)
        for _ in range(20):
            p.grad = (H @ p.detach().flatten()).view(4, 3)
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-13)


# Gradients of deficient rank in float32.


def test_soap_on_rank_deficient_gradients_stays_finite(interpolation):
    """docs/theory.md, B.4: a SOAP that takes null columns as they come diverged with this eps, to a residual of 7e6."""

    def make(params):
        return precond.SOAP(params, lr=0.1, eps=1e-15, weight_decay=0.0)

    W, residual, _ = interpolation.descend(
        make, 800, tolerance=0.0, schedule=lambda part: (1 - part) ** 2, dtype=torch.float32
    )
    assert residual <= 2e-6
    assert interpolation.delta(W) <= 0.3
    assert W.abs().max() <= 3.0


@pytest.mark.parametrize("frequency", [1, 10])
def test_weights_do_not_drift_where_the_gradient_is_rounding_error(frequency):
    """Rank 5 of 50: 1.4 is the largest entry of what interpolates; without a relative eps entries reach 7 and more."""
    X = randn(5, 50, seed=0).float()
    Y, W0 = X @ randn(50, 50, seed=1).float(), 0.1 * randn(50, 50, seed=2).float()

    def end(**kwargs):
        p = torch.nn.Parameter(W0.clone())
        optimizer = precond.SOAP([p], lr=0.1, eps=1e-15, weight_decay=0.0, precondition_frequency=frequency, **kwargs)
        for t in range(400):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - t / 400) ** 2
            R = X @ p.detach() - Y
            p.grad = X.T @ R
            optimizer.step()
        assert R.norm() <= 1e-3 * Y.norm()
        return p.detach().abs().max().item()

    assert end() <= 2.5
    assert end(relative_eps=0.0) >= 5.0


# python -m bench theory.


@pytest.mark.source
@pytest.mark.filterwarnings("ignore")
def test_the_tables_of_seconds_are_within_their_tolerances(tmp_path):
    path = tmp_path / "theory.json"
    result = subprocess.run(
        [sys.executable, "-m", "bench", "theory", "--quick", "--json", str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(path.read_text())
    rows = [row for of in report["tables"].values() for row in of]
    assert len(rows) > 30
    assert all(row["within"] is not False for row in rows)
    assert report["environment"]["commit"]
    for name in ("ye", "liu", "moskovitz"):
        assert (tmp_path / "theory" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.source
@pytest.mark.parametrize(
    ("expected", "measured", "rule", "within"),
    [
        (1.0, 1.04, dict(tolerance=0.05), True),
        (1.0, 1.06, dict(tolerance=0.05), False),
        (1.0, 0.4, dict(factor=2.0), False),
        (1.0, 1.9, dict(factor=2.0), True),
        (1.0, 2.1, dict(factor=2.0), False),
        ("small", 1e-9, dict(at_most=1e-8), True),
        ("small", 1e-7, dict(at_most=1e-8), False),
        ("large", 0.5, dict(at_least=1.0), False),
        ("small", math.nan, dict(at_most=1e-8), False),
        ("anything", 1e9, {}, None),
    ],
)
def test_a_row_outside_of_its_tolerance_is_seen(expected, measured, rule, within, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.papers import Row

    row = Row("table", "name", expected, measured, **rule)
    assert row.within is within
    assert row.fails == (within is False)
    if row.fails and math.isfinite(measured):
        row.known = measured
        assert not row.fails
        row.known = 2 * measured
        assert row.fails
