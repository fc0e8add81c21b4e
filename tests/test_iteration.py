"""Refreshes of bases: orthogonal for good by products and by reflections, and in float32 whatever the caller's modes."""

from __future__ import annotations

import pytest
import torch
from support.matrices import off_identity, random_basis, random_psd

from precond import bases
from precond._core import iteration

F64 = torch.float64


# Refreshes by products and by reflections: every test above runs by what the device takes, these by both.


@pytest.fixture(params=["reflections", "products"])
def both_ways(request, monkeypatch):
    monkeypatch.setattr(iteration, "_REFLECTS", ("cpu",) if request.param == "reflections" else ())
    return request.param


def half_of(kind, d):
    """H of gradients G = H Z: G G^T has the eigenvalues and the rank of H H^T."""
    axes = random_basis(d, 20)
    scales = {
        "plain": torch.ones(d, dtype=F64),
        "condition 1e12": torch.logspace(0, -6, d, dtype=F64),
        "rank 3": torch.arange(d, dtype=F64).lt(3).double(),
        "zero": torch.zeros(d, dtype=F64),
    }
    return torch.ones(d, d, dtype=F64) + 1e-3 * axes if kind == "one direction" else axes * scales[kind]


@pytest.mark.parametrize("kind", ["plain", "condition 1e12", "rank 3", "one direction", "zero"])
@pytest.mark.parametrize(
    ("d", "steps"),
    [
        (16, 500),
        (80, 250),
        (272, 40),
        pytest.param(16, 4000, marks=pytest.mark.large),
        pytest.param(80, 2000, marks=pytest.mark.large),
    ],
)
def test_a_basis_stays_orthogonal_over_many_refreshes(both_ways, kind, d, steps):
    """As SOAP refreshes at each step: of a factor to which a gradient is added. Sizes of one leaf, of several and of panels."""
    generator, half = torch.Generator().manual_seed(21), half_of(kind, d).float()
    a = torch.zeros(d, d)
    u = None
    for _ in range(steps):
        g = half @ torch.randn(d, d, generator=generator)
        a.lerp_(g @ g.T, 0.05)
        u = bases.eigenbasis(a) if u is None else bases.refreshed(u, a)[0]
    assert off_identity(u.double()) <= 2e-6
    if kind != "zero":
        inside = u.double().T @ a.double() @ u.double()
        # The basis follows the factor: a refresh at each step holds nearly all of it on the diagonal.
        assert inside.diagonal().norm() >= 0.99 * inside.norm()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("d", [3, 64, 65, 200, 272])
def test_products_find_the_basis_of_reflections(d, dtype, monkeypatch):
    """The same columns where eigenvalues are above rounding, the same subspaces where they are equal; the same order."""
    axes = random_basis(d, 22)
    values = torch.logspace(0, -2, d, dtype=F64)
    a = (axes * values) @ axes.T
    g = random_psd(d, 23) / d
    a = (a + 0.05 * values.sqrt().mean() * (axes * values.sqrt()) @ g @ (axes * values.sqrt()).T).to(dtype)
    found = []
    for reflects in (("cpu",), ()):
        monkeypatch.setattr(iteration, "_REFLECTS", reflects)
        found.append(bases.refreshed(axes.to(dtype), a))
    (by_reflections, order), (by_products, other) = found
    assert torch.equal(order, other)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(by_products, by_reflections, rtol=0, atol=2000 * eps)
    assert off_identity(by_products.double()) <= 16 * eps


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["random basis", "sudden gradient"])
def test_what_one_factor_cannot_orthogonalise_is_reflected(seed, kind, monkeypatch):
    """A basis that knows nothing of the matrix, or a gradient a thousand times the factor: the result is orthogonal anyway."""
    monkeypatch.setattr(iteration, "_REFLECTS", ())
    d = 200
    u = random_basis(d, seed, torch.float32)
    axes = random_basis(d, seed + 50)
    a = (axes * torch.logspace(0, -6, d, dtype=F64)) @ axes.T
    if kind == "sudden gradient":
        u = axes.float()
        x = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=F64)
        a = a + 1e3 * torch.outer(x, x)
    for _ in range(3):
        u, _ = bases.refreshed(u, a.float())
        assert off_identity(u.double()) <= 5e-6


def test_a_failed_factorisation_is_reflected(monkeypatch):
    monkeypatch.setattr(iteration, "_REFLECTS", ())
    u = random_basis(16, 24, torch.float32)
    a = -random_psd(16, 25, dtype=torch.float32)  # no factor has it
    new, _ = bases.refreshed(u, a)
    assert off_identity(new.double()) <= 2e-6


# Precision.


def tf32(t):
    """Rounded to 10 bits of mantissa, as a tensor core reads float32."""
    bits = t.float().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def test_tf32_drowns_small_eigenvalues_and_float32_does_not():
    """diag(Q^T A Q) orders the columns of a basis. With operands of 10 bits, what is below 1e-4 of the largest eigenvalue is
    noise: estimates are off by more than themselves, some are negative, and the order is another one. In float32 all are right.
    """
    d = 256
    axes = random_basis(d, 26)
    values = torch.logspace(0, -6, d, dtype=F64)
    a = ((axes * values) @ axes.T).float()
    u = axes.float()
    exact = (u * (a @ u)).sum(0).double()
    rounded = (tf32(u) * tf32(tf32(a) @ tf32(u))).sum(0).double()
    errors, rounded_errors = ((found - values).abs() / values for found in (exact, rounded))
    assert errors.max() < 0.01
    assert rounded_errors.max() > 1.0
    assert (rounded_errors / errors)[values < 1e-4].median() > 100
    assert (rounded < 0).any()
    assert (exact.diff() < 0).all()
    assert (rounded.diff() > 0).sum() > 10
    # What a refresh makes of it: in float32 the order is that of the eigenvalues.
    assert torch.equal(bases.refreshed(u, a)[1], torch.arange(d))


@pytest.mark.parametrize("mode", ["high", "medium", "autocast"])
def test_a_refresh_in_reduced_modes_has_float32s_bits(both_ways, mode):
    axes = random_basis(272, 27, torch.float32)
    a = ((axes.double() * torch.logspace(0, -5, 272, dtype=F64)) @ axes.double().T).float()
    u, order = bases.refreshed(axes, a)
    try:
        if mode != "autocast":
            torch.set_float32_matmul_precision(mode)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            again, other = bases.refreshed(axes, a)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(order, other)
    assert torch.equal(u, again)
