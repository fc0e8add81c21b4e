"""One rank of a small training run under FSDP2, for tests/test_formats_sharded.py: rank, ranks, a folder, then what to do."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import precond


def model_of(seed: int) -> nn.Module:
    """Rows of 64 and 128, which codes are for, of a number that no mesh divides; and one whose states stay float32."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 67), nn.Tanh(), nn.Linear(67, 64)).bfloat16()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """On gradients of an unsharded twin: averaging them over three ranks would round."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 64, generator=generator).bfloat16()
        twin = model_of(0)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.data.copy_(full(p.detach()))
        twin(x).float().square().mean().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements) if sharded else q.grad
        optimizer.step()
        optimizer.zero_grad()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Unsharded parameters and states."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = full(p.detach())
        for key, value in optimizer.state[p].items():
            found[f"{name} {key}"] = full(value) if isinstance(value, torch.Tensor) else torch.tensor(value)
    return found


def main(rank: int, ranks: int, folder: Path, weight_format: str, state_format: str, load: str, save: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{save}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    model = model_of(0 if load == "-" else 99)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = precond.AdamW(model.parameters(), lr=1e-2, weight_format=weight_format, state_format=state_format)
    if load != "-":
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=folder / load)
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    train(model, optimizer, range(3) if load == "-" else range(3, 6))
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=folder / save)
    found = everything(model, optimizer)
    if rank == 0:
        torch.save(found, folder / f"{save}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:8])
    # Everything is written. On its way out an interpreter now and then aborts in a thread of gloo's ("terminate called
    # without an active exception").
    sys.stdout.flush()
    os._exit(0)
