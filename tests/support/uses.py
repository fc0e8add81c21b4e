"""Every optimizer and wrapper as torch's own libraries use it, as a rank: FSDP2, ZeroRedundancyOptimizer, and
DistributedDataParallel with a loss scaler. For tests/test_uses.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from families import CLASSES
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from precond._core.settings import DEFAULTS
from support.dcp_training import STEPS, data, fsdp, model_of, weights
from support.methods import ALL, AROUND_STATES, Method, of_class
from support.shards import Scenarios, line, raises

scenario = Scenarios()
run = scenario.run
METHODS = [*ALL, *AROUND_STATES]
#: Classes that leave unscaling and skipping to their pass.
FUSED = [Method(f"{row}_fused", of_class(row.cls, **row.kwargs, fused=True)) for row in CLASSES]
#: Where a loss scaler first skips a step.
SKIPPED = 1


def loss_of(method: Method, net: nn.Module, step: int) -> torch.Tensor:
    return (net(data(method, step)).float() - 1.0).square().mean()


def train(
    method: Method, net: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0, skips: bool = False
) -> None:
    for step in range(STEPS):

        def closure(step=step):
            optimizer.zero_grad()
            loss = factor * loss_of(method, net, step)
            loss.backward()
            return loss

        if method.closure:
            optimizer.step(closure)
            continue
        if skips and step == SKIPPED:
            closure()
        closure()
        optimizer.step()


@functools.cache
def alone(method: Method, skips: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A run of one process; with a step that is not taken, of which layers have seen the inputs all the same."""
    model = model_of(method)
    optimizer = method.make(model)
    train(method, model, optimizer, skips=skips)
    return model, optimizer


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], exact: bool) -> None:
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    for name, value in expected.items():
        if exact:
            assert torch.equal(found[name], value), (name, (found[name].float() - value.float()).abs().max())
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def add(use: str, methods: list[Method], *ranks: int) -> Callable[[Callable[[Method], None]], None]:
    """A scenario for each method."""

    def each(function: Callable[[Method], None]) -> None:
        for method in methods:
            named = functools.partial(function, method)
            named.__name__ = f"{use}: {method}"
            scenario(*ranks)(named)

    return each


@add("FSDP2", METHODS, 2, 3)
def _fsdp2(method: Method) -> None:
    model = fsdp(model_of(method), line())
    if method.whole:
        said = "is sharded and must have mode='diagonal'" if method.name.startswith("fop") else "must be a plain tensor"
        raises(lambda: method.make(model), said)
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are added up, since a mean over three ranks rounds
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    optimizer = method.make(model)
    train(method, model, optimizer, factor=float(dist.get_rank() == 0))
    compare(weights(model, optimizer), weights(*alone(method)), method.exact)


#: What takes no share of the parameters.
REFUSED = {
    "dual_global": "granularity must not be 'global' inside ZeroRedundancyOptimizer",
    "gradient_regularizer": "base must be an optimizer of precond, got ZeroRedundancyOptimizer",
}


def shared(method: Method, model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer with the method's groups and settings, of which each rank steps some parameters; before it what wraps it."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns when it is imported

    optimizer = method.make(model)
    base = getattr(optimizer, "base", optimizer)
    settings = {} if not hasattr(base, "engine") else base.engine.settings
    given = {name: value for name, value in settings.items() if value != DEFAULTS[name]}
    if hasattr(optimizer, "remove"):
        optimizer.remove()  # its hooks
    zero = ZeroRedundancyOptimizer([dict(group) for group in base.param_groups], type(base), **given)
    return zero if method.wrap is None else method.wrap(model, zero), zero


@add("ZeroRedundancyOptimizer", METHODS, 2)
def _zero_redundancy(method: Method) -> None:
    model = model_of(method)
    if method.name in REFUSED:
        raises(lambda: shared(method, model), REFUSED[method.name])
        return
    optimizer, zero = shared(method, model)
    train(method, model, optimizer)
    whole, unshared = alone(method)
    if method.dtype != torch.float32:  # random bits go by a parameter's place among those of its rank
        for p, q, first in zip(model.parameters(), whole.parameters(), model_of(method).parameters(), strict=True):
            assert (p - q).abs().max() <= 0.05 * (q - first).abs().max()
        return
    compare(dict(model.named_parameters()), dict(whole.named_parameters()), method.exact)
    zero.consolidate_state_dict(0)
    if dist.get_rank() == 0:
        saved, expected = (each.state_dict()["state"] for each in (optimizer, unshared))
        assert saved.keys() == expected.keys()
        for number, state in expected.items():
            tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
            compare({name: saved[number][name] for name in tensors}, tensors, method.exact)


@add("DistributedDataParallel and GradScaler", [*METHODS, *FUSED], 2)
def _data_parallel(method: Method) -> None:
    model = model_of(method)
    optimizer = method.make(model)
    net = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    if method.closure:
        scaler.scale(loss_of(method, net, 0)).backward()
        raises(lambda: scaler.step(optimizer, closure=lambda: None), "Closure use is not currently supported")
        raises(lambda: scaler.step(optimizer), "GradientRegularizer.step needs a closure")
        return
    for step in range(STEPS):
        for skips in (True, False) if step == SKIPPED else (False,):
            optimizer.zero_grad()
            # What one rank cannot represent all ranks skip.
            factor = torch.inf if skips and dist.get_rank() == 1 else 1.0
            scaler.scale(loss_of(method, net, step) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 128.0
    compare(weights(model, optimizer), weights(*alone(method, skips=True)), exact=True)
