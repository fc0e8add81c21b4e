"""FOP: docs/theory.md, D, against an explicit d x d preconditioner and autograd, and as an optimizer around others."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from support.cases import bits_equal
from support.ranks import on_two_ranks

import precond
from precond.fop import _norm_bounds

F64 = torch.float64
BASES = {
    "AdamW": lambda ps: precond.AdamW(ps, lr=0.02),
    "SGD": lambda ps: precond.SGD(ps, lr=0.02, weight_decay=0.1),
    "torch SGD": lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9),
    "torch Adam": lambda ps: torch.optim.Adam(ps, lr=0.02, weight_decay=0.1),
}
bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
# A shape, a mode, and what M mixes: rows before, rows mixed, rows behind in the flattened parameter; None: elementwise.
LAYOUTS = [
    ((5, 3), "output", (1, 5, 3)),
    ((5, 3), "input", (5, 3, 1)),
    ((5, 3), "spatial", (5, 3, 1)),
    ((4, 3, 2, 3), "output", (1, 4, 18)),
    ((4, 3, 2, 3), "input", (4, 3, 6)),
    ((4, 3, 2, 3), "spatial", (12, 6, 1)),
    ((4, 3, 5), "spatial", (12, 5, 1)),
    ((4, 3, 1, 1), "spatial", (4, 3, 1)),
    ((4, 1, 3, 3), "input", (4, 1, 9)),
    ((4, 3), "diagonal", None),
    ((7,), "output", None),
    ((), "spatial", None),
]
layouts = pytest.mark.parametrize(("shape", "mode", "around"), LAYOUTS, ids=lambda of: str(of))
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


def explicit(M, around):
    """M as it acts on the flattened parameter: d x d."""
    if around is None:
        return torch.diag(M.flatten())
    before, _, behind = around
    eye = torch.eye(before, dtype=M.dtype), torch.eye(behind, dtype=M.dtype)
    return torch.kron(torch.kron(eye[0], M), eye[1])


def loss_of(shape, seed=0):
    """A smooth function of a parameter, with every derivative."""
    d = math.prod(shape)
    features = torch.randn(2 * d + 3, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return lambda w: (features @ w.flatten() - 1.0).cosh().log().sum() / d + 0.1 * (w**4).sum()


def start(shape, dtype=F64, seed=1):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype))


def seen_by(base, p):
    """The gradients that a base steps on."""
    seen = []
    base.register_step_pre_hook(lambda *_: seen.append(p.grad.clone()))
    return seen


def train(optimizer, params, steps, seed=0, first=0):
    """Steps on random gradients, which depend on the step only."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 * seed + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def layers(dtype=torch.float32):
    return [start(shape, dtype) for shape in ((6, 4), (6,), (5, 3, 3, 3), (4, 3, 1, 1))]


# The formula.


@layouts
def test_m_moves_against_the_hypergradient_that_autograd_finds_through_the_step(shape, mode, around):
    w, loss, lr, rho = start(shape), loss_of(shape), 0.05, 0.6 / math.prod(shape)
    optimizer = precond.FOP(torch.optim.SGD([w], lr=lr), rho, mode)
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
    optimizer, seen = precond.FOP(base, 0.03, mode, normalize="hypergradient"), seen_by(base, w)
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
    optimizer, seen = precond.FOP(base, rho, mode, normalize=normalize), seen_by(base, w)
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
        optimizer = precond.FOP(torch.optim.SGD([w], lr=lr), 0.05, mode, normalize="hypergradient")
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
        optimizer = precond.FOP(torch.optim.SGD([w], lr=0.05, maximize=sign < 0), 0.2, "input")
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
    optimizer = precond.FOP(torch.optim.SGD([x], lr=lr), rho, "output", normalize=normalize)
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


