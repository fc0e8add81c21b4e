"""Methods of several passes: gradients of another dtype, and what a user drops is freed."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from support.cases import bits_equal

import precond
from precond._core.passes import Job, Pass, plain_step

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

METHODS = {
    "Muon": functools.partial(precond.Muon, lr=0.1),
    "Muon with codes": functools.partial(precond.Muon, state_format="int8"),
    "SOAP": functools.partial(precond.SOAP, lr=0.1, precondition_frequency=2),
    "SOAP L1": functools.partial(precond.SOAP, lr=0.1, l1_decay=0.01, max_precond_dim=3),
    "GaussNewton": functools.partial(
        precond.GaussNewton, lr=0.1, basis="kronecker", curvature="gradient", basis_frequency=2
    ),
    "GaussNewton gnb": functools.partial(precond.GaussNewton, lr=0.1, basis="kronecker", clip=1.0),
    **{
        f"DualDescent {granularity} {momentum}": functools.partial(
            precond.DualDescent, lr=0.1, granularity=granularity, momentum=momentum
        )
        for granularity in precond.dual.GRANULARITIES
        for momentum in (0.0, 0.9)
    },
}
methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def values(seed, dtype, shape=(6, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def step_on(optimizer, p, g):
    p.grad_dtype = None
    p.grad = g
    if isinstance(optimizer, precond.GaussNewton) and optimizer.param_groups[0]["curvature"] == "gnb":
        optimizer.update_curvature()
    optimizer.step()


@methods
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("of_gradient", [F32, F64, BF16, F16])
def test_gradients_of_another_dtype_give_the_same_steps(make, dtype, of_gradient):
    """On numbers that both dtypes have, up to the rounding of means in float64."""
    runs = []
    for g_dtype in (dtype, of_gradient):
        p = torch.nn.Parameter(values(0, BF16).to(dtype))
        optimizer = make([p])
        for i in range(5):
            # Few bits, in the range of float16: exact in all four dtypes.
            step_on(optimizer, p, values(1 + i, F64).mul(16).round().div(16).to(g_dtype))
        runs.append(p.detach().float())
    assert not torch.equal(runs[0], values(0, BF16).float())
    tolerance = 2e-2 if dtype in (BF16, F16) else 1e-4
    torch.testing.assert_close(*runs, rtol=tolerance, atol=tolerance)


@methods
def test_the_dtype_of_gradients_may_change(make):
    p = torch.nn.Parameter(values(0, F32))
    optimizer = make([p])
    for i, dtype in enumerate((F32, F64, BF16, F32, F16, F64)):
        step_on(optimizer, p, values(1 + i, dtype))
    assert p.isfinite().all()


@pytest.mark.parametrize("name", [name for name in METHODS if "entry" not in name and "codes" not in name])
def test_a_replaced_parameter_is_freed(name):
    make = METHODS[name]
    p = torch.nn.Parameter(values(0, BF16, (64, 64)))
    optimizer, olds = make([p]), []
    for i in range(3):
        step_on(optimizer, p, values(1 + i, BF16, (64, 64)))
        olds.append(weakref.ref(p))
        new = torch.nn.Parameter(p.detach().clone())
        if p in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(p)
        optimizer.param_groups[0]["params"][0] = p = new
        del new
    step_on(optimizer, p, values(9, BF16, (64, 64)))
    gc.collect()
    assert [old() is None for old in olds] == [True] * 3


@methods
def test_passes_hold_no_tensor_between_steps(make):
    """What Python holds; a compiled plan lets go by itself."""
    p = torch.nn.Parameter(values(0, F32))
    optimizer = make([p])
    for i in range(3):
        step_on(optimizer, p, values(1 + i, F32))
    held = weakref.ref(p.grad)
    buffers = [weakref.ref(t) for t in optimizer._buffers._held.values()]
    p.grad = None
    for each in [optimizer, *optimizer._passes.values()]:
        each.engine.forget_plans()
    gc.collect()
    assert held() is None
    optimizer.state.clear()
    optimizer.param_groups[0]["params"][:] = [torch.nn.Parameter(torch.zeros(2, 2))]  # without a gradient
    dropped = weakref.ref(p)
    del p
    gc.collect()
    assert dropped() is None
    optimizer.param_groups.clear()
    optimizer.step()
    gc.collect()
    assert all(buffer() is None for buffer in buffers)
    assert len(optimizer._buffers) == len(optimizer._counters) == 0


@torch.no_grad()
def test_a_pass_keeps_its_plan_for_the_same_tensors_alone():
    tensors = [torch.zeros(8) for _ in range(3)]
    run = Pass("sgdw", (), None)

    def jobs(of):
        return [Job(t, torch.ones(8), {}, plain_step(1.0, 0.0), name="x") for t in of]

    run.run(jobs(tensors))
    (plan,) = run.engine.plans.values()
    run.run(jobs(tensors))
    assert list(run.engine.plans.values()) == [plan]
    others = [torch.zeros(8) for _ in range(3)]
    run.run(jobs(others))
    assert all(bits_equal(t, torch.full((8,), -2.0)) for t in tensors)
    assert all(bits_equal(t, torch.full((8,), -1.0)) for t in others)
    with pytest.raises(RuntimeError, match="x must have a gradient of shape"):
        run.run([Job(tensors[0], torch.ones(7), {}, plain_step(1.0, 0.0), name="x")])
    assert run.squared_norms(jobs(tensors), [0, 0, 0])[0].item() == 24.0
