"""Accelerate: AdamW with groups from param_groups, clipping inside the step, and an average of the weights.

python examples/accelerate_loop.py
accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
python examples/accelerate_loop.py --resume examples-out/accelerate/epoch-4
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tiny import digits
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import precond

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--save-every", type=int, default=4)
parser.add_argument("--output", type=Path, default=Path("examples-out/accelerate"))
parser.add_argument("--resume", type=Path, help="a checkpoint, such as examples-out/accelerate/epoch-4")
args = parser.parse_args()

set_seed(0)
accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10))
optimizer = precond.AdamW(
    precond.param_groups(model, weight_decay=0.1),  # none for biases and norms
    lr=0.01,
    max_grad_norm=1.0,  # in place of accelerator.clip_grad_norm_
    ema_decay=0.9,
)
train, test = digits()
model, optimizer, loader, test_loader = accelerator.prepare(
    model, optimizer, DataLoader(train, batch_size=50), DataLoader(test, batch_size=99)
)


@torch.no_grad()
def accuracy() -> float:
    right = []
    for x, y in test_loader:
        right.append(accelerator.gather_for_metrics(model(x).argmax(-1) == y))
    return torch.cat(right).float().mean().item()


start = 0
if args.resume:
    accelerator.load_state(args.resume)
    start = int(args.resume.name.removeprefix("epoch-"))
before = accuracy()
for epoch in range(start, args.epochs):
    progress = tqdm(loader, desc=f"epoch {epoch + 1}", disable=not accelerator.is_main_process)
    for x, y in progress:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    if (epoch + 1) % args.save_every == 0:
        accelerator.save_state(args.output / f"epoch-{epoch + 1}")
after = accuracy()
with optimizer.optimizer.averaged():  # Accelerate's wrapper has it inside
    averaged = accuracy()
accelerator.print(f"test accuracy: {before:.4f} at epoch {start}, {after:.4f} at epoch {args.epochs}")
accelerator.print(f"with averaged weights: {averaged:.4f}")
accelerator.end_training()
