"""P P^T as an optimizer gives it: what its step multiplied the gradient with, for every class that has one."""

from __future__ import annotations

import families
import pytest
import torch

import precond
from precond import diagnostics
from precond._core.optimizer import FusedOptimizer
from precond.diagnostics.preconditioner import maps_of

pytest.importorskip("scipy")
F64, LR = torch.float64, 1e-3
SHAPES = ((4, 6), (24,))


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=F64))[0]


#: Without momentum and decay, so that a step is lr times P P^T g.
_GN = dict(betas=(0.0, 0.9), eps=1e-3)
MOVES = [
    *families.MOVES,
    *(
        (precond.GaussNewton, _GN | dict(curvature=curvature, power=power, basis=basis, clip=1e9))
        for curvature in ("gradient", "gnb", "hutchinson")
        for power, basis in ((-1.0, "identity"), (-0.5, "identity"), (-1.0, "kronecker"), (-0.5, "kronecker"))
    ),
    (precond.GaussNewton, _GN | dict(curvature="gradient", basis=orthogonal(24))),
    (precond.GaussNewton, _GN | dict(curvature="gradient", basis=(orthogonal(4), orthogonal(6)))),
    (precond.GaussNewton, _GN | dict(curvature="gradient", basis="kronecker", max_size=4, basis_frequency=2)),
    (precond.Sophia, dict(betas=(0.0, 0.9), rho=1e2, weight_decay=0.0)),
    (precond.SOAP, dict(betas=(0.0, 0.9), eps=1e-3, relative_eps=0.0, weight_decay=0.0, precondition_frequency=100)),
    (precond.DualDescent, dict(kernel="identity", granularity="entry")),
    (precond.Grouped, dict(optimizer=precond.AdamW, betas=(0.0, 0.9), eps=1e-3, weight_decay=0.0)),
    *(
        (getattr(torch.optim, cls.__name__), options)
        for cls, options in families.MOVES
        if hasattr(torch.optim, cls.__name__)
    ),
]
#: And what formats lose.
SHORT = [
    (precond.AdamW, dict(betas=(0.0, 0.9), eps=1e-3, weight_decay=0.0, state_format="int8"), 0.01),
    (precond.RMSpropW, dict(alpha=0.9, weight_decay=0.0, state_format="bf16"), 0.004),
    (precond.GaussNewton, _GN | dict(curvature="gradient", power=-0.5, state_format="int8"), 0.01),
    (precond.GaussNewton, _GN | dict(state_format="int8"), 1e-6),
    (precond.GaussNewton, _GN | dict(curvature="gradient", basis="kronecker", state_format="bf16"), 0.006),
    (precond.Sophia, dict(betas=(0.0, 0.9), rho=1e2, weight_decay=0.0, state_format="fp16"), 1e-5),
    (precond.SOAP, dict(betas=(0.0, 0.9), relative_eps=0.0, weight_decay=0.0, state_format="bf16"), 0.006),
]
#: Those whose last step has already changed what P is made of besides a second moment: P P^T is that of the next step.
NEXT = [(precond.SGD, {}), *families.NEXT]
NONE = {cls: {} for cls in (precond.Lion, precond.Muon, precond.DualDescent)}


def moved_and_predicted(cls, options, shapes, dtype):
    """The last of seven steps over lr, and P P^T times its gradient, both flat."""
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    optimizer = cls(params, lr=LR, **options)
    curvature = optimizer.param_groups[0].get("curvature")
    for i in range(7):
        gradients = [torch.randn(p.shape, dtype=F64).to(dtype) for p in params]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        if curvature == "gnb" and i < 6:
            optimizer.update_curvature(batch_size=3)
        elif curvature == "hutchinson" and i > 0:  # the first step makes the basis that estimates are in
            optimizer.update_curvature(estimates=[torch.rand_like(p) for p in params])
        before = [p.detach().clone() for p in params]
        optimizer.step()
    into, out_of = maps_of(optimizer, params)
    moved = [(b - p.detach()) / LR for b, p in zip(before, params, strict=True)]
    return (torch.cat([t.reshape(-1) for t in ts]) for ts in (moved, into(list(out_of(gradients)))))


def shapes_of(options):
    basis = options.get("basis")
    return SHAPES[:1] if isinstance(basis, tuple) else SHAPES


@pytest.mark.parametrize(
    ("cls", "options"), MOVES, ids=lambda o: f"{o.__module__}.{o.__name__}" if isinstance(o, type) else None
)
def test_a_step_is_p_p_transposed_times_the_gradient(cls, options):
    moved, predicted = moved_and_predicted(cls, options, shapes_of(options), F64)
    assert moved.norm() > 0
    torch.testing.assert_close(moved, predicted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("cls", "options"), NEXT, ids=lambda o: o.__name__ if isinstance(o, type) else None)
