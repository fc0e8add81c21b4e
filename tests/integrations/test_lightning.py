"""Lightning's Trainer, which steps with a closure, and Fabric."""

from __future__ import annotations

import pytest
import torch
from support.methods import ALL, ELEMENTWISE
from support.training import model

import precond

METHODS = [method for method in ALL if method.dtype == torch.float32]


@pytest.fixture(scope="module")
def lightning(library):
    return library("lightning")


def batches():
    generator = torch.Generator().manual_seed(5)
    data = list(zip(torch.randn(12, 5, generator=generator), torch.randn(12, 3, generator=generator), strict=True))
    return torch.utils.data.DataLoader(data, batch_size=4)


def fit(lightning, folder, method, make, *, epochs=2, resume=None, **options):
    """The weights after epochs of three steps; the last one is saved as ``end.ckpt``."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model(0 if resume is None else 99)

        def training_step(self, batch):
            x, y = batch
            return (self.net(x) - y).square().mean()

        def configure_optimizers(self):
            optimizer = make(self.net)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    module = Module()
    trainer.fit(module, batches(), ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return {name: p.detach().clone() for name, p in module.net.named_parameters()}


def fabric(lightning, folder, method, make, *, epochs=2, resume=None, **options):
    """The same loop under Fabric."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, **options)
    net = model(0 if resume is None else 99)
    net, optimizer = fabric.setup(net, make(net))
    state = {"net": net, "optimizer": optimizer, "epoch": 0}
    if resume is not None:
        fabric.load(resume, state)
    for _ in range(state["epoch"], epochs):
        for x, y in batches():

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = (net(x) - y).square().mean()
                fabric.backward(loss)
                return loss

            if method.closure:
                optimizer.step(closure)
            else:
                closure()
                fabric.clip_gradients(net, optimizer, max_norm=0.3)
                optimizer.step()
    fabric.save(folder / f"{epochs}.ckpt", state | {"epoch": epochs})
    return {name: p.detach().clone() for name, p in net.module.named_parameters()}


loops = pytest.mark.parametrize("loop", [fit, fabric], ids=["trainer", "fabric"])


@loops
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", [method for method in ELEMENTWISE if method.stock], ids=str)
def test_a_drop_in_trains_like_torchs(lightning, tmp_path, loop, method, precision):
    ours, theirs = (
        loop(lightning, tmp_path, method, make, precision=precision) for make in (method.make, method.stock)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_trainer_clips_and_accumulates_as_with_torchs(lightning, tmp_path):
    adamw = next(method for method in ELEMENTWISE if method.name == "adamw")
    options = dict(gradient_clip_val=0.3, accumulate_grad_batches=2)
    ours, theirs = (fit(lightning, tmp_path, adamw, make, **options) for make in (adamw.make, adamw.stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@loops
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(lightning, tmp_path, loop, method):
    straight = loop(lightning, tmp_path, method, method.make)
    loop(lightning, tmp_path, method, method.make, epochs=1)
    resumed = loop(lightning, tmp_path, method, method.make, resume=tmp_path / "1.ckpt")
    assert all(value.isfinite().all() for value in straight.values())
    assert not [name for name, value in straight.items() if not torch.equal(value, resumed[name])]


@pytest.mark.parametrize("cls", [precond.ScheduleFreeAdamW, precond.ScheduleFreeSGD])
def test_hooks_of_a_module_switch_the_modes_of_a_schedule_free_optimizer(lightning, tmp_path, cls):
    """Lightning itself calls neither ``train`` nor ``eval``. Validation changes no bit of a training, resumed or not."""
    validated = []

    class Module(lightning.LightningModule):
        def __init__(self, seed=0):
            super().__init__()
            self.net = model(seed)

        def training_step(self, batch):
            x, y = batch
            return (self.net(x) - y).square().mean()

        def validation_step(self, batch):
            (group,) = self.optimizers().param_groups
            validated.append(not group["train_mode"])

        def configure_optimizers(self):
            return cls(self.net.parameters(), lr=0.01)

        def on_train_batch_start(self, *_):
            self.optimizers().train()

        def on_validation_start(self):
            self.optimizers().eval()

    def fit(module, validate, epochs=2, resume=None):
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, batches(), batches() if validate else None, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        trainer.optimizers[0].train()
        return [p.detach().clone() for p in module.net.parameters()]

    fit(Module(), True, epochs=1)
    assert torch.load(tmp_path / "1.ckpt")["optimizer_states"][0]["param_groups"][0]["train_mode"] is False
    resumed = fit(Module(99), True, resume=tmp_path / "1.ckpt")
    straight, without = fit(Module(), True), fit(Module(), False)
    assert validated
    assert all(validated)
    for a, b, c in zip(resumed, straight, without, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)
