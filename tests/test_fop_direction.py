"""FOP with ``compose="direction"``: M of the step that a base takes, against autograd through that step, and around any base."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.cases import bits_equal
from support.fop import explicit, layers, layouts, loss_of, start, train

import precond

#: Bases with a step of their own, and their decay, which M leaves alone.
STEPS = {
    "momentum": (lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9), 0.0),
    "maximize": (lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9, maximize=True), 0.0),
    "Adam": (lambda ps: torch.optim.Adam(ps, lr=0.02, weight_decay=0.3), 0.0),
    "AdamW": (lambda ps: torch.optim.AdamW(ps, lr=0.02, weight_decay=0.5), 0.02 * 0.5),
    "precond AdamW": (lambda ps: precond.AdamW(ps, lr=0.02, weight_decay=0.5), 0.02 * 0.5),
    "scaled": (
        lambda ps: precond.AdamW([dict(params=ps, lr_scale=0.5, decay_scale=0.25)], lr=0.04, weight_decay=2.0),
        0.02 * 0.5,
    ),
    "independent": (
        lambda ps: precond.AdamW([dict(params=ps, decoupled="independent", lr_max=0.1)], lr=0.02, weight_decay=0.05),
        0.02 / 0.1 * 0.05,
    ),
}


@layouts
@pytest.mark.parametrize("base", STEPS)
def test_in_direction_m_is_applied_to_the_bases_step_and_its_hypergradient_is_exact(base, shape, mode, around):
    make, decay = STEPS[base]
    w, loss, rho = start(shape), loss_of(shape), 3.0 / max(math.prod(shape), 7)
    sign = -1.0 if base == "maximize" else 1.0
    twin = torch.nn.Parameter(w.detach().clone())
    optimizer, alone = precond.FOP(make([w]), rho, mode, normalize=None), make([twin])
    then = last = None
    for t in range(6):
        before, M = w.detach().clone(), copy.deepcopy(optimizer.own.get(w, {}).get("preconditioner"))
        optimizer.zero_grad()
        (sign * loss(w)).backward()
        # The same base at the same place: an elementwise step has no memory of the parameter.
        twin.grad = w.grad.clone()
        with torch.no_grad():
            twin.copy_(before)
        alone.step()
        optimizer.step()
        step = before * (1.0 - decay) - twin.detach()
        if t == 0:
            assert torch.equal(w, twin)
        else:
            new = optimizer.own[w]["preconditioner"]
            whole = explicit(new, around)
            there = before * (1.0 - decay) - (whole @ whole.T @ step.flatten()).reshape(shape)
            torch.testing.assert_close(w.detach(), there, rtol=1e-10, atol=1e-13)
            M.requires_grad_()
            whole = explicit(M, around)
            there = then * (1.0 - decay) - (whole @ whole.T @ last.flatten()).reshape(shape)
            torch.testing.assert_close(there.detach(), before, rtol=1e-10, atol=1e-13)
            (hypergradient,) = torch.autograd.grad(loss(there), M)
            moved = new - M.detach()
            assert moved.norm() > 1e-6
            assert (moved + rho * hypergradient).norm() <= 1e-8 * moved.norm()
        then, last = before, step
    assert (new - (torch.eye(len(new)) if around else 1.0)).norm() > 3e-3


def test_around_plain_sgd_both_compositions_are_one_method():
    a, b = layers(torch.float64), layers(torch.float64)
    one = precond.FOP(torch.optim.SGD(a, lr=0.1), 0.05, compose="gradient")
    other = precond.FOP(torch.optim.SGD(b, lr=0.1), 0.05)
    train(one, a, 6)
    train(other, b, 6)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("params", "make", "message"),
    [
        (
            [start((3, 2), torch.bfloat16)],
            lambda ps: torch.optim.SGD(ps, lr=0.1),
            "must be float32 or float64 with compose=",
        ),
        (
            [start((3, 2))],
            lambda ps: precond.AdamW(ps, l1_decay=0.1),
            "l1_decay must be off with compose='direction', got 0.1",
        ),
        ([start((3, 2))], lambda ps: precond.AdamW(ps, cautious="both"), "cautious must be off with compose="),
        (
            [start((3, 2))],
            lambda ps: precond.ScheduleFreeSGD(ps),
            "must keep no average of its own .*, got ScheduleFreeSGD",
        ),
    ],
    ids=lambda of: of if isinstance(of, str) else "",
)
def test_in_direction_a_base_whose_step_is_no_direction_raises(params, make, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        precond.FOP(make(params), 0.1)
    first = torch.optim.SGD([start((3, 2))], lr=0.1) if params[0].dtype == torch.bfloat16 else None
    if first is not None:
        optimizer = precond.FOP(first, 0.1)
        with pytest.raises(RuntimeError, match=message):
            optimizer.add_param_group({"params": params})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("compose", ["gradient", "direction"])
def test_a_checkpoint_of_the_other_composition_brings_its_m(compose):
    a, b = layers(), layers()
    other = "direction" if compose == "gradient" else "gradient"
    optimizer, resumed = (
        precond.FOP(torch.optim.SGD(ps, lr=0.1, momentum=0.9), 0.1, compose=of) for ps, of in ((a, other), (b, compose))
    )
    train(optimizer, a, 4)
    resumed.load_state_dict(optimizer.state_dict())
    train(resumed, b, 1, first=4)
    previous = {"gradient": "previous_grad", "direction": "previous_step"}[compose]
    for p, q in zip(a, b, strict=True):
        assert torch.equal(resumed.own[q]["preconditioner"], optimizer.own[p]["preconditioner"])
        assert set(resumed.own[q]) == {"preconditioner", previous}
    train(resumed, b, 1, first=5)
    for p, q in zip(a, b, strict=True):
        assert not torch.equal(resumed.own[q]["preconditioner"], optimizer.own[p]["preconditioner"])


class OfOthers(torch.optim.Optimizer):
    """Plain SGD with a coupled decay, which it adds to the gradient in place."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.02, "weight_decay": 0.5})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.add_(p, alpha=group["weight_decay"])
                p.sub_(group["lr"] * p.grad)


