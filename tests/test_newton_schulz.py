"""Muon's products: the numbers of its three methods against float64, its rule by shape, and what a batch may not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import precond
from bench.orthogonal import FLAT, MORE, SPECTRA, expected, group, matrix, rounding, torchs
from precond._methods import newton_schulz
from precond._methods.newton_schulz import (
    LAST,
    METHODS,
    NOISE,
    POLAR_EXPRESS,
    SMALL,
    blocks_of,
    coefficients,
    operations,
    orthogonalized,
    share,
    strip,
)

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = ((256, 256), (130, 520), (1040, 130), (20, 70))
methods = pytest.mark.parametrize("method", METHODS)


def nearest_quintic(low, high):
    """The odd polynomial of degree 5 nearest to 1 on an interval, by the exchange algorithm of Remez."""
    points = np.array([low, 0.3 * high, 0.8 * high, high]) if low < 0.1 * high else np.linspace(low, high, 4)
    for _ in range(100):
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
        before, points = points, np.array([low, *np.sort(inner), high])
        if np.abs(points - before).max() < 1e-14:
            break
    return a, b, c


def test_the_polynomials_of_polar_express_are_the_papers_greedy_minimax():
    low, high, found = 1e-3, 1.0, []
    for _ in range(7):
        a, b, c = nearest_quintic(max(low, 0.02407327424182761 * high), high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        a, b, c = (2 * x / sum(ends) for x in (a, b, c))  # as far below 1 as above
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
        found.append((a, b, c))
    np.testing.assert_allclose(found[:6], POLAR_EXPRESS, rtol=1e-9)
    np.testing.assert_allclose(found[6], LAST, rtol=2e-6)


def test_polar_express_takes_the_interval_to_one_and_nothing_above():
    x = np.geomspace(1e-3, 1.01, 10**5)
    for steps, error in ((5, 0.15), (6, 0.01), (8, 1e-9)):
        values = x
        for a, b, c in coefficients(group("polar_express", ns_steps=steps)):
            values = a * values + b * values**3 + c * values**5
        assert np.abs(values[x <= 1] - 1).max() < error
        assert values.max() < 1.14


def deviations(shape, spectrum, method, dtype):
    u = matrix(min(shape), max(shape), spectrum)
    u = (u if shape[0] <= shape[1] else u.mT).to(dtype)
    found = orthogonalized(u[None], group(method))[0]
    assert found.dtype == dtype
    assert found.shape == u.shape
    exact, polar = expected(u, group(method))
    return rounding(found, exact), rounding(torchs(u, group()), expected(u, group())[0]), found, exact, polar


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", [None, "gram"])
def test_in_bfloat16_it_is_torchs_iteration_within_its_rounding(method, shape, spectrum):
    ours, torchs_own, found, exact, _ = deviations(shape, spectrum, method, BF16)
    assert ours <= 1.5 * torchs_own + MORE[method]
    s, t = torch.linalg.svdvals(found.double()), torch.linalg.svdvals(exact)
    assert s.max() < 1.25
    if method is None:
        polar, *_ = deviations(shape, spectrum, "polar_express", BF16)
        assert polar < 0.35
    if spectrum in ("normal", "1e1"):
        assert (s - t).abs().max() < 0.12


@methods
@pytest.mark.parametrize("spectrum", [*FLAT, "normal", "half the rank"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bf16", "fp16", "fp32"])
def test_many_steps_stay_bounded(method, spectrum, dtype):
    """Of one polynomial: an error beyond the room that it leaves would be taken to infinity."""
    for shape in ((130, 260), (20, 70)):
        for steps in (12, 33, 99) if dtype != F16 else (33,):
            found = orthogonalized(matrix(*shape, spectrum).to(dtype)[None], group(method, ns_steps=steps))[0]
            assert torch.linalg.matrix_norm(found.float(), 2) < 1.25


@methods
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("dtype", "bound"), [(F16, 0.3), (F32, 2e-3), (F64, 1e-10)], ids=["fp16", "fp32", "fp64"])
def test_rounding_falls_with_the_precision(method, spectrum, dtype, bound):
    ours, *_ = deviations((130, 520), spectrum, method, dtype)
    assert ours < bound


@methods
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(3, 130, 520), (3, 520, 130), (3, 256, 256), (2, 5, 9), (2, 9, 5)], ids=str)
def test_every_number_of_steps_is_the_iteration(method, steps, shape):
    u = torch.randn(*shape, dtype=F64)
    options = group(method, ns_steps=steps)
    for found, one in zip(orthogonalized(u, options), u, strict=True):
        torch.testing.assert_close(found, expected(one, options)[0], rtol=0, atol=1e-11)


def test_coefficients_of_the_group_are_used():
    u = torch.randn(1, 130, 520, dtype=F64)
    options = group(ns_coefficients=(2.0, -1.5, 0.5), ns_steps=12)
    torch.testing.assert_close(orthogonalized(u, options)[0], expected(u[0], options)[1], rtol=0, atol=1e-6)


@methods
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize(
    ("shape", "seeds"),
    [
        *[((16, 16), 60), ((300, 3), 20), ((17, 33), 20), ((5, 9), 20), ((1, 4096), 5), ((64, 64), 5), ((70, 20), 5)],
        *[((256, 256), 1), ((520, 131), 1)],
    ],
    ids=str,
)
def test_a_result_does_not_depend_on_the_batch_on_the_cpu(method, dtype, shape, seeds):
    for seed in range(seeds):
        u = torch.randn(5, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        whole = orthogonalized(u, group(method))
        for each in ([3], [0], [4, 0], [2, 2, 1]):
            assert torch.equal(whole[each], orthogonalized(u[each], group(method)))
            assert torch.equal(whole[each[:1]], orthogonalized(u[each[0] : each[0] + 1], group(method)))
    strided = torch.stack([u.mT, u.mT]).mT[1]
    torch.testing.assert_close(
        orthogonalized(strided, group(method)), whole, rtol=0, atol=0.15 if dtype == BF16 else 1e-3
    )


@methods
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 12), (2, 130, 300), (2, 300, 130)], ids=str)
def test_zeros_stay_zeros_and_a_nan_stays_in_its_matrix(method, dtype, shape):
    u = torch.randn(*shape).to(dtype)
    u[0] = 0
    found = orthogonalized(u, group(method))
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    u[0, 1, 2] = float("nan")
    again = orthogonalized(u, group(method))
    assert again[0].isnan().all()
    assert torch.equal(again[1:], found[1:])


@methods
def test_memory_that_nobody_has_written_is_not_read(method):
    """It is NaN here. Nor is it read behind a row, where oneDNN's products for AMX multiply by 0 what they find."""
    u = torch.randn(2, 257, 1031).to(BF16)
    assert orthogonalized(u, group(method)).isfinite().all()
    square = newton_schulz.product(u[:1], u[:1])
    assert square.as_strided((square.untyped_storage().nbytes() // square.itemsize,), (1,)).isfinite().all()


@methods
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 5, 0), (0, 0, 0)], ids=str)
def test_nothing_is_nothing(method, shape):
    assert orthogonalized(torch.ones(shape), group(method)).shape == shape