@pytest.mark.parametrize("r", [1, 2, 9, 300])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_the_bound_of_the_norm_is_above_it_by_little(r, scale):
    noise = torch.randn(r, r)
    for M in (noise, noise[:, :1] @ noise[:1], torch.eye(r), torch.eye(r) + 3 * torch.outer(noise[0], noise[:, 0]) / r):
        norm = torch.linalg.matrix_norm(M.double() * scale, 2)
        assert norm * (1 - 1e-5) <= _norm_bounds((M * scale)[None]).squeeze() <= norm * r ** (1 / 32) * (1 + 1e-5)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, 1e30])
def test_what_is_no_preconditioner_has_no_norm(bad):
    assert not _norm_bounds(torch.full((1, 3, 3), bad)) <= math.inf


@pytest.mark.parametrize("mode", ["output", "diagonal"])
def test_m_grows_to_its_limit_and_no_further(mode):
    w = start((3, 4))
    optimizer = precond.FOP(torch.optim.SGD([w], lr=0.1), 0.1, mode, normalize="hypergradient", max_norm=3.0)
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
    optimizer = precond.FOP(base(a), 1e30, normalize=normalize, max_norm=1.5)
    train(optimizer, a, 4)
    train(base(b), b, 4)
    if normalize is None:  # the others may differ by a rounding of I G
        assert all(map(bits_equal, a, b))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalize", NORMALIZATIONS, ids=named)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_m_does_not_learn_from_what_is_not_finite(normalize, bad):
    w, b = start((3, 4)), start((4,))
    optimizer = precond.FOP(torch.optim.SGD([w, b], lr=0.1), 0.05, "input", normalize=normalize)
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
    optimizer = precond.FOP(torch.optim.SGD(params, lr=0.1), 0.05, normalize=normalize)
    train(optimizer, params, 3)
    before, Ms = copy.deepcopy(params), copy.deepcopy([optimizer.own[p]["preconditioner"] for p in params])
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(map(bits_equal, params, before))
    torch.testing.assert_close([optimizer.own[p]["preconditioner"] for p in params], Ms)


# An optimizer as any other.


@bases
@pytest.mark.parametrize("mode", ["spatial", "input", "output", "diagonal"])
def test_without_hyper_lr_it_is_the_base_bit_for_bit(base, mode):
    a, b = layers(), layers()
    optimizer, alone = precond.FOP(base(a), 0.0, mode, normalize="step"), base(b)
    train(optimizer, a, 5)
    train(alone, b, 5)
    assert all(map(bits_equal, a, b))
    assert not optimizer.own
    assert str(optimizer.state_dict()) == str(alone.state_dict())


@bases
@pytest.mark.parametrize("normalize", NORMALIZATIONS, ids=named)
def test_the_first_step_is_the_bases_and_the_third_is_not(base, normalize):
    a, b = layers(), layers()
    optimizer, alone = precond.FOP(base(a), 0.05, normalize=normalize), base(b)
    train(optimizer, a, 1)
    train(alone, b, 1)
    assert all(map(bits_equal, a, b))
    train(optimizer, a, 2, first=1)
    train(alone, b, 2, first=1)
    assert not any(map(bits_equal, a, b))


def test_hyper_lr_may_be_set_to_zero_to_keep_m_as_it_is():
    params = layers()
    optimizer = precond.FOP(torch.optim.SGD(params, lr=0.1), 0.05)
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
    optimizer = precond.FOP(base(a), 0.05, normalize=("matrix", "hypergradient"))
    train(optimizer, a, 3)
    if way == "state_dict":
        b, file = copy.deepcopy(a), io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = precond.FOP(base(b), 0.05, normalize=("matrix", "hypergradient"))
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
    optimizer = precond.FOP(torch.optim.SGD(params, lr=0.1), 0.05)
    train(optimizer, params, 2)
    states = optimizer.state_dict()["state"]
    assert [list(state) for state in states.values()] == [["fop_preconditioner", "fop_previous_grad"]] * 4
    assert [tuple(state["fop_preconditioner"].shape) for state in states.values()] == [(4, 4), (6,), (9, 9), (3, 3)]