def made_and_run(make, steps=4, **options):
    params = layers(torch.float64)
    optimizer = precond.FOP(make(params), 0.05, **options)
    train(optimizer, params, steps)
    return params, optimizer


def test_in_direction_m_learns_from_the_gradient_that_base_was_given():
    """torch's foreach form of Nesterov's momentum adds the buffer to the gradient."""
    runs = [
        made_and_run(lambda ps, foreach=foreach: torch.optim.SGD(ps, 0.1, 0.9, nesterov=True, foreach=foreach))[0]
        for foreach in (True, False)
    ]
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_in_direction_a_skipped_step_moves_nothing():
    params = layers()
    optimizer = precond.FOP(precond.AdamW(params, lr=0.05, weight_decay=0.5, nonfinite="skip", max_grad_norm=1.0), 0.05)
    train(optimizer, params, 4)
    before = copy.deepcopy(params)
    Ms = [optimizer.own[p]["preconditioner"].clone() for p in params]
    for p in params:
        p.grad.fill_(math.nan)
    optimizer.step()
    for p, q, M in zip(params, before, Ms, strict=True):
        assert bits_equal(p, q)
        assert torch.equal(optimizer.own[p]["preconditioner"], M)
        assert not optimizer.own[p]["previous_step"].any()
    train(optimizer, params, 1, first=4)
    assert all(torch.equal(optimizer.own[p]["preconditioner"], M) for p, M in zip(params, Ms, strict=True))
    train(optimizer, params, 1, first=5)
    assert not any(torch.equal(optimizer.own[p]["preconditioner"], M) for p, M in zip(params, Ms, strict=True))