@methods
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 1, 9), (2, 9, 1)], ids=str)
def test_a_vector_is_divided_by_its_norm(method, shape):
    u = torch.randn(*shape, dtype=F64)
    found = orthogonalized(u, group(method))
    sizes = torch.linalg.vector_norm(found, dim=(-2, -1), keepdim=True)
    assert ((sizes - 1).abs() < 0.35).all()
    torch.testing.assert_close(found / sizes, u / torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e4])
def test_float16_does_not_overflow(scale):
    u = torch.randn(1, 300, 300).clamp(-2, 2)
    exact = expected(u[0], group())[0]
    assert rounding(orthogonalized((u * scale).to(F16), group())[0], exact) < 0.05


@pytest.mark.parametrize(
    ("m", "n"), [(64, 64), (512, 512), (512, 2048), (1024, 4096), (1000, 3000), (2048, 2049), (300, 9000)]
)
@methods
def test_blocks_follow_from_counts(m, n, method):
    """Every cut of the steps that the noise allows takes at least as many operations as the one that is chosen."""
    part, coefs, eps = share(m, strip(m)), coefficients(group(method)), torch.finfo(BF16).eps
    chosen = blocks_of(m, n, coefs, BF16, method, part)
    assert sum(chosen) == len(coefs)
    if method != "gram":
        assert chosen == [1] * 5
        return
    for bits in range(16):
        cut = [1]
        for i in range(4):
            if bits >> i & 1:
                cut[-1] += 1
            else:
                cut.append(1)
        ends = np.cumsum(cut)
        growth = [
            np.prod([coefs[i][0] ** 2 for i in range(end - k, end - 1)]) for end, k in zip(ends, cut, strict=True)
        ]
        if max(g if k > 1 else 0 for g, k in zip(growth, cut, strict=True)) * eps / 2 <= NOISE:
            assert operations(m, n, chosen, part) <= operations(m, n, cut, part)


