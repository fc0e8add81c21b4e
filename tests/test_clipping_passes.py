"""Clipping, loss scaling and skipped steps of methods whose step has several passes: as after torch's functions."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from support.cases import BACKEND, bits_equal
from support.multipass import BF16, F32, give, params_of

import precond

MATRICES = ((6, 10), (10, 6), (8, 8))
MIXED = (*MATRICES, (5,))
KRONECKER = dict(lr=0.01, clip=1.0, curvature="gradient", basis="kronecker", basis_frequency=2)


def dual(granularity, **options):
    return lambda ps, **settings: precond.DualDescent(ps, lr=0.1, granularity=granularity, **options, **settings)


def mixed(ps, **settings):
    """One pass for some groups, several for others: one norm over both."""
    groups = [{"params": ps[:2], "granularity": "entry", "momentum": 0.9}, {"params": ps[2:], "granularity": "unit"}]
    return precond.DualDescent(groups, lr=0.1, **settings)


def grouped(ps, **settings):
    groups = [
        dict(params=ps[:1], optimizer=precond.Muon, lr=0.1),
        dict(params=ps[1:2], optimizer=precond.SOAP, lr=0.1, precondition_frequency=2),
        dict(params=ps[2:], optimizer=precond.AdamW, lr=0.1),
    ]
    return precond.Grouped(groups, **settings)


METHODS = {
    "grouped": (grouped, MIXED),
    "muon": (lambda ps, **settings: precond.Muon(ps, lr=0.1, **settings), MATRICES),
    "soap": (lambda ps, **settings: precond.SOAP(ps, lr=0.1, precondition_frequency=2, **settings), MIXED),
    "gauss_newton": (lambda ps, **settings: precond.GaussNewton(ps, **KRONECKER, **settings), MIXED),
    "dual_global": (dual("global", kernel="asinh"), MIXED),
    "dual_unit_momentum": (dual("unit", kernel="asinh", momentum=0.9), MIXED),
    "dual_spectral": (dual("spectral", kernel="asinh"), MATRICES),
    "dual_mixed": (mixed, MIXED),
}
methods = pytest.mark.parametrize("method", METHODS)


def start(method, dtype=F32, **settings):
    make, shapes = METHODS[method]
    params = params_of(shapes, dtype)
    return params, make(params, **settings)


def snapshot(params, optimizer):
    """Parameters and states by name, as they are."""
    return copy.deepcopy([(p.detach(), dict(optimizer.state.get(p, {}))) for p in params])


def assert_unchanged(params, optimizer, before):
    for (p, state), (q, was) in zip(snapshot(params, optimizer), before, strict=True):
        assert bits_equal(p, q)
        # A device decides by itself, and what was made for the step stays: zeros.
        assert all(BACKEND == "cuda" and not state[name].any() for name in state.keys() - was.keys())
        for name, value in was.items():
            equal = torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value
            assert equal, name


@methods
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        dict(max_grad_norm=2.0),
        dict(max_grad_norm=0.5, norm_type=math.inf),
        dict(max_grad_norm=math.inf),
        dict(clip_grad_value=0.3),
    ],
    ids=["norm", "largest", "watched", "value"],
)
def test_it_steps_as_after_torchs_function(method, dtype, settings):
    """The same bits on gradients in float32 that are multiplied with torch's coefficient, or clamped, before the step."""
    ours, a = start(method, dtype, **settings)
    theirs, b = start(method, dtype)
    for q in theirs:
        q.grad_dtype = F32
    for i in range(4):
        give(ours, i, scale=1e-3 if i == 2 else 1.0)
        gradients = [p.grad.clone() for p in ours]
        a.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, gradients, strict=True))
        for q, g in zip(theirs, gradients, strict=True):
            q.grad = g.float().clone()
        if "clip_grad_value" in settings:
            torch.nn.utils.clip_grad_value_(theirs, 0.3)
        else:
            most = settings["max_grad_norm"]
            norm = torch.nn.utils.get_total_norm([q.grad for q in theirs], settings.get("norm_type", 2.0))
            assert a.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
            assert a.clip_coef.item() == pytest.approx(min(1.0, most / (norm.item() + 1e-6)), rel=1e-6)
            for q in theirs:
                q.grad *= a.clip_coef  # torch's, but for its last bit
        b.step()
    assert all(bits_equal(p.detach(), q.detach()) for p, q in zip(ours, theirs, strict=True))


@methods
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_skips_or_raises_and_changes_nothing(method, bad):
    for settled in (False, True):
        params, optimizer = start(method, max_grad_norm=1.0, nonfinite="skip")
        for i in range(2 if settled else 0):
            give(params, i)
            optimizer.step()
        before = snapshot(params, optimizer)
        give(params, 5)
        params[1].grad[0, 0] = bad
        optimizer.step()
        assert_unchanged(params, optimizer, before)
        assert optimizer.skipped_steps.item() == 1
        give(params, 6)
        optimizer.step()
        assert optimizer.skipped_steps.item() == 1
        assert all(torch.isfinite(p).all() for p in params)
    params, optimizer = start(method, max_grad_norm=1.0, nonfinite="raise")
    give(params, 0)
    params[1].grad[0, 0] = bad
    before = snapshot(params, optimizer)
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.step()
    assert_unchanged(params, optimizer, before)


@pytest.mark.parametrize("method", ["muon", "soap", "grouped", "gauss_newton", "dual_global", "dual_mixed"])
def test_a_loss_scaler_leaves_unscaling_and_skipping_to_the_step(method):
    ours, a = start(method, max_grad_norm=2.0, fused=True)
    theirs, b = start(method, max_grad_norm=2.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for i in range(4):
        give(ours, i)
        scaler.scale(torch.ones(()))
        for p in ours:
            p.grad.mul_(1024.0)
        if i == 1:
            ours[0].grad[0, 0] = math.inf
            before = snapshot(ours, a)
        scaler.step(a)
        if i == 1:
            assert_unchanged(ours, a, before)
            assert a.skipped_steps.item() == 1
            scaler.update(1024.0)
            continue
        scaler.update(1024.0)
        give(theirs, i)
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_a_step_without_gradients_has_a_norm_of_zero():
    params, optimizer = start("muon", max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == 0.0
    assert not any(optimizer.state.get(p) for p in params)


def test_a_complex_gradient_is_clamped_as_a_pair_of_numbers():
    runs = []
    for granularity in ("entry", "tensor"):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
        p.grad = torch.tensor([3 + 4j, 0.1j, -2])
        precond.DualDescent([p], lr=0.5, kernel="identity", granularity=granularity, clip_grad_value=1.0).step()
        runs.append(p.detach())
    torch.testing.assert_close(*runs)


@methods
def test_an_optimizer_is_freed_when_its_last_reference_goes(method):
    """With gigabytes of states, it must not wait for the collector of cycles."""
    params, optimizer = start(method, max_grad_norm=1.0)
    give(params, 0)
    optimizer.step()
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