def test_in_direction_a_foreign_decay_is_asked_for():
    message = "decoupled_weight_decay must be True or False in the groups of OfOthers with compose='direction'"
    with pytest.raises(ValueError, match=message):
        precond.FOP(OfOthers(layers()), 0.05)

    def told(ps):
        return OfOthers([{"params": ps, "decoupled_weight_decay": False}])

    ours, _ = made_and_run(told)
    theirs, _ = made_and_run(lambda ps: torch.optim.SGD(ps, lr=0.02, weight_decay=0.5))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_in_direction_the_class_inside_a_sharding_optimizer_says_what_a_decay_is():
    class Around(torch.optim.AdamW):
        """As ZeroRedundancyOptimizer: the groups of all, and what steps is inside."""

        def __init__(self, params):
            self.optim = torch.optim.Adagrad(params, lr=0.02, weight_decay=0.5)
            super().__init__(params, lr=0.02, weight_decay=0.5)
            for group in self.param_groups:
                del group["decoupled_weight_decay"]

        def step(self, closure=None):
            self.optim.step()

    ours, _ = made_and_run(Around)
    theirs, _ = made_and_run(lambda ps: torch.optim.Adagrad(ps, lr=0.02, weight_decay=0.5))
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_in_direction_methods_of_groups_are_judged_one_by_one():
    def grouped(other):
        def make(ps):
            return precond.Grouped(
                [
                    {"params": ps[:1], "optimizer": precond.AdamW, "weight_decay": 0.1},
                    {"params": ps[1:], "optimizer": other},
                ]
            )

        return make

    params = layers()
    optimizer = precond.FOP(grouped(precond.SGD)(params), 0.05)
    train(optimizer, params, 3)
    assert len(optimizer.own) == len(params)
    with pytest.raises(ValueError, match=r"must keep no average .* got ScheduleFreeSGD"):
        precond.FOP(grouped(precond.ScheduleFreeSGD)(layers()), 0.05)
    with pytest.raises(ValueError, match=r"must keep no average .* got ASGD"):
        precond.FOP(torch.optim.ASGD(layers()), 0.05)


def test_in_direction_an_option_that_comes_later_raises_before_anything_moves():
    params, optimizer = made_and_run(lambda ps: precond.AdamW(ps))
    before = copy.deepcopy(params)
    for name, value in (("l1_decay", 50.0), ("ema_decay", 0.5), ("cautious", "both")):
        old = optimizer.param_groups[0].get(name)
        optimizer.param_groups[0][name] = value
        with pytest.raises(ValueError, match=f"{name} must be"):
            train(optimizer, params, 1)
        optimizer.param_groups[0][name] = old
    assert all(map(torch.equal, params, before))


def test_in_direction_a_minus_zero_stays_one_and_frozen_parameters_may_be_of_any_dtype():
    p, frozen = torch.nn.Parameter(torch.tensor([-0.0, 1.0])), torch.nn.Parameter(torch.ones(2).bfloat16(), False)
    optimizer = precond.FOP(torch.optim.AdamW([p, frozen], lr=torch.tensor([0.1]), weight_decay=0.1), 0.05)
    for _ in range(2):
        p.grad = torch.zeros(2)
        optimizer.step()
    assert p[0] == 0.0 and torch.signbit(p[0])  # noqa: PT018
    scalar = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = precond.FOP(torch.optim.AdamW([scalar], lr=torch.tensor([0.1]), weight_decay=0.1), 0.05)
    train(optimizer, [scalar], 3)
    assert scalar.isfinite()


def test_a_pickle_of_the_time_before_compositions_goes_on():
    params = layers()
    optimizer = precond.FOP(torch.optim.SGD(params, lr=0.1), 0.05, compose="gradient")
    train(optimizer, params, 2)
    old = {name: value for name, value in optimizer.__getstate__().items() if name != "compose"}
    new = precond.FOP.__new__(precond.FOP)
    new.__setstate__(old)
    train(new, params, 1, first=2)
    assert new.compose == "gradient"
