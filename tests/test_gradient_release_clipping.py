"""Gradient release: clipping by the norm of the step before, or by one that another backward pass measures."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from support.cases import bits_equal
from support.methods import ALL
from support.ranks import on_two_ranks
from support.release_training import model_of
from support.released import STEPS, assert_same, backward, everything, train

import precond

pytestmark = pytest.mark.filterwarnings("ignore::precond.PrecisionWarning", "ignore::UserWarning")


def norm_of(net, kind=2.0) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.cat([p.grad.double().flatten() for p in net.parameters()]), kind)


@pytest.mark.parametrize("kind", [2.0, math.inf])
def test_the_norm_of_the_step_before_clips(kind):
    """As multiplying the gradients by hand; the first step, which has none before it, is not clipped."""
    limit = 0.05
    net, twin = model_of(0), model_of(0)
    options = dict(lr=0.1, momentum=0.9)
    optimizer = precond.SGD(net.parameters(), max_grad_norm=limit, norm_type=kind, **options)
    release = precond.release_gradients(net, optimizer, clip="previous")
    plain = precond.SGD(twin.parameters(), **options)
    before = None
    for step in range(STEPS):
        for group in (optimizer.param_groups[0], plain.param_groups[0]):
            group["lr"] = 0.1 / (1 + step)
        backward(net, step)
        optimizer.step()
        backward(twin, step)
        norm = norm_of(twin, kind)
        coef = 1.0 if before is None else min(1.0, limit / (before.item() + 1e-6))
        for p in twin.parameters():
            p.grad *= coef
        plain.step()
        plain.zero_grad()
        torch.testing.assert_close(optimizer.grad_norm.double(), norm)
        torch.testing.assert_close(optimizer.clip_coef.item(), coef)
        assert before is None or coef < 1
        before = norm
        if step == 1:  # a resumed run has the norm too
            kept = {name: copy.deepcopy(of.state_dict()) for name, of in dict(o=optimizer, r=release, n=net).items()}
    torch.testing.assert_close([*net.parameters()], [*twin.parameters()])
    resumed = model_of(1)
    optimizer = precond.SGD(resumed.parameters(), max_grad_norm=limit, norm_type=kind, **options)
    release = precond.release_gradients(resumed, optimizer, clip="previous")
    for name, of in dict(o=optimizer, r=release, n=resumed).items():
        of.load_state_dict(kept[name])
    for step in range(2, STEPS):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        train(resumed, optimizer, range(step, step + 1))
    assert all(bits_equal(p, q) for p, q in zip(resumed.parameters(), net.parameters(), strict=True))


def test_compiled_backward_passes_clip_as_others():
    runs = []
    for compiled in (False, True):
        net = model_of(0)
        optimizer = precond.SGD(net.parameters(), lr=0.1, max_grad_norm=0.05)
        precond.release_gradients(net, optimizer, clip="previous")
        for step in range(3):
            how = contextlib.nullcontext()
            if compiled:
                how = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
            with how:
                backward(net, step)
            assert all(p.grad is None for p in net.parameters())
            optimizer.step()
        assert optimizer.clip_coef.item() < 1
        runs.append([*net.parameters()])
    torch.testing.assert_close(*runs)


def test_the_norm_of_a_pass_that_an_exception_ended_clips_nothing():
    net = model_of(0)
    optimizer = precond.SGD(net.parameters(), lr=0.1, max_grad_norm=0.05)
    release = precond.release_gradients(net, optimizer, clip="previous")
    train(net, optimizer, range(2))
    whole = release.state_dict()["total"].clone()

    def fail(_):
        raise ValueError("in a hook")

    hook = next(net.parameters()).register_hook(fail)
    with pytest.raises(ValueError, match="in a hook"):
        backward(net, 2)
    hook.remove()
    optimizer.zero_grad()
    optimizer.step()
    assert 0 < optimizer.grad_norm.item() ** 2 < whole.item()  # of what was released
    assert torch.equal(release.state_dict()["total"], whole)
    hook = next(net.parameters()).register_hook(fail)
    with pytest.raises(ValueError, match="in a hook"), release.measure():
        backward(net, 2)
    hook.remove()
    backward(net, 3)
    optimizer.step()
    assert optimizer.clip_coef.item() == pytest.approx(0.05 / (whole.item() ** 0.5 + 1e-6))
    assert not torch.equal(release.state_dict()["total"], whole)


def test_a_step_within_the_pass_has_its_norm():
    net = model_of(0)
    optimizer = precond.SGD(net.parameters(), lr=0.1, max_grad_norm=0.05)
    precond.release_gradients(net, optimizer, clip="previous")
    for _ in range(2):
        x = torch.ones(4, 8, requires_grad=True)
        x.register_hook(lambda _: optimizer.step())
        net(x).square().mean().backward()
    assert optimizer.clip_coef.item() < 1


def test_ranks_clip_alike_where_an_exception_ended_the_pass_of_one(tmp_path):
    code = """
