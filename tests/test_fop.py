"""FOP: docs/theory.md, D, against an explicit d x d preconditioner and autograd, and as an optimizer around others.

Over 400 lines: all of it is one class, against the same explicit matrix.
"""

from __future__ import annotations

import collections
import copy
import functools
import io
import itertools
import math
import pickle

import pytest
import torch
from support.cases import bits_equal
from support.fop import F64, explicit, layers, layouts, loss_of, start, train
from support.ranks import on_two_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import precond
from precond._methods import hypergradient, spectral_norm

#: Most tests are of the formula as it is in theory.md, D.1; what they take of the defaults they say.
FOP = functools.partial(precond.FOP, normalize=None, compose="gradient")
BASES = {
    "AdamW": lambda ps: precond.AdamW(ps, lr=0.02),
    "SGD": lambda ps: precond.SGD(ps, lr=0.02, weight_decay=0.1),
    "torch SGD": lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9),
    "torch Adam": lambda ps: torch.optim.Adam(ps, lr=0.02, weight_decay=0.1),
}
bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
NORMALIZATIONS = [
    None,
    "step",
    "matrix",
    "hypergradient",
    ("step", "hypergradient"),
    ["matrix", "hypergradient"],
    {"step", "matrix"},
]


def named(normalize) -> str:
    """The same in every process: a set has no order."""
    return "+".join(sorted(normalize)) if isinstance(normalize, set) else str(normalize)


def seen_by(base, p):
    """The gradients that a base steps on."""
    seen = []
    base.register_step_pre_hook(lambda *_: seen.append(p.grad.clone()))
    return seen


# The formula.


@layouts
def test_m_moves_against_the_hypergradient_that_autograd_finds_through_the_step(shape, mode, around):
    w, loss, lr, rho = start(shape), loss_of(shape), 0.05, 0.6 / math.prod(shape)
    optimizer = FOP(torch.optim.SGD([w], lr=lr), rho, mode)
    then = last = None
    for _ in range(6):
        before, M = w.detach().clone(), copy.deepcopy(optimizer.own.get(w, {}).get("preconditioner"))
        optimizer.zero_grad()
        loss(w).backward()
        g = w.grad.clone()
        optimizer.step()
        new = optimizer.own[w]["preconditioner"]
        if last is not None:
            M.requires_grad_()
            whole = explicit(M, around)
            there = then - lr * (whole @ whole.T @ last.flatten()).reshape(shape)
            torch.testing.assert_close(there.detach(), before, rtol=1e-12, atol=1e-14)
            (hypergradient,) = torch.autograd.grad(loss(there), M)
            moved = new - M.detach()
            assert moved.norm() > 5e-6
            assert (moved + rho * hypergradient).norm() <= 1e-10 * moved.norm()
        then, last = before, g
    assert (new - (torch.eye(len(new)) if around else 1.0)).norm() > 0.02


@layouts
def test_the_base_steps_on_the_explicit_preconditioner_times_the_gradient(shape, mode, around):
    w = start(shape)
    base = torch.optim.Adam([w], lr=0.1)
    optimizer, seen = FOP(base, 0.03, mode, normalize="hypergradient"), seen_by(base, w)
    for _ in range(5):
        w.grad = torch.randn(shape, dtype=F64)
        given = w.grad
        copied = given.clone()
        optimizer.step()
        assert w.grad is given
        assert torch.equal(given, copied)
        whole = explicit(optimizer.own[w]["preconditioner"], around)
        torch.testing.assert_close(seen[-1].flatten(), whole @ whole.T @ given.flatten(), rtol=1e-12, atol=1e-14)
        assert (seen[-1] * given).sum() >= 0.0
    assert (seen[-1] - given).norm() > 1e-3 * given.norm()