@methods
@pytest.mark.parametrize("shape", [(512, 512), (256, 1024), (1024, 256)], ids=str)
def test_operations_are_what_is_counted(method, shape, monkeypatch):
    """Of the calls of torch's products, in strips and in the products with X."""
    found = 0
    real = {name: getattr(torch, name) for name in ("mm", "addmm")}

    def counting(name, left, right):
        def call(*args, **kwargs):
            nonlocal found
            found += 2 * args[left].shape[0] * args[left].shape[1] * args[right].shape[1]
            return real[name](*args, **kwargs)

        return call

    monkeypatch.setattr(newton_schulz.torch, "mm", counting("mm", 0, 1))
    monkeypatch.setattr(newton_schulz.torch, "addmm", counting("addmm", 1, 2))
    orthogonalized(torch.randn(1, *shape, dtype=BF16), group(method))
    m, n = min(shape), max(shape)
    part = share(m, strip(m))
    blocks = blocks_of(m, n, coefficients(group(method)), BF16, method, part)
    assert found == pytest.approx(operations(m, n, blocks, part), rel=1e-12)
    assert found <= (0.75 if m == n else 0.65 if method == "gram" else 0.87) * operations(m, n, [1] * 5)


@pytest.mark.parametrize(("method", "target"), [(None, 0.76), ("gram", 0.56)])
def test_wide_matrices_take_fewer_operations(method, target):
    part = share(1024, strip(1024))
    blocks = blocks_of(1024, 4096, coefficients(group(method)), BF16, method, part)
    assert blocks == ([2, 2, 1] if method else [1] * 5)
    assert operations(1024, 4096, blocks, part) < target * operations(1024, 4096, [1] * 5)


def test_a_block_of_gram_ends_where_its_polynomials_cancel():
    assert newton_schulz.room(3.4445, -4.775, 2.0315) == pytest.approx((1.2024, 0.061), abs=1e-3)
    tight = [(4.0848, -6.8946, 2.9270)] * 4  # 0.052 are left, of which two steps would take 0.083
    assert blocks_of(256, 1024, tight, BF16, "gram", 0.6) == [1] * 4
    assert blocks_of(256, 1024, tight, F32, "gram", 0.6) == [3, 1]


@methods
def test_a_kernel_for_symmetric_products_gives_the_same(method, monkeypatch, triton_interpreter):
    """As on a GPU: batched, with a factor for each matrix, in the interpreter."""
    from precond.triton_kernels import symmetric

    u = torch.randn(3, 40, 120)
    u[1] *= 100
    monkeypatch.setattr(newton_schulz, "kernels", lambda a: symmetric)
    monkeypatch.setattr(newton_schulz, "scalar", lambda values, like: values.float()[:, None, None])
    monkeypatch.setattr(newton_schulz, "SMALL", 0)
    for dtype, bound in ((F32, 1e-4), (BF16, 0.1)):
        for x in (u.to(dtype), u.mT.contiguous().to(dtype)):
            for found, one in zip(orthogonalized(x, group(method)), x, strict=True):
                assert rounding(found, expected(one, group(method))[0]) < bound


@methods
def test_a_device_without_the_kernel_gives_the_same(method, monkeypatch):
    """Blocks of several steps with a factor for each matrix, by torch's batched products."""
    assert SMALL > 3 * 40 * 40 * 120
    u = torch.randn(3, 40, 120, dtype=F64)
    monkeypatch.setattr(newton_schulz, "scalar", lambda values, like: values[:, None, None])
    x = newton_schulz.normalized(u, 1e-7)
    coefs = coefficients(group(method))
    found = newton_schulz.block(newton_schulz.block(x, coefs[:3], None), coefs[3:], torch.empty_like(x))
    for each, one in zip(found, u, strict=True):
        torch.testing.assert_close(each, expected(one, group(method))[0], rtol=0, atol=1e-9)


def test_method_is_an_option_of_a_group_that_torchs_checkpoints_do_not_have():
    def params():
        return [torch.nn.Parameter(torch.eye(4, 6) + 0.1), torch.nn.Parameter(torch.eye(6, 4) + 0.1)]

    first, second = params()
    opt = precond.Muon([{"params": [first]}, {"params": [second], "method": "polar_express"}], lr=0.1)
    assert "method" not in opt.param_groups[0]
    before = first.detach().clone(), second.detach().clone()
    first.grad, second.grad = torch.randn(4, 6), torch.randn(6, 4)
    opt.step()
    for p, old, lowest in ((first, before[0], 0.6), (second, before[1], 0.85)):
        step = (old * (1 - 0.1 * 0.1) - p.detach()) / (0.1 * max(1, p.shape[0] / p.shape[1]) ** 0.5)
        assert torch.linalg.svdvals(step).min() > lowest
    again = precond.Muon([{"params": [p]} for p in params()], lr=0.1)
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[1]["method"] == "polar_express"
    with pytest.raises(ValueError, match=r"method must be one of .*'gram'.*, got 'svd'"):
        precond.Muon(params(), method="svd")
