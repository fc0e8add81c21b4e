"""Gradient release on ranks of a gloo group, under FSDP2 and DistributedDataParallel."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import precond
from support.shards import Scenarios, line

SCENARIOS = Scenarios()
run = SCENARIOS.run
STEPS = 4


def model_of(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batch(step: int) -> torch.Tensor:
    """Every rank has its own."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def sharded(seed: int = 0) -> nn.Module:
    net = model_of(seed)
    for layer in (net[0], net[2], net[4]):
        fully_shard(layer, mesh=line())
    return fully_shard(net, mesh=line())


def replicated(seed: int = 0, **options: Any) -> nn.Module:
    return DistributedDataParallel(model_of(seed), **options)


def full(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()


def trained(
    make_model: Callable[[], nn.Module],
    make: Callable[[nn.Module], torch.optim.Optimizer],
    released: bool,
    *,
    passes: int = 1,
    last_alone: Callable[[nn.Module, bool], Any] | None = None,
    measured: bool = False,
    **options: Any,
) -> list[torch.Tensor]:
    """The weights, and the norms. ``last_alone``: tells the model whether a pass is the last one of its step."""
    net = make_model()
    optimizer = make(net)
    release = precond.release_gradients(net, optimizer, **options) if released else None
    norms = []
    for step in range(STEPS):
        for measuring in (True, False) if release is not None and measured else (False,):
            for each in range(passes):
                if last_alone is not None:
                    last_alone(net, each == passes - 1)
                loss = net(batch(passes * step + each)).square().mean()
                if measuring:
                    with release.measure():
                        loss.backward()
                else:
                    loss.backward()
        assert (release is not None) == all(p.grad is None for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.grad_norm is not None:
            norms.append(optimizer.grad_norm.clone())
    return [full(p.detach()) for p in net.parameters()], norms


def same(*runs: Any) -> None:
    (weights, _), *others = runs
    for other, _ in others:
        assert all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))


def adamw(net: nn.Module, **options: Any) -> precond.AdamW:
    return precond.AdamW(net.parameters(), lr=0.01, **options)


def both(make_model: Callable[[], nn.Module], make: Callable[[nn.Module], Any] = adamw, **options: Any) -> list[Any]:
    return [trained(make_model, make, released, **options) for released in (False, True)]


@SCENARIOS(2, 3)
def fsdp2() -> None:
    same(*both(sharded))
    same(*both(sharded, lambda net: adamw(net, max_update_rms=0.1, statistics=True)))


@SCENARIOS(2)
def fsdp2_accumulates() -> None:
    """Reducing in each pass, and in the last one alone."""
    same(
        trained(sharded, adamw, False, passes=2),
        trained(sharded, adamw, True, passes=2, accumulation_steps=2),
    )

    def last_alone(net: Any, last: bool) -> None:
        net.set_requires_gradient_sync(last)

    once = [trained(sharded, adamw, released, passes=2, last_alone=last_alone) for released in (False, True)]
    same(*once)


@SCENARIOS(2, 3)
def fsdp2_clips() -> None:
    """By the norm over all ranks, and by that of the step before."""

    def clipped(net: nn.Module) -> precond.AdamW:
        return precond.SGD(net.parameters(), lr=0.1, max_grad_norm=0.05)

    plain = trained(sharded, clipped, False)
    measured = trained(sharded, clipped, True, measured=True, clip="measure")
    torch.testing.assert_close(measured, plain, rtol=1e-5, atol=1e-7)
    before = trained(sharded, clipped, True, clip="previous")
    torch.testing.assert_close(before[1][0], plain[1][0])
    found = [torch.empty_like(t) for t in before[1] for _ in range(dist.get_world_size())]
    for i, norm in enumerate(before[1]):
        part = found[i * dist.get_world_size() : (i + 1) * dist.get_world_size()]
        dist.all_gather(part, norm)
        assert all(torch.equal(t, norm) for t in part)


@SCENARIOS(2)
def fsdp2_states_of_a_checkpoint_are_made_before_the_first_step() -> None:
    """torch.distributed.checkpoint asks for them by a step without a backward pass."""
    nets, runs = [sharded(), sharded()], []
    for net, asked in zip(nets, (False, True), strict=True):
        optimizer = adamw(net)
        precond.release_gradients(net, optimizer)
        if asked:
            get_optimizer_state_dict(net, optimizer)
        for step in range(STEPS):
            net(batch(step)).square().mean().backward()
            optimizer.step()
        runs.append(([full(p.detach()) for p in net.parameters()], []))
    same(*runs)


@SCENARIOS(2)
def fsdp2_refuses_matrices_on_shards() -> None:
    net = sharded()
    matrices = [p for p in net.parameters() if p.ndim == 2]
    for p in net.parameters():
        p.requires_grad_(p.ndim == 2)
    with pytest.raises(RuntimeError, match="of matrices on shards"):
        precond.release_gradients(net, precond.Muon(matrices))