@pytest.mark.parametrize("normalize", NORMALIZATIONS, ids=named)
@pytest.mark.parametrize("mode", ["output", "diagonal"])
def test_normalizations_are_those_of_the_text(normalize, mode):
    w, lr, rho = start((4, 6)), 0.5, 0.02
    names = {normalize} if isinstance(normalize, str) else set(normalize or ())
    base = torch.optim.SGD([w], lr=lr)
    optimizer, seen = FOP(base, rho, mode, normalize=normalize), seen_by(base, w)
    M, last = (torch.eye(4, dtype=F64) if mode == "output" else torch.ones(4, 6, dtype=F64)), None
    for _ in range(6):
        w.grad = G = torch.randn(4, 6, dtype=F64)
        optimizer.step()
        if last is not None:
            rate = rho / (G.norm() * last.norm()) if "hypergradient" in names else rho * lr
            if mode == "output":
                M = M + rate * (G @ (last.T @ M) + last @ (G.T @ M))
            else:
                M = M * (1 + 2 * rate * G * last)
            if "matrix" in names:
                M = M * (4 if mode == "output" else 24) ** 0.5 / M.norm()
        U = M @ M.T @ G if mode == "output" else M**2 * G
        if "step" in names:
            U = U * G.norm() / U.norm()
        torch.testing.assert_close(optimizer.own[w]["preconditioner"], M, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(seen[-1], U, rtol=1e-12, atol=1e-14)
        last = G


@pytest.mark.parametrize("mode", ["output", "diagonal"])
def test_a_normalized_hypergradient_knows_neither_loss_scale_nor_lr(mode):
    found = []
    for scale, lr in ((1.0, 0.1), (2.0**40, 0.7), (2.0**-40, 0.0)):
        w = start((4, 6), torch.float32)
        optimizer = FOP(torch.optim.SGD([w], lr=lr), 0.05, mode, normalize="hypergradient")
        for step in range(5):
            w.grad = scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        found.append(optimizer.own[w]["preconditioner"])
    assert (found[0] - (1.0 if mode == "diagonal" else torch.eye(4))).norm() > 0.01
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def test_maximizing_minus_the_loss_is_minimizing_it():
    loss, found = loss_of((5, 3)), []
    for sign in (1.0, -1.0):
        w = start((5, 3))
        optimizer = FOP(torch.optim.SGD([w], lr=0.05, maximize=sign < 0), 0.2, "input")
        for _ in range(5):
            optimizer.zero_grad()
            (sign * loss(w)).backward()
            optimizer.step()
        found.append((w.detach(), optimizer.own[w]["preconditioner"]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


# docs/theory.md, D.2: normalisation, lr, rho, largest best loss of 200 steps, largest condition number of M^T H M.
QUADRATIC = [
    (None, 1.9, 0.0, 2.4e-6, 100.1),
    (None, 4.0, 0.03, 5e-10, 40.0),
    ("matrix", 4.0, 0.03, 2e-11, 40.0),
    ("step", 2.5, 0.1, 2e-7, 40.0),
    ("hypergradient", 4.0, 0.03, 1e-200, 1.5),
    (("step", "hypergradient"), 4.0, 0.3, 1e-29, math.inf),
    (("matrix", "hypergradient"), 4.0, 0.3, 1e-32, 100.0),
]


@pytest.mark.parametrize(("normalize", "lr", "rho", "best", "kappa"), QUADRATIC, ids=str)
def test_an_ill_conditioned_quadratic_becomes_better_conditioned(normalize, lr, rho, best, kappa):
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=F64))
    H = basis @ torch.diag(torch.logspace(-2, 0, 10, dtype=F64)) @ basis.T
    x = torch.nn.Parameter(torch.ones(10, 1, dtype=F64))
    optimizer = FOP(torch.optim.SGD([x], lr=lr), rho, "output", normalize=normalize)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (x * (H @ x)).sum() / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) <= best
    if rho == 0.0:
        assert min(losses) == pytest.approx(2.29e-6, rel=0.01)
        assert not optimizer.own
        return
    M = optimizer.own[x]["preconditioner"]
    assert torch.linalg.cond(M.T @ H @ M) < kappa
    assert torch.linalg.eigvalsh(M @ M.T).min() > 0.0


# The guard.


def matrices(r):
    """Noise, rank 1, the identity, and the identity with something large or dense beside it: a batch."""
    noise = torch.randn(r, r, generator=torch.Generator().manual_seed(r))
    eye = torch.eye(r)
    outer = torch.outer(noise[0], noise[:, 0])
    return torch.stack([noise, noise[:, :1] @ noise[:1], eye, eye + 3 * outer / r, eye + noise / r, eye + noise / 8])


@pytest.mark.parametrize("with_square", [False, True])
@pytest.mark.parametrize("r", [1, 2, 9, 300])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_each_bound_of_the_norm_is_closer_and_above_it_by_what_it_says(r, scale, with_square):
    M = matrices(r)
    norm = torch.linalg.matrix_norm(M.double() * scale, 2)
    M = M * scale
    found = list(spectral_norm.bounds(M, M @ M.mT if with_square else None))
    assert len(found) == (4 if with_square else 5)
    for bound, above in found:
        assert (norm * (1 - 1e-5) <= bound).all()
        assert (bound <= norm * above * (1 + 1e-5)).all()
    for (earlier, _), (later, _) in itertools.pairwise(found):
        assert (later <= earlier * (1 + 1e-5)).all()
    assert found[-1][1] == r ** (1 / 32)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, 1e30])
def test_what_is_no_preconditioner_has_no_norm(bad):
    M = torch.full((1, 3, 3), bad)
    *_, (bound, _) = spectral_norm.bounds(M)
    assert not bound <= math.inf
    assert not spectral_norm.allowed(M, None, torch.finfo(M.dtype).max).any()


