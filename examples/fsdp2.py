"""FSDP2: Muon for hidden matrices and AdamW for the rest in one optimizer, on shards, with one norm that clips both.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 3 examples/fsdp2.py --resume examples-out/fsdp2/step-50

A checkpoint of torch.distributed.checkpoint may be resumed by another number of processes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import ByteModel, windows
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import trange

import precond

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-every", type=int, default=50)
parser.add_argument("--output", type=Path, default=Path("examples-out/fsdp2"))
parser.add_argument("--resume", type=Path, help="a checkpoint, such as examples-out/fsdp2/step-50")
args = parser.parse_args()

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))

torch.manual_seed(0)
model = ByteModel()
for layer in model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

# After fully_shard, which replaces the parameters. Each rank steps its shards; whole matrices meet on one rank each.
optimizer = precond.Grouped.for_model(
    model,
    matrices=dict(optimizer=precond.Muon, lr=0.02),
    rest=dict(optimizer=precond.AdamW, lr=3e-3),
    weight_decay=0.1,
    max_grad_norm=1.0,  # of all shards of all groups: no clip_grad_norm_
)
# A factor, because the groups' learning rates differ.
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)


def state() -> dict[str, object]:
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states, "scheduler": scheduler.state_dict()}


if args.resume:
    loaded = state()
    dcp.load(loaded, checkpoint_id=args.resume)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
start = scheduler.last_epoch

held_out = windows(32, 65, seed=0, held_out=True)
with torch.no_grad():
    before = model(held_out).item()
progress = trange(start, args.steps, initial=start, total=args.steps, disable=dist.get_rank() > 0)
for step in progress:
    loss = model(windows(8, 65, seed=1 + step * dist.get_world_size() + dist.get_rank()))
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if (step + 1) % 10 == 0:
        progress.set_postfix(loss=f"{loss.item():.2f}", grad_norm=f"{optimizer.grad_norm.item():.2f}")
    if (step + 1) % args.save_every == 0:
        dcp.save(state(), checkpoint_id=args.output / f"step-{step + 1}")
with torch.no_grad():
    after = model(held_out).item()
if dist.get_rank() == 0:
    print(f"held-out loss: {before:.4f} at step {start}, {after:.4f} at step {args.steps}")
dist.destroy_process_group()
