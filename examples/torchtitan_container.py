"""Torchtitan: an OptimizersContainer that knows the classes of precond, here Muon and AdamW in one optimizer.

    torchrun --nproc-per-node 2 examples/torchtitan_container.py
    torchrun --nproc-per-node 2 examples/torchtitan_container.py --resume examples-out/torchtitan/step-50

The loop stands for torchtitan's own: give the same Optimizers.Config to ``Trainer.Config(optimizer=...)``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import ByteModel, windows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from tqdm import trange

import precond

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save-every", type=int, default=50)
parser.add_argument("--output", type=Path, default=Path("examples-out/torchtitan"))
parser.add_argument("--resume", type=Path, help="a checkpoint, such as examples-out/torchtitan/step-50")
args = parser.parse_args()


class Optimizers(OptimizersContainer):
    """Torchtitan's own has a fixed list of names."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """That of torchtitan; this one builds Optimizers."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        return getattr(precond, name)


def group(pattern: str, **kwargs: object) -> ParamGroupConfig:
    # Under one name all groups are in one optimizer, with one norm.
    return ParamGroupConfig(pattern=pattern, optimizer_name="Grouped", optimizer_kwargs=kwargs)


config = Optimizers.Config(
    param_groups=[
        group(r"bias$|norm", optimizer="AdamW", lr=3e-3, weight_decay=0.0),
        group(r"^layers\.", optimizer="Muon", lr=0.02, weight_decay=0.1),
        group(r".*", optimizer="AdamW", lr=3e-3, weight_decay=0.1),
    ],
    # What concerns the whole step. In torchtitan's Trainer set training.max_norm to inf beside it.
    optimizer_factory_kwargs_by_name={"Grouped": {"max_grad_norm": 1.0}},
)

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,))
torch.manual_seed(0)
model = ByteModel()
for layer in model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizers = config.build(model_parts=[model])
schedulers = LRSchedulersContainer.Config(warmup_steps=10, decay_ratio=0.5).build(
    optimizers=optimizers, training_steps=args.steps
)


def state() -> dict[str, object]:
    return {"model": model.state_dict(), "optimizer": optimizers, "lr_scheduler": schedulers}


if args.resume:
    loaded = state()
    dcp.load(loaded, checkpoint_id=args.resume)
    model.load_state_dict(loaded["model"])
start = schedulers.schedulers[0].last_epoch

held_out = windows(32, 65, seed=0, held_out=True)
with torch.no_grad():
    before = model(held_out).item()
progress = trange(start, args.steps, initial=start, total=args.steps, disable=rank > 0)
for step in progress:
    loss = model(windows(8, 65, seed=1 + step * ranks + rank))
    loss.backward()
    optimizers.step()
    schedulers.step()
    optimizers.zero_grad()
    progress.set_postfix(loss=f"{loss.item():.2f}")
    if (step + 1) % args.save_every == 0:
        dcp.save(state(), checkpoint_id=args.output / f"step-{step + 1}")
with torch.no_grad():
    after = model(held_out).item()
if rank == 0:
    print(f"held-out loss: {before:.4f} at step {start}, {after:.4f} at step {args.steps}")
dist.destroy_process_group()
