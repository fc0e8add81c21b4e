"""One of two ranks that train real FSDP2 modules on the emulated device: with states of the host the bits are those without."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import precond
from precond._core import twins
from support.cases import bits_equal
from support.offloaded import FORMATS, on_host

RANKS, STEPS = 2, 4
OPTIONS = ({}, {**FORMATS, "statistics": True}, {"ema_decay": 0.9})
#: Of the setting, and what is moved before a step.
PLACES = ((None, {}), ("cpu", {}), (None, {2: "cpu"}), ("cpu", {1: "cuda", 3: "cpu"}))


def trained(mesh, options, released, offload, moves):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 65), nn.Tanh(), nn.Linear(65, 33), nn.Tanh(), nn.Linear(33, 1)).bfloat16()
    for module in (net[0], net[2], net):
        fully_shard(module, mesh=mesh)
    optimizer = precond.AdamW(net.parameters(), lr=1e-2, max_grad_norm=0.05, offload=offload, **options)
    if released:
        precond.release_gradients(net, optimizer, clip="previous")
    for step in range(STEPS):
        for p in net.parameters() if step in moves else ():
            optimizer.move(p, moves[step])
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(RANKS * step + mesh.get_rank()))
        net(x.bfloat16()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = get_optimizer_state_dict(net, optimizer)
    optimizer.wait()
    assert on_host(optimizer, net[0].weight) == bool(offload or moves)
    tensors = [
        *net.parameters(),
        *(t for state in saved["state"].values() for t in state.values()),
        optimizer.grad_norm,
    ]
    return [(t.to_local() if hasattr(t, "to_local") else torch.as_tensor(t)).detach().clone() for t in tensors]


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    twins._SLOT = 32768
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for options in OPTIONS:
        for released in (False, True):
            expected, *others = (trained(mesh, options, released, *place) for place in PLACES)
            for place, found in zip(PLACES[1:], others, strict=True):
                equal = len(found) == len(expected) and all(map(bits_equal, found, expected))
                assert equal, f"rank {rank}: {options}, released {released}, {place}"
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # support.ranks says why