@SCENARIOS(2, 3)
def ddp() -> None:
    for options in ({}, {"gradient_as_bucket_view": True}, {"bucket_cap_mb": 1e-4}, {"static_graph": True}):
        same(*both(lambda options=options: replicated(**options)))
    same(
        *both(
            replicated, lambda net: precond.Grouped.for_model(net, matrices=precond.Muon, rest=precond.AdamW, lr=0.01)
        )
    )


@SCENARIOS(2)
def ddp_accumulates_in_no_sync() -> None:
    def last_alone(net: Any, last: bool) -> None:
        net.require_backward_grad_sync = last

    same(*both(replicated, passes=3, last_alone=last_alone))


@SCENARIOS(2)
def ddp_clips() -> None:
    def clipped(net: nn.Module) -> precond.SGD:
        return precond.SGD(net.parameters(), lr=0.1, max_grad_norm=0.05)

    plain = trained(replicated, clipped, False)
    measured = trained(replicated, clipped, True, measured=True, clip="measure")
    torch.testing.assert_close(measured, plain, rtol=1e-5, atol=1e-7)


@SCENARIOS(2)
def ddp_takes_another_hook_and_leaves_other_parameters_alone() -> None:
    """Gradients that travel in float16; the last layer is of another optimizer."""
    runs = []
    for released in (False, True):
        net = replicated()
        hook = (dist.group.WORLD, fp16_compress_hook)
        head = [*net.module[4].parameters()]
        optimizer = precond.AdamW([*net.module[:3].parameters()], lr=0.01)
        other = torch.optim.SGD(head, lr=0.1)
        if released:
            release = precond.release_gradients(net, optimizer, comm_hook=hook)
        else:
            net.register_comm_hook(*hook)
        for step in range(STEPS):
            net(batch(step)).square().mean().backward()
            if released and step < 2:
                assert all((p.grad is None) == all(p is not q for q in head) for p in net.parameters())
            for each in (optimizer, other):
                each.step()
                each.zero_grad()
            if released and step == 1:
                release.remove()
        runs.append(([p.detach().clone() for p in net.parameters()], []))
    same(*runs)


@SCENARIOS(2)
def ddp_refuses_what_a_bucket_does_not_tell() -> None:
    for options, model, message in (
        ({}, {"find_unused_parameters": True}, "find_unused_parameters must be False"),
        ({"accumulation_steps": 2}, {}, "accumulation_steps must be 1"),
    ):
        net = replicated(**model)
        optimizer = adamw(net)
        with pytest.raises(ValueError, match=message):
            precond.release_gradients(net, optimizer, **options)
        assert optimizer._releases is None


@SCENARIOS(2)
def ddp_must_be_given_and_not_joined() -> None:
    net = replicated()
    optimizer = adamw(net.module)
    precond.release_gradients(net.module, optimizer)
    with pytest.raises(RuntimeError, match="model must be the DistributedDataParallel, or have it"):
        net(batch(0)).square().mean().backward()
    net = replicated()
    optimizer = adamw(net)
    release = precond.release_gradients(net, optimizer)
    with pytest.raises(RuntimeError, match=r"join\(\) must not be used"), net.join():
        net(batch(0)).square().mean().backward()
    release.remove()


@SCENARIOS(2)
def ddp_is_released_again_and_saved() -> None:
    """With the hook that DDP has for its life; a user's own must be given."""
    runs = []
    for released in (False, True):
        net = replicated()
        for _ in range(2):
            optimizer = adamw(net)
            release = precond.release_gradients(net, optimizer) if released else None
            for step in range(STEPS):
                net(batch(step)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            if release is not None:
                release.remove()
        runs.append(([p.detach().clone() for p in net.parameters()], []))
        pickle.loads(pickle.dumps([hook for hook, _ in net._comm_hooks]))
    same(*runs)
    optimizer = adamw(net)
    release = precond.release_gradients(net, optimizer)
    with pytest.raises(RuntimeError, match="one optimizer that releases its gradients"):
        precond.release_gradients(net, adamw(net))
    release.remove()
    net = replicated()
    net.register_comm_hook(None, fp16_compress_hook)
    with pytest.raises(RuntimeError, match="give yours as comm_hook="):
        precond.release_gradients(net, adamw(net))


@SCENARIOS(2)
def partial_gradients_are_placed_as_their_parameters() -> None:
    """Of the norms of sequence parallelism: the norm is that of whole gradients."""

    def make_model() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8))
        plan = {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1)), "2": RowwiseParallel()}
        return parallelize_module(net, line(), plan)

    def backward(net: nn.Module, step: int) -> None:
        x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()

    def clipped(net: nn.Module) -> precond.SGD:
        return precond.SGD(net.parameters(), lr=0.1, max_grad_norm=0.05)

    runs = []
    for released in (False, True):
        net = make_model()
        optimizer = clipped(net)
        release = precond.release_gradients(net, optimizer, clip="measure") if released else None
        for step in range(STEPS):
            if release is not None:
                with release.measure():
                    backward(net, step)
            backward(net, step)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(([full(p.detach()) for p in net.parameters()], optimizer.grad_norm))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-7)