def test_a_closure_is_evaluated_once_and_its_value_returned():
    a, b, loss = start((5, 3)), start((5, 3)), loss_of((5, 3))
    one, other = (precond.FOP(torch.optim.SGD([p], lr=0.05), 0.2, "input") for p in (a, b))
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
        optimizer = precond.FOP(torch.optim.SGD(groups, foreach=False), 0.03, "output")
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
    one, other = (precond.FOP(precond.SGD([p], lr=lr), 0.125) for p, lr in ((a, torch.tensor([0.5])), (b, 0.5)))
    train(one, [a], 3)
    train(other, [b], 3)
    assert bits_equal(a, b)


def test_a_grad_scaler_changes_nothing_and_skips_what_overflows():
    (a, *_), (b, *_) = layers(), layers()
    one, other = (precond.FOP(precond.AdamW([p], lr=0.1, fused=True), 0.05, "input") for p in (a, b))
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
    one, other = (precond.FOP(torch.optim.SGD([p], lr=0.1), 0.05) for p in (a, b))
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
    optimizer, seen = precond.FOP(base, 0.05), seen_by(base, w)
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
    one, other, seen = precond.FOP(precond.AdamW([a], lr=0.1), 0.05), precond.FOP(base, 0.05), seen_by(base, b)
    for _ in range(3):
        a.grad = torch.randn(4, 3, 3, 3)
        b.grad = a.grad.to(memory_format=torch.channels_last)
        one.step()
        other.step()
        assert seen[-1].stride() == b.stride()
    torch.testing.assert_close(a, b)


def test_an_empty_parameter_is_left_alone():
    p = torch.nn.Parameter(torch.empty(0, 3))
    optimizer = precond.FOP(torch.optim.SGD([p], lr=0.1), 0.05)
    for _ in range(3):
        p.grad = torch.empty(0, 3)
        optimizer.step()
    assert not optimizer.own


def test_only_an_elementwise_m_is_for_sharded_parameters(tmp_path):
    code = """
whole, plain = torch.randn(5, 3), torch.nn.Parameter(torch.randn(5, 3))
def place(t, placement=Shard(0)):
    return distribute_tensor(t, mesh, [placement])
for mode, placement in (("diagonal", Shard(0)), ("output", Replicate()), ("diagonal", Replicate())):
    a, b = torch.nn.Parameter(whole.clone()), torch.nn.Parameter(place(whole.clone(), placement))
    one, other = (precond.FOP(torch.optim.SGD([p], lr=0.1), 0.05, mode) for p in (a, b))
    for _ in range(4):
        a.grad = torch.randn(5, 3)
        b.grad = place(a.grad.clone(), placement)
        if not placement.is_shard():
            b.grad = DTensor.from_local(a.grad / 2, mesh, [Partial()])
        one.step()
        other.step()
    assert torch.equal(a, b.full_tensor()), mode
    assert other.own[b]["previous_grad"].placements == b.placements
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
        precond.FOP(torch.optim.SGD([start((2, 2))], lr=0.1), **dict(hyper_lr=0.1) | arguments)


def test_a_base_is_an_optimizer_with_a_learning_rate():
    with pytest.raises(TypeError, match=r"base must be a torch\.optim\.Optimizer, got list"):
        precond.FOP([start((2, 2))], 0.1)
    base = torch.optim.SGD([start((2, 2))], lr=0.1)
    del base.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="base must have an lr in each of its groups, got SGD"):
        precond.FOP(base, 0.1)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_gradients_without_a_rule_are_named_before_anything_moves(kind):
    first = start((4, 3), torch.float32)
    p = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.complex64 if kind == "complex" else torch.float32))
    optimizer = precond.FOP(torch.optim.SGD([first, p], lr=0.1), 0.1)
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
    one, other = (precond.FOP(torch.optim.SGD([p], lr=0.1), 0.1, mode) for p, mode in ((a, "input"), (b, "output")))
    train(one, [a], 2)
    other.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match=r"M of parameter 0 of group 0 must have shape \(4, 4\) .*got \(3, 3\)"):
        train(other, [b], 1)
