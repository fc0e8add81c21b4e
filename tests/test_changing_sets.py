"""Gradients that come and go: experts, stochastic depth, branches that a step does not use; and what is freed when its user
drops it.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from families import CLASSES
from support.cases import BACKEND, bits_equal

import precond
from precond._core.plan import StepPlan

classes = pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.cls.__name__)

#: Formats with all that lies beside a parameter and its states, on tensors that are large enough for codes.
FORMATS = {
    "plain": {},
    "bf16_split24_int8": {"weight_format": "split24", "state_format": "int8"},
    "bf16_stochastic_bf16": {"weight_format": "stochastic", "state_format": "bf16"},
}
formats = pytest.mark.parametrize("form", FORMATS)


def parameters(form, count=6):
    torch.manual_seed(0)
    dtype = torch.float32 if form == "plain" else torch.bfloat16
    shapes = [(64, 64) if form != "plain" and i % 2 == 0 else (3, 4 + i) for i in range(count)]
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give(params, step, chosen):
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = g if i in chosen else None


@pytest.fixture
def built(monkeypatch):
    """The plans that are built during a test."""
    plans = []
    build = StepPlan.__init__

    def counted(self, *args):
        plans.append(1)
        build(self, *args)

    monkeypatch.setattr(StepPlan, "__init__", counted)
    return plans


def same_states(a, b):
    for one, two in zip(a.state.values(), b.state.values(), strict=True):
        assert list(one) == list(two)
        for key, value in one.items():
            other = two[key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key


def check_twin(row, form, sets, settings, built):
    """Steps on sets of gradients have the bits of those that are planned anew. Returns how many plans they took."""
    ours, theirs = parameters(form), parameters(form)
    kwargs = {**row.kwargs, **FORMATS[form], **settings}
    a, b = row.cls(ours, **kwargs), row.cls(theirs, **kwargs)
    count = 0
    for step, chosen in enumerate(sets):
        give(ours, step, chosen)
        give(theirs, step, chosen)
        before = len(built)
        a.step()
        count += len(built) - before
        b.engine.forget_plans()
        b.step()
        assert all(bits_equal(p, q) for p, q in zip(ours, theirs, strict=True))
        same_states(a, b)
        if settings:
            assert bits_equal(a.grad_norm, b.grad_norm)
            assert bits_equal(a.clip_coef, b.clip_coef)
    return count


SETTINGS = {"no_norm": {}, "norm": {"max_grad_norm": 0.5}}


@formats
@classes
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_gradient_that_comes_or_goes_needs_no_new_plan(row, form, setting, built):
    sets = [range(6), {0, 1}, {2, 3, 4}, set(), {5}, {0, 5}, range(6), {1}]
    assert check_twin(row, form, sets, SETTINGS[setting], built) == 1


@formats
@classes
@pytest.mark.parametrize("setting", SETTINGS)
def test_first_gradients_one_after_another_need_no_new_plan(row, form, setting, built):
    """Norms too are added up in the order of the parameters, not in that of their first gradients."""
    sets = [{4}, {1}, {4, 5}, {0, 1, 2}, {3}, range(6), {2}]
    assert check_twin(row, form, sets, SETTINGS[setting], built) == 1


def test_an_optimizer_without_states_needs_one_plan(built):
    ours = parameters("plain")
    optimizer = precond.SGD(ours, lr=0.1)
    for step, chosen in enumerate(({2}, {0}, range(6), set())):
        give(ours, step, chosen)
        optimizer.step()
    assert len(built) == 1


def test_a_skipped_first_step_of_a_newcomer_leaves_nothing_behind():
    """The states that were made for it are taken back, and its first step is the next one."""
    ours, theirs = parameters("plain"), parameters("plain")
    a, b = (precond.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, backend="cpu", max_grad_norm=9.0, nonfinite="skip")
            for p in (ours, theirs))  # fmt: skip
    for step, chosen in enumerate(({1}, {1, 3}, {0, 1, 3})):
        if step == 1:
            give(ours, 99, chosen)
            ours[1].grad[0, 0] = torch.inf
            held = copy.deepcopy(a.state_dict())
            a.step()
            assert int(a.skipped_steps) == 1
            assert ours[3] not in a.state
            assert torch.equal(a.state_dict()["state"][1]["momentum_buffer"], held["state"][1]["momentum_buffer"])
        for params, optimizer in ((ours, a), (theirs, b)):
            give(params, step, chosen)
            optimizer.step()
    assert all(bits_equal(p, q) for p, q in zip(ours, theirs, strict=True))
    same_states(a, b)


def test_parameters_that_share_memory_must_not_be_updated_in_one_step():
    """Also where one of them joins a plan later, with its own memory or with a state that another one has."""
    whole = torch.randn(20)
    first, second, other = (torch.nn.Parameter(t) for t in (whole[:12], whole[8:], torch.randn(12)))
    optimizer = precond.AdamW([first, second, other], backend=BACKEND)
    for p in (first, other, second, other, first):
        for q in (first, second, other):
            q.grad = None
        p.grad = torch.randn_like(p)
        optimizer.step()
    for chosen in ((first, second), (other, first, second)):
        for p in chosen:
            p.grad = torch.randn_like(p)
        with pytest.raises(
            RuntimeError, match="parameter 0 of group 0 and parameter 1 of group 0 must not share memory"
        ):
            optimizer.step()

    first, second = (torch.nn.Parameter(torch.randn(12)) for _ in range(2))
    optimizer = precond.AdamW([first, second], backend=BACKEND)
    first.grad = torch.randn(12)
    optimizer.step()
    optimizer.state[second]["exp_avg"] = optimizer.state[first]["exp_avg"]
    second.grad = torch.randn(12)
    with pytest.raises(RuntimeError, match="exp_avg of parameter 0 of group 0 and exp_avg of parameter 1"):
        optimizer.step()


def test_interleaved_parameters_may_be_updated_in_one_step(built):
    flat = torch.randn(4, 6)
    ours = [torch.nn.Parameter(flat[:, i::2]) for i in range(2)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = (precond.AdamW(params, backend=BACKEND) for params in (ours, theirs))
    for step, chosen in enumerate(({0}, {1}, {0, 1})):
        for params, optimizer in ((ours, a), (theirs, b)):
            give(params, step, chosen)
            optimizer.step()
    assert all(bits_equal(p.contiguous(), q) for p, q in zip(ours, theirs, strict=True))


def test_an_error_of_a_parameter_waits_for_its_gradient():
    first, second = (torch.nn.Parameter(torch.randn(12)) for _ in range(2))
    optimizer = precond.AdamW([first, second], backend=BACKEND)
    first.grad, second.grad = torch.randn(12), torch.randn(12)
    optimizer.step()
    optimizer.state[second]["exp_avg"] = torch.zeros(5)
    second.grad = None
    optimizer.step()
    optimizer.engine.forget_plans()
    optimizer.step()
    second.grad = torch.randn(12)
    with pytest.raises(RuntimeError, match=r"exp_avg of parameter 1 of group 0 must have shape \(12,\)"):
        optimizer.step()


def test_a_changing_set_over_several_backends_and_groups():
    """float64 is for the reference text; its parameters come and go beside those of a compiled plan."""

    def groups():
        torch.manual_seed(0)
        dtypes = (torch.float32, torch.float64, torch.float32, torch.float64)
        params = [torch.nn.Parameter(torch.randn(5, dtype=dtype)) for dtype in dtypes]
        return params, [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]

    (ours, a_groups), (theirs, b_groups) = groups(), groups()
    a, b = (precond.AdamW(g, lr=0.01, max_grad_norm=0.3) for g in (a_groups, b_groups))
    for step, chosen in enumerate(({0, 1}, {2, 3}, {1}, {0, 2}, set(), {3, 0}, range(4))):
        for params, optimizer in ((ours, a), (theirs, b)):
            give(params, step, chosen)
            if optimizer is b:
                b.engine.forget_plans()
            optimizer.step()
        assert all(bits_equal(p, q) for p, q in zip(ours, theirs, strict=True))
        assert bits_equal(a.grad_norm, b.grad_norm)
    same_states(a, b)


# What a user drops is freed.

#: Methods of several passes, besides the table's classes, with what does not take codes.
METHODS = {
    "Muon": (precond.Muon, {}),
    "SOAP": (precond.SOAP, {}),
    "GaussNewton": (precond.GaussNewton, {"curvature": "gradient", "basis": "kronecker"}),
    "GaussNewton_flat": (precond.GaussNewton, {"curvature": "gradient"}),
    **{
        f"DualDescent_{of}": (precond.DualDescent, {"granularity": of, "momentum": 0.5})
        for of in ("global", "tensor", "unit", "entry", "spectral")
    },
}
MAKERS = {**{row.cls.__name__: (row.cls, row.kwargs) for row in CLASSES}, **METHODS}
IN_A_BASIS = ("SOAP", "GaussNewton")
cases = pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for form in FORMATS for name in MAKERS if not (name in IN_A_BASIS and "int8" in form)],
)


def make(name, params, form, **settings):
    cls, kwargs = MAKERS[name]
    return cls(params, **kwargs, **FORMATS[form], **settings)


def trained(name, form, **settings):
    params = parameters(form, 4)
    optimizer = make(name, params[:3], form, **settings)
    optimizer.add_param_group({"params": [params.pop()]})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(3):
        give(params, step, range(4) if step else {0, 3})
        optimizer.step()
    return optimizer


def alive(references):
    if any(reference() is not None for reference in references):
        gc.collect()
    return sum(reference() is not None for reference in references)


@cases
def test_gradients_are_freed_when_they_are_dropped(name, form):
    optimizer = trained(name, form)
    gradients = [weakref.ref(p.grad) for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    assert alive(gradients) == 0


@cases
def test_parameters_and_states_are_freed_when_they_are_replaced(name, form):
    """Before the next step, and whether their states go on with the new ones or not."""
    optimizer = trained(name, form)
    dropped = []
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.nn.Parameter(p.detach().clone())
            state = optimizer.state.pop(p)
            dropped += [weakref.ref(p), weakref.ref(p.grad)]
            if i % 2 == 0:
                optimizer.state[group["params"][i]] = {
                    key: t.clone() if isinstance(t, torch.Tensor) else t for key, t in state.items()
                }
            dropped += [weakref.ref(t) for t in state.values() if isinstance(t, torch.Tensor)]
    del group, p, state
    assert alive(dropped) == 0
    params = [p for group in optimizer.param_groups for p in group["params"]]
    give(params, 3, range(4))
    optimizer.step()


@cases
def test_a_group_is_freed_when_it_is_dropped(name, form):
    optimizer = trained(name, form)
    group = optimizer.param_groups.pop(0)
    dropped = [weakref.ref(t) for p in group["params"] for t in (p, p.grad)]
    for p in group["params"]:
        dropped += [weakref.ref(t) for t in optimizer.state.pop(p).values() if isinstance(t, torch.Tensor)]
    del group, p
    assert alive(dropped) == 0


@classes
def test_gradients_of_a_step_that_changed_nothing_are_freed(row):
    for nonfinite in ("skip", "raise"):
        params = parameters("plain", 3)
        optimizer = row.cls(params, **row.kwargs, backend="cpu", max_grad_norm=1.0, nonfinite=nonfinite)
        for chosen in (set(), {0, 1}, {0, 1, 2}):
            give(params, 0, chosen)
            optimizer.step()
            give(params, 0, chosen)
            for i in chosen:
                params[i].grad.fill_(torch.nan)
            if nonfinite == "skip" or not chosen:
                optimizer.step()
            else:
                with pytest.raises(RuntimeError, match="non-finite"):
                    optimizer.step()
            gradients = [weakref.ref(params[i].grad) for i in chosen]
            optimizer.zero_grad()
            assert alive(gradients) == 0
        give(params, 0, {0, 1})
        params[2].grad = torch.randn(3, 6).to_sparse()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
        gradients = [weakref.ref(p.grad) for p in params]
        optimizer.zero_grad()
        assert alive(gradients) == 0


def test_gradients_of_a_wrapped_optimizer_are_freed():
    net = torch.nn.Linear(4, 4)
    optimizer = precond.GradientRegularizer(precond.AdamW(net.parameters()), rho=0.1, radius=0.1)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    dropped = [weakref.ref(p.grad) for p in net.parameters()]
    optimizer.zero_grad()
    assert alive(dropped) == 0


@formats
@classes
def test_states_that_were_deleted_are_made_anew_where_another_parameter_joins(row, form):
    """A plan that takes in a newcomer has the other states' addresses: those of a deleted one may be somebody else's by now."""
    ours, theirs = parameters(form), parameters(form)
    a, b = (row.cls(params, **row.kwargs, **FORMATS[form]) for params in (ours, theirs))
    for step, chosen in enumerate(({0, 1, 2}, {0, 1, 2}, {0, 2, 3}, {0, 1, 3, 4})):
        for optimizer, params in ((a, ours), (b, theirs)):
            give(params, step, chosen)
            if step > 1:
                optimizer.state.pop(params[0], None)
        b.engine.forget_plans()
        kept = [torch.zeros_like(p) for p in ours for _ in range(3)]
        a.step()
        b.step()
        assert not any(t.any() for t in kept)
        assert all(bits_equal(p, q) for p, q in zip(ours, theirs, strict=True))
        same_states(a, b)


@pytest.mark.parametrize("weight_format", ["stochastic", "split24", "split32"])
def test_a_weight_format_may_come_to_a_parameter_that_has_no_gradient(weight_format):
    """It gets what stands beside it when it has one."""
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = precond.AdamW([p, q])
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    optimizer.param_groups[0]["weight_format"] = weight_format
    q.grad = None
    optimizer.step()
    q.grad = torch.ones_like(q)
    optimizer.step()
    assert optimizer.state[p].keys() == optimizer.state[q].keys()
    assert (optimizer.state[p]["step"].item(), optimizer.state[q]["step"].item()) == (3, 2)


@pytest.mark.parametrize("why", ["norm", "scaler"])
def test_a_skipped_first_step_and_then_a_newcomer_write_no_freed_state(why):
    """The skip takes the new states back; the plan still has their addresses when it takes in another parameter."""
    p, q = (torch.nn.Parameter(torch.ones(1000)) for _ in range(2))
    settings = {"max_grad_norm": 1.0, "nonfinite": "skip"} if why == "norm" else {"fused": True}
    optimizer = precond.AdamW([p, q], **settings)
    p.grad = torch.full((1000,), float("inf"))
    if why == "scaler":
        optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    kept = [torch.zeros(1000) for _ in range(8)]
    if why == "scaler":
        optimizer.found_inf = torch.tensor(0.0)
    p.grad, q.grad = torch.ones(1000), torch.ones(1000)
    optimizer.step()
    assert [optimizer.state[t]["step"].item() for t in (p, q)] == [1, 1]
    assert not any(t.any() for t in kept)
