"""Lightning in mixed precision: AdamW that clips inside the step, and statistics of its updates in the log.

python examples/lightning_module.py
python examples/lightning_module.py --resume examples-out/lightning/epoch=3-step=120.ckpt
"""

from __future__ import annotations

import argparse

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

import precond

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--save-every", type=int, default=4)
parser.add_argument("--output", default="examples-out/lightning")
parser.add_argument("--resume", help="a checkpoint, such as examples-out/lightning/epoch=3-step=120.ckpt")
args = parser.parse_args()


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: list[Tensor]) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(-1) == y).float().mean(), prog_bar=True)

    def on_train_batch_end(self, *_: object) -> None:
        optimizer = self.optimizers()
        self.log("grad_norm", optimizer.grad_norm, prog_bar=True)
        if self.global_step % 10 == 1:  # a step that has taken some
            self.logger.log_metrics(optimizer.statistics.scalars("optimizer/"), self.global_step)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = precond.AdamW(
            precond.param_groups(self, weight_decay=0.1),  # none for biases and norms
            lr=3e-3,
            max_grad_norm=1.0,  # in place of the Trainer's gradient_clip_val
            statistics=10,  # of the first step and every tenth after it
        )
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)}


lightning.seed_everything(0)
train, test = digits()
loaders = DataLoader(train, batch_size=50), DataLoader(test, batch_size=99)
module = Digits()
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=1,
    precision="bf16-mixed",
    max_epochs=args.epochs,
    num_sanity_val_steps=0,
    log_every_n_steps=10,
    logger=CSVLogger(args.output),
    callbacks=[ModelCheckpoint(args.output, every_n_epochs=args.save_every, save_top_k=-1)],
)
(before,) = trainer.validate(module, loaders[1], ckpt_path=args.resume, verbose=False)
trainer.fit(module, *loaders, ckpt_path=args.resume)
after = trainer.callback_metrics
print(f"test accuracy: {before['accuracy']:.4f} before, {after['accuracy']:.4f} at step {trainer.global_step}")
print(trainer.optimizers[0].statistics.table(["param_rms", "update_ratio", "lost"]))