def test_the_next_step_is_p_p_transposed_times_a_gradient_of_the_size_so_far(cls, options):
    torch.manual_seed(1)
    p = torch.nn.Parameter(torch.zeros(24, dtype=F64))
    optimizer = cls([p], lr=LR, **options)
    for _ in range(3):
        p.grad = torch.randn(24, dtype=F64)
        optimizer.step()
    into, out_of = maps_of(optimizer, [p])
    # A mean of squares stays what it is if the gradient is its root.
    p.grad = optimizer.state[p].get("square_avg", p.grad.square()).sqrt()
    (predicted,), before = into(list(out_of([p.grad]))), p.detach().clone()
    optimizer.step()
    torch.testing.assert_close((before - p.detach()) / LR, predicted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("cls", "options", "error"), SHORT, ids=lambda o: o.__name__ if isinstance(o, type) else None)
def test_short_states_are_decoded_first(cls, options, error):
    moved, predicted = moved_and_predicted(cls, options, ((64, 64),), torch.float32)
    assert moved.norm() > 0
    assert (moved - predicted).norm() <= error * moved.norm()


def test_every_optimizer_has_one_or_says_why_not():
    classes = {item for item in vars(precond).values() if isinstance(item, type) and issubclass(item, FusedOptimizer)}
    assert classes == {cls for cls, _ in [*MOVES, *NEXT] if issubclass(cls, FusedOptimizer)} | NONE.keys()
    for cls, options in NONE.items():
        p = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = cls([p], **options)
        with pytest.raises(TypeError, match=f"must have a preconditioner, got a {cls.__name__}: "):
            diagnostics.preconditioner_of(optimizer)
        with pytest.raises(TypeError, match=f"must have a preconditioner, got a {cls.__name__}: "):
            diagnostics.report(lambda p=p: (p**2).sum(), optimizer)
    wrapper = precond.FOP(precond.SGD([torch.nn.Parameter(torch.ones(2, 2))]), 0.1)
    for other in (wrapper, torch.optim.Adafactor([p]), torch.optim.LBFGS([p])):
        with pytest.raises(TypeError, match=f"drop-in for, got a {type(other).__name__}"):
            diagnostics.preconditioner_of(other)


def test_a_basis_is_no_diagonal_but_has_a_spectrum():
    """Gauss-Newton in the eigenbasis of a quadratic, with its eigenvalues for curvature, is Newton's method: P^T H P = 1."""
    u, values = orthogonal(8), torch.logspace(0, 4, 8, dtype=F64)
    h = (u * values) @ u.T
    w = torch.nn.Parameter(torch.ones(8, dtype=F64))
    optimizer = precond.GaussNewton([w], lr=0.0, eps=0.0, curvature="hutchinson", basis=u)
    with pytest.raises(ValueError, match="got none for 1 of 1: an optimizer has one after a step"):
        diagnostics.report(lambda: w @ h @ w / 2, optimizer)
    optimizer.update_curvature(estimates=[values])
    found = diagnostics.report(lambda: w @ h @ w / 2, optimizer)
    assert found["identity"].condition == pytest.approx(1e4, rel=1e-6)
    assert found["GaussNewton"].condition == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(TypeError, match="must have no basis to have a diagonal P, got a GaussNewton"):
        diagnostics.preconditioner_of(optimizer)


def points_of(optimizer, w, radius=0.1):
    """Where a gradient regulariser evaluates a closure in a step."""
    seen = []

    def closure():
        seen.append(w.detach().clone())
        w.grad = torch.ones_like(w)

    precond.GradientRegularizer(optimizer, rho=0.1, radius=radius).step(closure)
    return seen


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (precond.Adagrad, dict(initial_accumulator_value=0.1)),
        (precond.GaussNewton, dict(clip=1.0)),
        (precond.Sophia, {}),
    ],
)
def test_before_there_is_a_preconditioner_nothing_is_moved_along_it(cls, options):
    """An accumulator that nothing was added to, and a curvature that was never estimated: g / eps would be a leap."""
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([w], lr=1e-3, **options)
    for step in range(3):
        assert len(points_of(optimizer, w)) == (2 if cls is precond.Adagrad and step > 0 else 1)
    if cls is not precond.Adagrad:
        optimizer.update_curvature()
        first, second = points_of(optimizer, w)
        assert (second > first).all()


@pytest.mark.parametrize("power", [-1.0, -0.5])
def test_coordinates_without_curvature_are_not_moved(power):
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = precond.GaussNewton([w], lr=1e-3, curvature="gradient", power=power)
    w.grad = torch.tensor([1.0, 0.0, -1.0])
    optimizer.step()
    first, second = points_of(optimizer, w)
    assert ((second - first).abs() > 0.01).tolist() == [True, False, True]
    assert second[1] == first[1]


def test_states_made_before_the_first_step_are_no_preconditioner():
    """torch.distributed.checkpoint makes them by a step at lr 0 that does not count: there is no correction to divide by."""
    w = torch.nn.Parameter(torch.ones(3))
    for cls, options in ((precond.AdamW, {}), (precond.GaussNewton, dict(curvature="gradient"))):
        base = cls([w], lr=0.0, **options)
        w.grad = torch.zeros(3)
        base.step()
        assert float(base.state[w]["step"]) == 0
        assert diagnostics.preconditioner_of(base) == {}
        assert len(points_of(base, w)) == 1
