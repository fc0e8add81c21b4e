"""Bases: geodesics and gradients of deficient rank (docs/theory.md, C.4, C.7); refreshes, shapes and blocks."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from support.matrices import off_identity, random_basis, random_psd

import precond
from precond import bases

F64 = torch.float64
I12 = torch.eye(12, dtype=F64)


def random_skew(d, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(d, d, generator=generator, dtype=F64)
    return (a - a.T) * (size / math.sqrt(2 * d))


# The geodesic.


@pytest.mark.parametrize("seed", range(6))
def test_a_geodesic_ends_at_both_bases(seed):
    pytest.importorskip("scipy")
    u0, u1 = random_basis(12, seed), random_basis(12, seed + 100)
    matched, order, signs = bases.match_columns(u0, u1)
    assert sorted(order.tolist()) == list(range(12))
    assert torch.equal(matched, u1[:, order] * signs)
    ends = precond.interpolate_basis(u0, u1, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.stack([u0, matched]), rtol=0, atol=1e-12)
    # At most one sign is against the diagonal: the one that makes the determinant 1.
    assert (u0.T @ matched).diagonal().lt(0).sum() <= 1
    assert torch.linalg.det(u0.T @ matched) > 0


@pytest.mark.parametrize("match", [True, False])
def test_a_geodesic_is_orthogonal_and_runs_at_one_speed(match):
    pytest.importorskip("scipy")
    u0, u1 = random_basis(12, 1), random_basis(12, 2)
    u1[:, 0] *= torch.linalg.det(u0.T @ u1).sign()
    path = precond.interpolate_basis(u0, u1, torch.linspace(0, 1, 11, dtype=F64), match=match)
    assert off_identity(path) <= 1e-12
    arcs = torch.tensor([bases.distance(a, b, match=False) for a, b in itertools.pairwise(path)], dtype=F64)
    torch.testing.assert_close(arcs, arcs.mean().expand(10), rtol=0, atol=1e-10)
    assert 10 * arcs.mean().item() == pytest.approx(bases.distance(u0, u1, match=match), abs=1e-10)


def test_a_geodesic_is_the_matrix_exponential_of_a_part_of_the_logarithm():
    pytest.importorskip("scipy")
    u0, log = random_basis(12, 3), random_skew(12, 4, size=1.7)
    assert torch.linalg.matrix_norm(log, 2) < math.pi  # the principal logarithm
    u1 = u0 @ torch.linalg.matrix_exp(log)
    for s in (0.0, 0.3, 0.5, 1.0):
        expected = u0 @ torch.linalg.matrix_exp(s * log)
        got = precond.interpolate_basis(u0, u1, s, match=False)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert bases.distance(u0, u1, match=False) == pytest.approx(log.norm().item(), abs=1e-12)


def test_matching_shortens_the_path():
    pytest.importorskip("scipy")
    for seed in range(5):
        u0, u1 = random_basis(12, seed), random_basis(12, seed + 50)
        u1[:, 0] *= torch.linalg.det(u0.T @ u1).sign()
        assert bases.distance(u0, u1) < 0.8 * bases.distance(u0, u1, match=False)
    shuffled = (u0 * torch.tensor([-1.0, 1.0, 1.0] * 4))[:, torch.randperm(12)]  # det of the signs is 1 as it is
    assert bases.distance(u0, shuffled) <= math.pi  # nothing, or one column that only a flip can bring to det = 1


def test_bases_that_differ_in_order_and_signs_alone_are_one():
    pytest.importorskip("scipy")
    u0 = random_basis(12, 8)
    u1 = u0[:, torch.arange(12).roll(2)] * torch.tensor(
        [-1.0, -1.0] + [1.0] * 10
    )  # an even permutation, an even number of signs
    assert bases.distance(u0, u1) <= 1e-12
    torch.testing.assert_close(precond.interpolate_basis(u0, u1, 0.4), u0, rtol=0, atol=1e-12)


def test_kronecker_bases_stay_kronecker():
    """expm(s (A (+) B)) = expm(sA) (x) expm(sB): the path of the product is the product of the paths."""
    pytest.importorskip("scipy")
    left = random_basis(3, 5), random_basis(3, 5) @ torch.linalg.matrix_exp(random_skew(3, 6, 1.2))
    right = random_basis(4, 7), random_basis(4, 7) @ torch.linalg.matrix_exp(random_skew(4, 9, 1.2))
    whole = [torch.kron(a, b) for a, b in zip(left, right, strict=True)]
    for s in (0.25, 0.5, 1.0):
        product = torch.kron(*(precond.interpolate_basis(*side, s, match=False) for side in (left, right)))
        torch.testing.assert_close(precond.interpolate_basis(*whole, s, match=False), product, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reversed_", [2, 4, 12])
def test_a_half_turn_has_a_geodesic(reversed_):
    """An eigenvalue of -1, where the logarithm is not unique: in halves, quarters and beside other rotations."""
    pytest.importorskip("scipy")
    u0, axes = random_basis(12, 10), random_basis(12, 11)
    turn = torch.ones(12, dtype=F64)
    turn[:reversed_] = -1
    u1 = u0 @ (axes * turn) @ axes.T
    path = precond.interpolate_basis(u0, u1, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), match=False)
    assert off_identity(path) <= 1e-12
    torch.testing.assert_close(path[-1], u1, rtol=0, atol=1e-12)
    torch.testing.assert_close(path[1] @ path[0].T, path[2] @ path[1].T, rtol=0, atol=1e-12)
    assert bases.distance(u0, u1, match=False) == pytest.approx(math.pi * math.sqrt(reversed_), rel=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-15, 1e-9, 1.0, math.pi - 1e-9, math.pi - 1e-15])
def test_repeated_angles_keep_a_geodesic_exact(angle):
    pytest.importorskip("scipy")
    turn = torch.tensor([[0.0, -angle], [angle, 0.0]], dtype=F64)
    axes = random_basis(12, 12)
    u1 = axes @ torch.linalg.matrix_exp(torch.block_diag(*[turn] * 6)) @ axes.T
    path = precond.interpolate_basis(I12, u1, torch.tensor([0.5, 1.0]), match=False)
    torch.testing.assert_close(path[1], u1, rtol=0, atol=1e-12)
    torch.testing.assert_close(path[0] @ path[0], u1, rtol=0, atol=1e-12)


def test_a_geodesic_has_its_bases_dtype():
    pytest.importorskip("scipy")
    u0, u1 = random_basis(40, 1, torch.float32), random_basis(40, 2, torch.float32)
    path = precond.interpolate_basis(u0.requires_grad_(), u1, 0.5)
    assert path.dtype == torch.float32
    assert not path.requires_grad
    assert off_identity(path) <= 1e-6


def test_wrong_bases_raise():
    with pytest.raises(ValueError, match=r"u1 must be a square matrix of real floats, got shape \(12, 11\)"):
        precond.interpolate_basis(I12, I12[:, :11], 0.5)
    with pytest.raises(ValueError, match=r"u0 must be orthogonal, got u\^T u off the identity by 3\.0e"):
        precond.interpolate_basis(2 * I12, I12, 0.5)
    with pytest.raises(ValueError, match="u0 must be orthogonal"):
        precond.interpolate_basis(I12 * math.nan, I12, 0.5)
    with pytest.raises(ValueError, match="must have one shape"):
        precond.interpolate_basis(I12, torch.eye(3, dtype=F64), 0.5)
    for s in (-0.1, 1.1, math.nan, torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"s must be in \[0, 1\]"):
            precond.interpolate_basis(I12, I12, s)


def test_a_reflection_is_reached_by_matching_only():
    pytest.importorskip("scipy")
    u1 = I12.clone()
    u1[0, 0] = -1
    with pytest.raises(ValueError, match="match=True flips a column"):
        precond.interpolate_basis(I12, u1, 0.5, match=False)
    assert torch.equal(precond.interpolate_basis(I12, u1, 0.5), I12)


def test_a_missing_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"matching columns needs scipy: pip install 'precond\[diagnostics\]'"):
        precond.interpolate_basis(I12, I12, 0.5)


# Eigenbases and their refreshes; more of these in test_iteration.py.


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_eigenbasis_diagonalises_largest_first(dtype):
    a = random_psd(20, 1, dtype=dtype)
    u = bases.eigenbasis(a)
    diagonal = u.T @ a @ u
    eps = torch.finfo(dtype).eps
    assert (diagonal - diagonal.diagonal().diag()).abs().max() <= 50 * eps * a.abs().max()
    assert (diagonal.diagonal().diff() <= 50 * eps * a.abs().max()).all()


@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e36])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_rank_deficient_matrices_have_orthogonal_finite_bases_in_float32(rank, scale):
    """Of deficient rank. At the largest and smallest scales squares over- and underflow."""
    a = random_psd(48, 2, rank).div(48).float() * scale
    u = bases.eigenbasis(a)
    assert u.isfinite().all()
    assert off_identity(u) <= 1e-5
    for _ in range(20):
        u, _ = bases.refreshed(u, a)
    assert u.isfinite().all()
    assert off_identity(u) <= 1e-5
    outside = (u.double().T @ (a / scale).double() @ u.double())[:, rank:]
    assert outside.abs().max() <= 1e-5 * (a / scale).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bases_of_halves_are_float32(dtype):
    a = random_psd(16, 3, 2, dtype=dtype)
    u = bases.eigenbasis(a)
    assert u.dtype == torch.float32
    u, _ = bases.refreshed(u.to(dtype), a)
    assert u.dtype == torch.float32
    assert off_identity(u) <= 1e-5


def test_a_failed_decomposition_is_tried_again_in_float64(monkeypatch):
    eigh, given = torch.linalg.eigh, []

    def fails_once(a):
        given.append(a)
        if len(given) == 1:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return eigh(a)

    monkeypatch.setattr(torch.linalg, "eigh", fails_once)
    a = random_psd(8, 4, dtype=torch.float32)
    u = bases.eigenbasis(a)
    assert [t.dtype for t in given] == [torch.float32, F64]
    assert u.dtype == torch.float32
    diagonal = u.T @ a @ u
    assert (diagonal - diagonal.diagonal().diag()).abs().max() <= 1e-5 * a.abs().max()


def test_refreshes_converge_to_the_eigenvectors():
    axes = random_basis(12, 13)
    values = torch.logspace(0, -3, 12, dtype=F64)
    a = (axes * values) @ axes.T
    u = random_basis(12, 14)
    off = []
    for _ in range(60):
        rotated = u.T @ a @ u
        off.append((rotated - rotated.diagonal().diag()).abs().max().item())
        u, _ = bases.refreshed(u, a)
    assert off[0] > 0.05
    assert off[-1] <= 1e-10
    torch.testing.assert_close((u.T @ a @ u).diagonal(), values, rtol=1e-9, atol=0)
    torch.testing.assert_close((axes.T @ u).abs(), I12, rtol=0, atol=1e-9)


def test_a_refresh_sorts_and_reports_the_order():
    """States per column follow the order: here the eigenvectors are known, only shuffled."""
    axes, shuffle = random_basis(12, 15), torch.randperm(12)
    a = (axes * torch.linspace(2, 1, 12, dtype=F64)) @ axes.T
    u, order = bases.refreshed(axes[:, shuffle], a)
    assert torch.equal(shuffle[order], torch.arange(12))
    torch.testing.assert_close(u, axes, rtol=0, atol=1e-12)  # signs as they were


@pytest.mark.parametrize("rank", [4, 16])
def test_a_refresh_turns_no_column_by_more_than_a_right_angle(rank):
    u = random_basis(16, 16, torch.float32)
    for seed in range(10):
        before, (u, order) = u, bases.refreshed(u, random_psd(16, seed, rank, torch.float32))
        assert ((before[:, order] * u).sum(0) >= 0).all()


def test_columns_without_curvature_stay():
    u = random_basis(16, 17)
    assert (bases.refreshed(u, torch.zeros(16, 16, dtype=F64))[0] - u).abs().max() <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("d", [16, 400])
def test_rounding_does_not_turn_columns_in_the_null_space(d, dtype):
    """Without the shift their directions are those of rounding errors, with a median cosine of 0.03 for d = 400."""
    u = random_basis(d, 17)
    a = (u[:, :3] @ u[:, :3].T).to(dtype)
    u = u.to(dtype)
    new, order = bases.refreshed(u, a)
    assert sorted(order[:3].tolist()) == [0, 1, 2]
    assert (u[:, order] * new).sum(0).min() >= math.cos(math.radians(2))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_matrices_that_are_not_finite_or_square_raise(bad):
    with pytest.raises(ValueError, match="a must be finite"):
        bases.eigenbasis(torch.full((3, 3), bad))
    with pytest.raises(ValueError, match="a must be finite"):
        bases.refreshed(torch.eye(3), torch.full((3, 3), bad))
    with pytest.raises(ValueError, match=r"a must be a square matrix .* \(3, 2\)"):
        bases.eigenbasis(torch.ones(3, 2))
    with pytest.raises(ValueError, match="must have one shape"):
        bases.refreshed(torch.eye(3), torch.eye(4))


# Rotations, shapes, blocks.


def test_rotations_are_the_kronecker_basis_and_undo_each_other():
    left, right = random_basis(5, 18), random_basis(7, 19)
    g = torch.randn(2, 5, 7, dtype=F64)
    for pair in itertools.product((left, None), (right, None)):
        rotated = bases.rotate(g, *pair)
        factors = [torch.eye(n, dtype=F64) if f is None else f for f, n in zip(pair, (5, 7), strict=True)]
        expected = torch.kron(*(f.contiguous() for f in factors)).T @ g.reshape(2, 35).T
        torch.testing.assert_close(rotated.reshape(2, 35), expected.T, rtol=0, atol=1e-13)
        torch.testing.assert_close(bases.rotate_back(rotated, *pair), g, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match=r"right must have shape \(7, 7\)"):
        bases.rotate(g, None, left)
    with pytest.raises(ValueError, match="g must be a matrix"):
        bases.rotate_back(g[0, 0], None, None)


@pytest.mark.parametrize(
    ("shape", "max_size", "keep", "merged"),
    [
        ((64, 3, 7, 7), 10000, 0, (9408,)),
        ((64, 3, 7, 7), 9407, 0, (1344, 7)),
        ((64, 3, 7, 7), 9408, 1, (64, 147)),
        ((64, 3, 7, 7), 20, 0, (64, 3, 7, 7)),
        ((64, 3, 7, 7), 21, 0, (64, 21, 7)),
        ((5, 20, 1, 2), 10, 0, (5, 20, 2)),
        ((1, 1), 10, 0, (1,)),
        ((), 10, 0, (1,)),
        ((7, 1, 1), 10, 1, (7,)),
        ((512, 1000), 100, 2, (512, 1000)),
    ],
)
def test_neighbouring_dimensions_merge_up_to_a_size(shape, max_size, keep, merged):
    assert bases.merged_shape(shape, max_size, keep=keep) == merged
    assert math.prod(merged) == math.prod(shape)


@pytest.mark.parametrize("shape", [(10, 7), (4, 4), (9,), (3, 5, 8), (), (0, 3)])
@pytest.mark.parametrize("max_size", [1, 4, 100])
def test_blocks_tile_a_tensor(shape, max_size):
    counts = torch.zeros(shape)
    found = bases.blocks(shape, max_size)
    for block in found:
        assert all(0 < n <= max_size for n in counts[block].shape)
        counts[block] += 1
    assert (counts == 1).all()
    assert len(found) == math.prod(math.ceil(n / max_size) for n in shape)


def test_sizes_out_of_range_raise():
    with pytest.raises(ValueError, match="max_size must be >= 1, got 0"):
        bases.blocks((3, 3), 0)
    with pytest.raises(ValueError, match="max_size must be >= 1, got 0"):
        bases.merged_shape((3, 3), 0)
    with pytest.raises(ValueError, match="keep must be between 0 and 2, got 3"):
        bases.merged_shape((3, 3), 10, keep=3)