@pytest.mark.parametrize("columns", [2, 5])
@pytest.mark.parametrize("mode", ["output", "diagonal"])
def test_an_infinite_m_is_refused_also_where_max_norm_is_beyond_the_dtype(mode, columns):
    p = start((3, columns), torch.float32)
    optimizer = FOP(torch.optim.SGD([p], lr=1e4), 1e4, mode, max_norm=1e300)
    train(optimizer, [p], 1)
    p.grad = torch.full_like(p, 1e36)
    optimizer.step()
    assert torch.equal(optimizer.own[p]["preconditioner"], torch.eye(3) if mode == "output" else torch.ones(3, columns))


@pytest.mark.parametrize("with_square", [False, True])
@pytest.mark.parametrize("r", [1, 9, 64, 257])
def test_an_early_answer_is_that_of_the_last_bound(r, with_square):
    M = matrices(r)
    M = torch.cat([M, M[:1] * 0.0, M[:1] * math.nan, M[:1] * math.inf])
    *_, (last, _) = spectral_norm.bounds(M)
    for limit in (*(last[last.isfinite()] * 1.001).tolist(), *(last[last.isfinite()] * 0.999).tolist(), 1.5, 10.0, 1e4):
        expected = (last > 0.0) & (last <= limit)
        for batch, answers in ((M, expected), *((M[i : i + 1], expected[i : i + 1]) for i in range(len(M)))):
            assert torch.equal(spectral_norm.allowed(batch, batch @ batch.mT if with_square else None, limit), answers)


@pytest.mark.parametrize(("columns", "expected"), [(500, 1), (100, 0)])
def test_the_guard_multiplies_only_where_the_norm_is_in_doubt(columns, expected, monkeypatch):
    """Of the squares of a step, M M^T is one that is needed anyway for a G with more columns than rows."""
    p = start((300, columns), torch.float32)
    optimizer = FOP(torch.optim.SGD([p], lr=0.1), 0.05, "output", normalize="hypergradient")
    train(optimizer, [p], 2)
    M, counted, square = optimizer.own[p]["preconditioner"], [], spectral_norm.square
    monkeypatch.setattr(spectral_norm, "square", lambda a: (counted.append(len(a)), square(a))[1])
    # Below max_norm; far above, where the M that stays is squared too; and so near that all bounds are needed.
    for norm, squares in ((8.0, expected), (300.0, 2 * expected), (9.0, 4)):
        M.copy_(torch.eye(300) * norm)
        counted.clear()
        train(optimizer, [p], 1, first=2)
        assert len(counted) == squares, norm


@pytest.mark.parametrize("mode", ["output", "diagonal"])
def test_m_grows_to_its_limit_and_no_further(mode):
    w = start((3, 4))
    optimizer = FOP(torch.optim.SGD([w], lr=0.1), 0.1, mode, normalize="hypergradient", max_norm=3.0)
    w.grad = torch.ones(3, 4, dtype=F64)
    for _ in range(400):
        optimizer.step()
    M = optimizer.own[w]["preconditioner"]
    largest = M.abs().max() if mode == "diagonal" else torch.linalg.matrix_norm(M, 2)
    assert 2.3 <= largest <= 3.0


@bases
@pytest.mark.parametrize("normalize", [None, "matrix", "step"])
def test_a_hyper_lr_far_too_large_changes_nothing(base, normalize):
    a, b = layers(), layers()
    optimizer = FOP(base(a), 1e30, normalize=normalize, max_norm=1.5)
    train(optimizer, a, 4)
    train(base(b), b, 4)
    if normalize is None:  # the others may differ by a rounding of I G
        assert all(map(bits_equal, a, b))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalize", NORMALIZATIONS, ids=named)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_m_does_not_learn_from_what_is_not_finite(normalize, bad):
    w, b = start((3, 4)), start((4,))
    optimizer = FOP(torch.optim.SGD([w, b], lr=0.1), 0.05, "input", normalize=normalize)
    train(optimizer, [w, b], 3)
    before = [optimizer.own[p]["preconditioner"].clone() for p in (w, b)]
    for value in (bad, 1.0):  # bad itself, and then the one before
        w.grad, b.grad = torch.ones(3, 4, dtype=F64), torch.ones(4, dtype=F64)
        w.grad[1, 2] = b.grad[2] = value
        optimizer.step()
        after = [optimizer.own[p]["preconditioner"] for p in (w, b)]
        assert torch.equal(after[0], before[0])
        assert after[1][2] == before[1][2]
        assert after[1].isfinite().all()
    train(optimizer, [w, b], 2)
    for p, M in zip((w, b), before, strict=True):
        assert optimizer.own[p]["preconditioner"].isfinite().all()
        assert not torch.equal(optimizer.own[p]["preconditioner"], M)


