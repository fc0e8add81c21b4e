"""Accelerate's loop: prepare, accumulate, clip, save_state and load_state."""

from __future__ import annotations

import pytest
import torch
from support.methods import ALL, ELEMENTWISE
from support.training import model

import precond

METHODS = [method for method in ALL if method.dtype == torch.float32]


@pytest.fixture(scope="module")
def accelerate(library):
    return library("accelerate")


def train(accelerate, method, make, *, start=0, stop=3, load=None, save=None, mixed_precision="no", clip=True):
    """The weights after epochs ``start`` to ``stop``, each of two steps of two micro-batches."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed_precision)
    net = model(0 if load is None else 99)
    optimizer = make(net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))
    generator = torch.Generator().manual_seed(5)
    data = list(zip(torch.randn(16, 5, generator=generator), torch.randn(16, 3, generator=generator), strict=True))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    net, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, loader, scheduler)
    if load is not None:
        accelerator.load_state(str(load))
    for _ in range(start, stop):
        for x, y in loader:
            with accelerator.accumulate(net):

                def closure(x=x, y=y):
                    optimizer.zero_grad()
                    loss = (net(x) - y).square().mean()
                    accelerator.backward(loss)
                    return loss

                if method.closure:
                    optimizer.step(closure)
                else:
                    accelerator.backward((net(x) - y).square().mean())
                    if accelerator.sync_gradients and clip:
                        accelerator.clip_grad_norm_(net.parameters(), 0.3)
                    optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(str(save))
    return {name: p.detach().clone() for name, p in accelerator.unwrap_model(net).named_parameters()}


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("method", [method for method in ELEMENTWISE if method.stock], ids=str)
def test_a_drop_in_trains_like_torchs(accelerate, method, mixed_precision):
    ours, theirs = (
        train(accelerate, method, make, mixed_precision=mixed_precision) for make in (method.make, method.stock)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(accelerate, tmp_path, method):
    straight = train(accelerate, method, method.make)
    train(accelerate, method, method.make, stop=1, save=tmp_path / "state")
    resumed = train(accelerate, method, method.make, start=1, load=tmp_path / "state")
    assert all(value.isfinite().all() for value in straight.values())
    assert not [name for name, value in straight.items() if not torch.equal(value, resumed[name])]


@pytest.mark.parametrize("cls", [precond.ScheduleFreeAdamW, precond.ScheduleFreeSGD])
def test_the_modes_of_a_schedule_free_optimizer_go_through_the_wrapper_and_its_checkpoints(accelerate, tmp_path, cls):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)

    def prepared(seed):
        net = model(seed)
        return accelerator.prepare(net, cls(net.parameters(), lr=0.01))

    def step(net, optimizer, seed):
        optimizer.train()
        accelerator.backward(net(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def weights(net):
        return [p.detach().clone() for p in net.parameters()]

    net, optimizer = prepared(0)
    for seed in range(3):
        step(net, optimizer, seed)
    y = weights(net)
    optimizer.eval()
    assert not any(torch.equal(a, b) for a, b in zip(weights(net), y, strict=True))
    accelerator.save_state(str(tmp_path))
    optimizer.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(net), y, strict=True))
    step(net, optimizer, 3)
    accelerator.free_memory()
    other, resumed = prepared(99)
    accelerator.load_state(str(tmp_path))
    step(other, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights(net), weights(other), strict=True))
