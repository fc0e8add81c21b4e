"""DeepSpeed ZeRO in bfloat16: AdamW steps the flat float32 shards with 8-bit moments; DeepSpeed clips.

torchrun --nproc-per-node 2 examples/deepspeed_zero.py --stage 2
torchrun --nproc-per-node 2 examples/deepspeed_zero.py --stage 2 --resume examples-out/deepspeed/step-30
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from tiny import digits
from torch import nn
from tqdm import trange

import precond

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--save-every", type=int, default=30)
parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3))
parser.add_argument("--output", type=Path, default=Path("examples-out/deepspeed"))
parser.add_argument("--resume", type=Path, help="a checkpoint, such as examples-out/deepspeed/step-30")
args = parser.parse_args()

# On a CPU DeepSpeed would compile an all-reduce through shared memory here; gloo does it as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
widths = (64, 1152, 1152, 1152)
layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.GELU())]
model = nn.Sequential(*layers, nn.Linear(1152, 10))
# ZeRO steps flat shards, which have no matrices: Muon raises. 8-bit moments need shards of at least 2^20 elements.
optimizer = precond.AdamW(precond.param_groups(model, weight_decay=0.1), lr=1e-3, state_format="int8")
engine, _, _, _ = deepspeed.initialize(
    model=model,
    optimizer=optimizer,
    config={
        "train_micro_batch_size_per_gpu": 32,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": args.stage},
        # It knows only the exact classes of torch.
        "zero_allow_untested_optimizer": True,
        # In place of max_grad_norm: a rank's optimizer sees a piece of every gradient, group by group.
        "gradient_clipping": 1.0,
    },
)
if args.resume:
    engine.load_checkpoint(str(args.resume.parent), tag=args.resume.name)
start = engine.global_steps

(images, classes), (test_images, test_classes) = (data.tensors for data in digits())


@torch.no_grad()
def accuracy() -> float:
    return (engine(test_images.bfloat16()).argmax(-1) == test_classes).float().mean().item()


before = accuracy()
for step in trange(start, args.steps, initial=start, total=args.steps, disable=rank > 0):
    batch = (torch.arange(32) + 32 * (step * ranks + rank)) % len(images)
    loss = nn.functional.cross_entropy(engine(images[batch].bfloat16()).float(), classes[batch])
    engine.backward(loss)
    engine.step()
    if (step + 1) % args.save_every == 0:
        engine.save_checkpoint(str(args.output), tag=f"step-{step + 1}")
after = accuracy()
if rank == 0:
    states = list(optimizer.state.values())
    held = sum(tensor.nbytes for state in states for tensor in state.values() if isinstance(tensor, torch.Tensor))
    print(f"states: {held / sum(state['exp_avg'].numel() for state in states):.2f} bytes per parameter")
    print(f"test accuracy: {before:.4f} at step {start}, {after:.4f} at step {args.steps}")
dist.destroy_process_group()
