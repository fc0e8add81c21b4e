"""Training that is saved by torch.distributed.checkpoint, in one process or as a rank of FSDP2: for tests/test_dcp.py."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from support.methods import ALL, Method

STEPS = 3


def model_of(method: Method, seed: int = 0) -> nn.Module:
    """Rows of 64 and 128, which codes are for; sizes that no mesh divides, and a bias of one element: some shards are empty."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 7), nn.Tanh(), nn.Linear(7, 1)]
    return nn.Sequential(*layers).to(method.dtype)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def data(method: Method, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 64, generator=generator).to(method.dtype)


def fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Each layer by itself, as FSDP2 is used."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def backward(method: Method, model: nn.Module, step: int) -> torch.Tensor:
    """The loss and its gradients; of a sharded model those of a whole one, since an average over ranks would round."""
    x = data(method, step)
    params = list(model.parameters())
    sharded = isinstance(params[0], DTensor)
    net = model
    if sharded:
        net = model_of(method)
        for p, q in zip(params, net.parameters(), strict=True):
            q.data.copy_(whole(p.detach()))
    loss = (net(x).float() - 1.0).square().mean()
    loss.backward()
    if sharded:
        for p, q in zip(params, net.parameters(), strict=True):
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
    return loss


def train(method: Method, model: nn.Module, optimizer: torch.optim.Optimizer, start: int) -> None:
    for step in range(start, start + STEPS):

        def closure(step=step):
            optimizer.zero_grad()
            return backward(method, model, step)

        if method.closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    optimizer.zero_grad()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.save(states, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
        options=options,
    )


def weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """And their averages, where there are some: as they are stored, and as they are shown."""
    found = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key in ("ema", "ema_scale"):
            if key in optimizer.state.get(p, {}):
                found[f"{name} {key}"] = whole(optimizer.state[p][key]).clone()
    if len(found) > len(list(model.parameters())):
        with optimizer.averaged():
            found |= {f"{name} shown": whole(p.detach()).clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            assert torch.equal(whole(p.detach()), found[name])
    return found


def straight(method: Method) -> dict[str, torch.Tensor]:
    """The weights of a run that is neither sharded nor interrupted."""
    model = model_of(method)
    optimizer = method.make(model)
    train(method, model, optimizer, 0)
    train(method, model, optimizer, STEPS)
    return weights(model, optimizer)


def on_mesh(method: Method, mesh: DeviceMesh, folder: Path, first: bool) -> dict[str, dict[str, torch.Tensor]]:
    """The first half of a sharded run, which saves itself both ways; or its second half from each."""
    found = {}
    for form in ("plain", "flat"):
        model = fsdp(model_of(method, seed=0 if first else 99), mesh)
        optimizer = method.make(model)
        if first:
            train(method, model, optimizer, 0)
            for name in ("plain", "flat"):
                save(model, optimizer, folder / f"{method}-{name}", name == "flat")
            return found
        load(model, optimizer, folder / f"{method}-{form}", form == "flat")
        train(method, model, optimizer, STEPS)
        found[form] = weights(model, optimizer)
    return found


def run(folder: str) -> None:
    """All methods on one mesh: on two ranks the first half, on any other number the second. A method's error is its result."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    results = {}
    for method in ALL:
        if not method.whole:
            try:
                results[str(method)] = on_mesh(method, mesh, Path(folder), first=ranks == 2)
            except BaseException:  # as CheckpointException is
                results[str(method)] = traceback.format_exc()
    if dist.get_rank() == 0:
        torch.save(results, f"{folder}/{ranks}.pt")