net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
optimizer = precond.SGD(net.parameters(), lr=0.1, max_grad_norm=0.05, norm_process_group=dist.group.WORLD)
release = precond.release_gradients(net, optimizer, clip="previous")
known = []
for step in range(3):
    def fail(_):
        raise ValueError
    hook = net[0].weight.register_hook(fail if (step, rank) == (1, 1) else lambda g: g)
    try:
        ((1 + 9 * step) * net(torch.ones(4, 8))).square().mean().backward()
    except ValueError:
        pass
    hook.remove()
    optimizer.zero_grad()
    optimizer.step()
    every = [torch.empty_like(release.state_dict()["total"]) for _ in range(ranks)]
    dist.all_gather(every, release.state_dict()["total"])
    assert torch.equal(*every), every
    known.append(every[0])
assert torch.equal(known[0], known[1]) and known[2] > known[1], known
"""
    on_two_ranks(code, tmp_path)


@pytest.mark.parametrize("clip", ["measure", "previous"])
@pytest.mark.parametrize("name", ["adamw", "muon", "grouped"])
def test_a_second_backward_pass_clips_as_the_step_does(name, clip):
    """It finds the step's own norm, in another order: the last bit may differ."""
    (method,) = [method for method in ALL if method.name == name]
    runs = []
    for released in (False, True):
        net = model_of(0)
        optimizer = method.make(net)
        optimizer._own["max_grad_norm"] = 0.05
        release = precond.release_gradients(net, optimizer, clip=clip) if released else None
        for step in range(STEPS):
            if release is not None:
                before = everything(net, optimizer)
                with release.measure():
                    backward(net, step)
                assert all(p.grad is None for p in net.parameters())
                assert_same(before, everything(net, optimizer))
            backward(net, step)
            optimizer.step()
            assert optimizer.clip_coef.item() < 1
            optimizer.zero_grad()
        runs.append((everything(net, optimizer), optimizer.grad_norm, optimizer.clip_coef))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-7)


def test_what_no_hook_sees_is_measured_too_and_others_keep_their_gradients():
    """A parameter that was frozen, a group that came later, and a second optimizer's head."""
    runs = []
    for released in (False, True):
        net = model_of(0)
        net[0].weight.requires_grad_(False)
        optimizer = precond.SGD([net[0].weight, *net[2].parameters()], lr=0.1, max_grad_norm=0.05)
        other = torch.optim.SGD(net[4].parameters(), lr=0.1)
        release = precond.release_gradients(net, optimizer, clip="measure") if released else None
        net[0].weight.requires_grad_(True)
        optimizer.add_param_group({"params": [net[0].bias]})
        for step in range(STEPS):
            for _ in range(2):  # the other optimizer steps every second time
                if release is not None:
                    with release.measure():
                        backward(net, step)
                backward(net, step)
                optimizer.step()
                optimizer.zero_grad()
            other.step()
            other.zero_grad()
        runs.append(everything(net, optimizer))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-7)


def test_a_norm_clips_the_step_that_it_was_measured_for_alone():
    net = model_of(0)
    optimizer = precond.SGD(net.parameters(), lr=0.1, max_grad_norm=0.05)
    release = precond.release_gradients(net, optimizer, clip="measure")
    with release.measure():
        backward(net, 0, 1e6)
    optimizer.zero_grad()
    optimizer.step()  # the batch is dropped
    with pytest.raises(RuntimeError, match="must come before each step's"):
        backward(net, 0)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="must have a backward pass inside"), release.measure():
        pass
    release.remove()
    release = precond.release_gradients(net, optimizer, clip="previous")
    train(net, optimizer, range(1))
    optimizer.step()  # without a gradient
    train(net, optimizer, range(1))
    assert optimizer.clip_coef < 1


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_measured_norm_that_is_not_finite_skips_or_raises(nonfinite):
    net = model_of(0)
    optimizer = precond.AdamW(net.parameters(), max_grad_norm=1.0, nonfinite=nonfinite)
    release = precond.release_gradients(net, optimizer, clip="measure")

    def step(factor):
        with release.measure():
            backward(net, 0, factor)
        backward(net, 0, factor)
        assert all(p.grad is None for p in net.parameters())
        optimizer.step()

    step(1.0)
    before = {name: t.clone() for name, t in everything(net, optimizer).items()}
    if nonfinite == "skip":
        step(math.inf)
        assert optimizer.skipped_steps == 1
    else:
        with pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped"):
            step(math.inf)
        optimizer.zero_grad()
    assert_same(before, everything(net, optimizer))
    step(1.0)
    assert optimizer.state[net[0].weight]["step"] == 2


@pytest.mark.parametrize("most", [1e-3, 0.0])
def test_a_clamp_of_elements_needs_no_norm(most):
    runs = []
    for released in (False, True):
        net = model_of(0)
        optimizer = precond.SGD(net.parameters(), lr=0.1, momentum=0.9, clip_grad_value=most)
        if released:
            precond.release_gradients(net, optimizer)
        train(net, optimizer)
        runs.append(everything(net, optimizer))
    assert_same(*runs)