@pytest.mark.parametrize("normalize", NORMALIZATIONS, ids=named)
def test_a_gradient_of_zeros_moves_nothing(normalize):
    params = layers()
    optimizer = FOP(torch.optim.SGD(params, lr=0.1), 0.05, normalize=normalize)
    train(optimizer, params, 3)
    before, Ms = copy.deepcopy(params), copy.deepcopy([optimizer.own[p]["preconditioner"] for p in params])
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(map(bits_equal, params, before))
    torch.testing.assert_close([optimizer.own[p]["preconditioner"] for p in params], Ms)


# Matrices of one size are worked on together.


def flops(optimizer):
    """Operations of a step's products."""
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return counter.get_total_flops()


# The size of G, and the products of a step in units of r^3: with c = columns / r, 12 c; 6 c + 2; 4 c + 2 + what M M^T takes.
SIZES = [
    ((300, 50), 12 / 6),
    ((300, 150), 6 / 2 + 2),
    ((304, 304), 4 + 2 + 5 / 4),
    ((301, 602), 8 + 2 + 5 / 4),
    ((9, 90), 44),
]


@pytest.mark.parametrize(("shape", "products"), SIZES, ids=str)
def test_every_order_of_products_is_the_formula_with_its_number_of_operations(shape, products):
    params, (r, _) = [start(shape, seed=seed) for seed in range(3)], shape
    base = torch.optim.SGD(params, lr=0.1)
    optimizer, seen = FOP(base, 0.3, "output", normalize="hypergradient"), [seen_by(base, p) for p in params]
    Ms, last = [torch.eye(r, dtype=F64)] * 3, None
    for step in range(4):
        train(optimizer, params, 1, first=step)
        gradients = [p.grad.clone() for p in params]
        for i, G in enumerate(gradients if last else ()):
            A = G @ last[i].T / (G.norm() * last[i].norm())
            Ms[i] = Ms[i] + 0.3 * (A + A.T) @ Ms[i]
        for p, G, M, of in zip(params, gradients, Ms, seen, strict=True):
            torch.testing.assert_close(optimizer.own[p]["preconditioner"], M, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(of[-1], M @ M.T @ G, rtol=1e-12, atol=1e-12)
        last = gradients
    assert flops(optimizer) == pytest.approx(3 * products * r**3, rel=0.02)


@pytest.mark.parametrize("normalize", NORMALIZATIONS, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per", [1, 100, 1 << 20])
def test_parameters_together_are_the_same_apart(normalize, dtype, per, monkeypatch):
    """With sizes of M, learning rates and dtypes that differ, some alike, in batches of one, of a few and of all."""
    monkeypatch.setattr(hypergradient, "BATCH", per)
    shapes = [(5, 7), (6, 5), (5, 5), (5, 1), (7, 5), (5, 7), (4, 5, 1), (5, 2, 3, 3), (2, 5, 3, 3), (3,)]
    together, apart = ([start(shape, dtype, seed) for seed, shape in enumerate(shapes)] for _ in range(2))
    lrs = [0.1, 0.2, 0.1, 0.1, 0.1, torch.tensor(0.3), 0.1, torch.tensor([0.2]), 0.4, 0.1]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(together, lrs, strict=True)]
    optimizer = FOP(precond.SGD(groups), 0.05, "output", normalize=normalize)
    alone = [
        FOP(precond.SGD([p], lr=lr), 0.05, "output", normalize=normalize) for p, lr in zip(apart, lrs, strict=True)
    ]
    for step in range(5):
        for i, (p, q) in enumerate(zip(together, apart, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(dtype)
            p.grad = None if (step + i) % 4 == 0 else p.grad
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        for one in alone:
            one.step()
    for p, q, one in zip(together, apart, alone, strict=True):
        torch.testing.assert_close(optimizer.own[p]["preconditioner"], one.own[q]["preconditioner"])
        assert torch.equal(optimizer.own[p]["previous_grad"], one.own[q]["previous_grad"])
        torch.testing.assert_close(p, q)


# What one network of the next tests has: sizes of M and forms of G that differ or are alike, and the scale of gradients.
NETWORK = [(8, 1, 3, 3), (8,), (6, 8, 3, 3), (6,), (8, 6, 3, 3), (5, 12), (12, 5), (5,), (), (3, 40), (1,)]


@pytest.mark.parametrize("normalize", NORMALIZATIONS, ids=named)
@pytest.mark.parametrize("mode", ["spatial", "output", "diagonal"])
def test_networks_together_do_not_see_each_other(mode, normalize):
    """Elementwise to the bit. Each parameter has gradients of another size, so a neighbour's factor would be far off."""
    dtypes = [torch.float32, torch.bfloat16, torch.float32, F64]
    kinds = [(shape, dtypes[i], i) for i in range(4) for shape in NETWORK]
    together, apart = ([start(shape, dtype, i) for shape, dtype, i in kinds] for _ in range(2))
    for params in (together, apart):
        for p in filter(lambda p: p.dim() == 4 and len(p) == 6, params):
            p.data = p.data.to(memory_format=torch.channels_last)
    # The base of one takes all, those of the others one each; none of them matters here.
    made = dict(hyper_lr=0.05, mode=mode, normalize=normalize)
    base = torch.optim.SGD(together, lr=0.1)
    optimizer, seen = FOP(base, **made), [seen_by(base, p) for p in together]
    bases = [torch.optim.SGD([q], lr=0.1) for q in apart]
    alone, expected = [FOP(one, **made) for one in bases], list(map(seen_by, bases, apart))
    broken = {4, 25, 8, 40}  # matrices and elementwise ones, at the fourth step
    still = {2, 7, 16, 23, 27, 35}  # those that have every second gradient only, and so never learn
    last: list[torch.Tensor] = []
    for step in range(6):
        for i, (p, q) in enumerate(zip(together, apart, strict=True)):
            size = 1.5 ** ((7 * i) % 11) / max(p.numel(), 8) ** 0.5 / 4
            q.grad = size * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(q)
            if step % 2 and i in still:
                q.grad.zero_()
            if step == 3 and i in broken:
                q.grad.view(-1)[-1:] = math.nan
            p.grad = q.grad.clone()
        last = [q.grad for q in apart] if step == 4 else last
        optimizer.step()
        for one in alone:
            one.step()
    moved = 0
    for i, (p, q, one) in enumerate(zip(together, apart, alone, strict=True)):
        ours, theirs = optimizer.own[p], one.own[q]
        M, name = theirs["preconditioner"], (tuple(p.shape), p.dtype, i)
        moved += not torch.equal(M, torch.eye(len(M), dtype=M.dtype) if optimizer._mixed(p) else torch.ones_like(M))
        assert bits_equal(ours["previous_grad"], theirs["previous_grad"]), name
        if i in still and "matrix" not in (normalize or ()):
            assert bits_equal(seen[i][-2], last[i]), name
        for step, (U, by) in enumerate(zip(seen[i], expected[i], strict=True)):
            assert U.isfinite().all() == (step != 3 or i not in broken), (step, *name)
            assert U.stride() == by.stride() == torch.empty_like(q.grad).stride(), name
            if optimizer._mixed(p):
                rtol = 8 * torch.finfo(p.dtype).eps
                torch.testing.assert_close(U, by, rtol=rtol, atol=rtol * float(by.nan_to_num().norm()), equal_nan=True)
            else:
                assert bits_equal(U, by), (step, *name)
        if optimizer._mixed(p):
            rtol = 8 * torch.finfo(M.dtype).eps
            torch.testing.assert_close(ours["preconditioner"], M, rtol=rtol, atol=rtol)
        else:
            assert bits_equal(ours["preconditioner"], M), name
    assert moved >= 28  # with "matrix" an M of one element stays 1


@pytest.mark.parametrize("mode", ["spatial", "output", "diagonal"])
def test_a_step_of_many_networks_has_the_products_of_one(mode):
    def operations(networks):
        params = [start(shape, torch.float32, seed) for seed in range(networks) for shape in NETWORK]
        optimizer = FOP(precond.SGD(params, lr=0.1), 0.05, mode, normalize="hypergradient")
        train(optimizer, params, 2)
        with Counts() as counts:
            optimizer.step()
        return [counts.of[name] for name in ("bmm", "baddbmm", "mul", "add", "where", "cat", "linalg_vector_norm")]

    counted = operations(2)
    assert sum(counted) > 10
    assert operations(20) == counted


@pytest.mark.parametrize("columns", [3, 12, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e18])
def test_a_refused_m_beside_others_stays_to_the_bit_and_they_move(columns, bad):
    params = [start((12, columns), torch.float32, seed) for seed in range(4)]
    base = torch.optim.SGD(params, lr=1e-4)
    optimizer, seen = FOP(base, 0.05, "output"), [seen_by(base, p) for p in params]
    train(optimizer, params, 3)
    before = [optimizer.own[p]["preconditioner"].clone() for p in params]
    for p in params:
        p.grad = torch.randn(p.shape)
    params[2].grad[1, 1] = bad
    optimizer.step()
    for i, (p, M) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(optimizer.own[p]["preconditioner"], M) == (i == 2)
        M = optimizer.own[p]["preconditioner"]
        if i == 2 and not math.isfinite(bad):
            assert not seen[i][-1].isfinite().all()
        else:
            torch.testing.assert_close(seen[i][-1], M @ (M.T @ p.grad), rtol=1e-4, atol=1e-3)


class Counts(TorchDispatchMode):
    """How often each operation is called."""

    def __init__(self):
        super().__init__()
        self.of = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Refuses what waits for a device: reading a value, or a size that depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "item", "is_nonzero"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("normalize", NORMALIZATIONS, ids=named)
@pytest.mark.parametrize("mode", ["output", "spatial", "diagonal"])
def test_on_a_device_nothing_is_read_and_the_same_m_are_refused(normalize, mode, monkeypatch):
    shapes = [(9, 9), (9, 2), (9, 30), (4, 9, 3, 3), (9,)]
    ours, theirs = ([start(shape, torch.float32, seed) for seed, shape in enumerate(shapes)] for _ in range(2))
    made = {"mode": mode, "normalize": normalize, "max_norm": 1.1}
    one, other = (FOP(torch.optim.SGD(ps, lr=0.05), 0.3, **made) for ps in (ours, theirs))
    moved = set()
    for step in range(8):
        before = [one.own[p]["preconditioner"].clone() for p in ours] if step else []
        train(one, ours, 1, first=step)
        with monkeypatch.context() as patch, Waits():
            for module in (hypergradient, spectral_norm):
                patch.setattr(module, "on_device", lambda t: True)
            patch.setattr(precond.FOP, "_asked_for_states_only", lambda self: False)
            for p, q in zip(ours, theirs, strict=True):
                q.grad = p.grad.clone()
            other.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.own[p]["preconditioner"], other.own[q]["preconditioner"])
            torch.testing.assert_close(p, q)
        moved |= {torch.equal(one.own[p]["preconditioner"], M) for p, M in zip(ours, before, strict=False)}
    assert mode == "diagonal" or moved == {True, False}


# An optimizer as any other.


@bases
@pytest.mark.parametrize("mode", ["spatial", "input", "output", "diagonal"])
@pytest.mark.parametrize("compose", ["gradient", "direction"])
def test_without_hyper_lr_it_is_the_base_bit_for_bit(base, mode, compose):
    a, b = layers(), layers()
    optimizer, alone = FOP(base(a), 0.0, mode, normalize="step", compose=compose), base(b)
    train(optimizer, a, 5)
    train(alone, b, 5)
    assert all(map(bits_equal, a, b))
    assert not optimizer.own
    assert str(optimizer.state_dict()) == str(alone.state_dict())


@bases
@pytest.mark.parametrize("normalize", NORMALIZATIONS, ids=named)
@pytest.mark.parametrize("compose", ["gradient", "direction"])
def test_the_first_step_is_the_bases_and_the_third_is_not(base, normalize, compose):
    a, b = layers(), layers()
    optimizer, alone = FOP(base(a), 0.05, normalize=normalize, compose=compose), base(b)
    train(optimizer, a, 1)
    train(alone, b, 1)
    assert all(map(bits_equal, a, b))
    train(optimizer, a, 2, first=1)
    train(alone, b, 2, first=1)
    assert not any(map(bits_equal, a, b))


def test_hyper_lr_may_be_set_to_zero_to_keep_m_as_it_is():
    params = layers()
    optimizer = FOP(torch.optim.SGD(params, lr=0.1), 0.05)
    train(optimizer, params, 3)
    Ms = copy.deepcopy([optimizer.own[p]["preconditioner"] for p in params])
    optimizer.hyper_lr = 0.0
    train(optimizer, params, 2)
    assert all(torch.equal(optimizer.own[p]["preconditioner"], M) for p, M in zip(params, Ms, strict=True))


@bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_it_is_resumed_bit_for_bit(base, dtype, way):
    a = layers(dtype)
    optimizer = FOP(base(a), 0.05, normalize=("matrix", "hypergradient"))
    train(optimizer, a, 3)
    if way == "state_dict":
        b, file = copy.deepcopy(a), io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = FOP(base(b), 0.05, normalize=("matrix", "hypergradient"))
        resumed.load_state_dict(torch.load(file, weights_only=True))
    else:
        b, resumed = copy.deepcopy((a, optimizer)) if way == "deepcopy" else pickle.loads(pickle.dumps((a, optimizer)))
    train(optimizer, a, 3, first=3)
    train(resumed, b, 3, first=3)
    for p, q in zip(a, b, strict=True):
        assert bits_equal(p, q)
        for name in ("preconditioner", "previous_grad"):
            assert torch.equal(optimizer.own[p][name], resumed.own[q][name])
            assert optimizer.own[p][name] is not resumed.own[q][name]


def test_a_checkpoint_names_what_is_ours():
    params = layers()
    optimizer = FOP(torch.optim.SGD(params, lr=0.1), 0.05)
    train(optimizer, params, 2)
    states = optimizer.state_dict()["state"]
    assert [list(state) for state in states.values()] == [["fop_preconditioner", "fop_previous_grad"]] * 4
    assert [tuple(state["fop_preconditioner"].shape) for state in states.values()] == [(4, 4), (6,), (9, 9), (3, 3)]


def test_a_closure_is_evaluated_once_and_its_value_returned():
    a, b, loss = start((5, 3)), start((5, 3)), loss_of((5, 3))
    one, other = (FOP(torch.optim.SGD([p], lr=0.05), 0.2, "input") for p in (a, b))
    calls = []

    def closure():
        calls.append(1)
        one.zero_grad()
        value = loss(a)
        value.backward()
        return value

    for step in range(4):
        expected = loss(b)
        other.zero_grad(set_to_none=False)  # what is zeroed in place is not the previous gradient
        expected.backward()
        other.step()
        assert one.step(closure).item() == expected.item()
        assert len(calls) == step + 1
    assert bits_equal(a, b)


def test_the_rule_follows_the_lr_of_each_group_and_a_scheduler():
    def run(tensor):
        a, b = start((4, 3)), start((4, 3), seed=2)
        lrs = (torch.tensor([0.1], dtype=F64), torch.tensor(0.4, dtype=F64)) if tensor else (0.1, 0.4)
        groups = [{"params": [a], "lr": lrs[0]}]
        optimizer = FOP(torch.optim.SGD(groups, foreach=False), 0.03, "output")
        optimizer.add_param_group({"params": [b], "lr": lrs[1]})
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        M, last = [torch.eye(4, dtype=F64)] * 2, None
        for step in range(4):
            train(optimizer, [a, b], 1, first=step)
            gradients = [a.grad, b.grad]
            for i in range(2) if last else ():
                rate = 0.03 * (0.1, 0.4)[i] * 0.5**step
                M[i] = M[i] + rate * (gradients[i] @ last[i].T + last[i] @ gradients[i].T) @ M[i]
            last = gradients
            scheduler.step()
        for p, expected in zip((a, b), M, strict=True):
            torch.testing.assert_close(optimizer.own[p]["preconditioner"], expected, rtol=1e-12, atol=1e-14)

    run(False)
    run(True)


def test_a_learning_rate_of_one_element_fits_a_scalar():
    a, b = start(()), start(())
    one, other = (FOP(precond.SGD([p], lr=lr), 0.125) for p, lr in ((a, torch.tensor([0.5])), (b, 0.5)))
    train(one, [a], 3)
    train(other, [b], 3)
    assert bits_equal(a, b)


def test_a_grad_scaler_changes_nothing_and_skips_what_overflows():
    (a, *_), (b, *_) = layers(), layers()
    one, other = (FOP(precond.AdamW([p], lr=0.1, fused=True), 0.05, "input") for p in (a, b))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        for p, optimizer in ((a, one), (b, other)):
            optimizer.zero_grad()
            loss = (x @ p.T).square().mean()
            if optimizer is other:
                loss.backward()
                if step != 3:
                    optimizer.step()
            else:
                scaler.scale(loss * (math.inf if step == 3 else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
    assert bits_equal(a, b)
    assert torch.equal(one.own[a]["preconditioner"], other.own[b]["preconditioner"])
    assert not torch.equal(one.own[a]["preconditioner"], torch.eye(4))


def test_a_parameter_without_a_gradient_waits():
    a, b = start((4, 3)), start((4, 3))
    one, other = (FOP(torch.optim.SGD([p], lr=0.1), 0.05) for p in (a, b))
    train(one, [a], 2)
    a.grad = None
    one.step()
    train(one, [a], 1, first=2)
    train(other, [b], 3)
    assert bits_equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_have_an_m_in_float32(dtype):
    w = start((5, 3, 3, 3), dtype)
    base = torch.optim.SGD([w], lr=0.1)
    optimizer, seen = FOP(base, 0.05), seen_by(base, w)
    train(optimizer, [w], 1)
    last = w.grad
    train(optimizer, [w], 1, first=1)
    own = optimizer.own[w]
    assert own["previous_grad"].dtype == seen[-1].dtype == dtype
    assert own["preconditioner"].dtype == torch.float32
    assert torch.equal(own["previous_grad"], w.grad)
    G, last = (g.double().reshape(15, 9).T for g in (w.grad, last))
    M = torch.eye(9, dtype=F64) + 0.05 * 0.1 * (G @ last.T + last @ G.T)
    torch.testing.assert_close(own["preconditioner"].double(), M, rtol=1e-5, atol=1e-5)
    expected = (M @ M.T @ G).T.reshape(5, 3, 3, 3)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(seen[-1].double(), expected, rtol=ulp, atol=1e-4)


def test_the_layout_in_memory_does_not_matter():
    a = start((4, 3, 3, 3), torch.float32)
    b = torch.nn.Parameter(a.detach().to(memory_format=torch.channels_last))
    base = precond.AdamW([b], lr=0.1)
    one, other, seen = FOP(precond.AdamW([a], lr=0.1), 0.05), FOP(base, 0.05), seen_by(base, b)
    for _ in range(3):
        a.grad = torch.randn(4, 3, 3, 3)
        b.grad = a.grad.to(memory_format=torch.channels_last)
        one.step()
        other.step()
        assert seen[-1].stride() == b.stride()
    torch.testing.assert_close(a, b)


def test_an_empty_parameter_is_left_alone():
    p = torch.nn.Parameter(torch.empty(0, 3))
    optimizer = FOP(torch.optim.SGD([p], lr=0.1), 0.05)
    for _ in range(3):
        p.grad = torch.empty(0, 3)
        optimizer.step()
    assert not optimizer.own


def test_only_an_elementwise_m_is_for_sharded_parameters(tmp_path):
    code = """
import itertools
whole, plain = torch.randn(5, 3), torch.nn.Parameter(torch.randn(5, 3))
def place(t, placement=Shard(0)):
    return distribute_tensor(t, mesh, [placement])
places = (("diagonal", Shard(0)), ("output", Replicate()), ("diagonal", Replicate()))
previous = {"gradient": "previous_grad", "direction": "previous_step"}
for (mode, placement), compose in itertools.product(places, previous):
    a, b = torch.nn.Parameter(whole.clone()), torch.nn.Parameter(place(whole.clone(), placement))
    one, other = (precond.FOP(torch.optim.SGD([p], lr=0.1), 0.5, mode, normalize=None, compose=compose) for p in (a, b))
    for _ in range(4):
        a.grad = torch.randn(5, 3)
        b.grad = place(a.grad.clone(), placement)
        if not placement.is_shard():
            b.grad = DTensor.from_local(a.grad / 2, mesh, [Partial()])
        one.step()
        other.step()
    assert torch.equal(a, b.full_tensor()), mode
    assert other.own[b][previous[compose]].placements == b.placements
for mode, normalize in (("output", None), ("diagonal", "step")):
    p = torch.nn.Parameter(place(whole))
    p.grad = place(torch.ones(5, 3))
    try:
        precond.FOP(torch.optim.SGD([p], lr=0.1), 0.05, mode, normalize=normalize).step()
        raise AssertionError(mode)
    except RuntimeError as error:
        assert "parameter 0 of group 0 is sharded and must have mode='diagonal' and normalize=None" in str(error)
"""
    on_two_ranks(code, tmp_path)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(hyper_lr=-1.0), r"hypergradient learning rate: -1.0 \(hyper_lr must be >= 0\)"),
        (dict(hyper_lr=math.nan), "hyper_lr must be >= 0"),
        (dict(mode="rows"), "mode must be one of .*'spatial'.*, got 'rows'"),
        (dict(normalize="norm"), "normalize must be None or of .*'hypergradient'.*, got 'norm'"),
        (dict(normalize=["step", "rows"]), "got 'rows'"),
        (dict(max_norm=1.0), "max_norm must be finite and > 1, .* got 1.0"),
        (dict(max_norm=math.nan), "max_norm must be finite"),
        (dict(max_norm=math.inf), "max_norm must be finite"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        FOP(torch.optim.SGD([start((2, 2))], lr=0.1), **dict(hyper_lr=0.1) | arguments)


def test_a_base_is_an_optimizer_with_a_learning_rate():
    with pytest.raises(TypeError, match=r"base must be a torch\.optim\.Optimizer, got list"):
        FOP([start((2, 2))], 0.1)
    base = torch.optim.SGD([start((2, 2))], lr=0.1)
    del base.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="base must have an lr in each of its groups, got SGD"):
        FOP(base, 0.1)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_gradients_without_a_rule_are_named_before_anything_moves(kind):
    first = start((4, 3), torch.float32)
    p = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.complex64 if kind == "complex" else torch.float32))
    optimizer = FOP(torch.optim.SGD([first, p], lr=0.1), 0.1)
    first.grad = torch.ones(4, 3)
    p.grad = torch.ones_like(p) if kind == "complex" else torch.eye(4, 3).to_sparse()
    with pytest.raises(
        RuntimeError, match=rf"gradient of parameter \d of group 0 must be dense and real for FOP, got .*{kind}"
    ):
        optimizer.step()
    assert not optimizer.own
    assert bits_equal(first, start((4, 3), torch.float32))


def test_a_checkpoint_of_another_mode_is_named():
    a, b = start((4, 3)), start((4, 3))
    one, other = (FOP(torch.optim.SGD([p], lr=0.1), 0.1, mode) for p, mode in ((a, "input"), (b, "output")))
    train(one, [a], 2)
    other.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match=r"M of parameter 0 of group 0 must have shape \(4, 4\) .*got \(3, 3\)"):
        train(other, [b], 1)
