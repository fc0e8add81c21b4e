"""Images to classify: scikit-learn's digits, and Fashion-MNIST of the Debian package ``dataset-fashion-mnist``."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .contenders import Method
from .search import Point
from .stacked import Networks

#: Where the package puts it; ``PRECOND_FASHION_MNIST`` names another folder with the same four files.
FASHION = "/usr/share/datasets/fashion-mnist"
#: Images that all networks take at once where they are only tested: bounds memory.
CHUNK = 500
MARKS = 24


@dataclasses.dataclass(frozen=True)
class Data:
    """Images (n, 1, height, width) with zero mean and labels, in three parts."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits() -> Data:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.images[order], dtype=torch.float32)[:, None] / 16.0
    parts = zip(
        (x - 0.3).split([1000, 297, 500]), torch.tensor(data.target[order]).split([1000, 297, 500]), strict=True
    )
    return Data(*parts)


def idx(path: Path, header: int) -> Tensor:
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())[header:]), dtype=torch.uint8)


def fashion() -> Data:
    """10,000 of the 60,000 images to train on, 5,000 to choose by, and the 10,000 of the test set."""
    folder = Path(os.environ.get("PRECOND_FASHION_MNIST", FASHION))
    if not folder.exists():
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {folder}: install Debian's dataset-fashion-mnist, or set PRECOND_FASHION_MNIST to a "
            "folder with its four idx.gz files"
        )

    def part(name: str) -> tuple[Tensor, Tensor]:
        images = idx(folder / f"{name}-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28)
        return images / 255.0 - 0.286, idx(folder / f"{name}-labels-idx1-ubyte.gz", 8).long()

    x, y = part("train")
    return Data((x[:10_000], y[:10_000]), (x[-5_000:], y[-5_000:]), part("t10k"))


def of_digits() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    )


def of_fashion() -> nn.Module:
    convolutions = [nn.Conv2d(i, o, 3, stride=2) for i, o in ((1, 8), (8, 16), (16, 16))]
    layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


def loss_of(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(network(x), y)


def losses_of(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over images: of the loss, and of wrong answers."""
    logits = network(x)
    return F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(-1) != y).sum()


@dataclasses.dataclass(frozen=True)
class Images:
    """Training with batches of a fixed size; the score is the loss of validation at the end."""

    data: Callable[[], Data]
    build: Callable[[], nn.Module]
    epochs: int
    batch: int = 64
    #: The learning rate falls linearly to 0; else it stays.
    decay: bool = False
    searched: tuple[int, ...] = tuple(range(5))
    reported: tuple[int, ...] = tuple(range(100, 140))

    unit = "loss"
    runoff, priced = tuple(range(50, 60)), tuple(range(200, 210))
    #: Ratios of losses are compared, differences of returns.
    ratios = True

    def settings(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "batch": self.batch,
            "decay": self.decay,
            "parameters": sum(p.numel() for p in self.build().parameters()),
        }

    @functools.cached_property
    def parts(self) -> Data:
        return self.data()

    @property
    def steps(self) -> int:
        return len(self.parts.train[1]) // self.batch * self.epochs

    def positions(self) -> list[int]:
        """Steps at which a curve has its points."""
        return sorted({-(-k * self.steps // MARKS) for k in range(MARKS + 1)})

    def batches(self, seeds: Sequence[int]) -> Iterator[Tensor]:
        """Rows (seeds, batch), an order of its own for each seed; the same ones for every method."""
        draws = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
        count = len(self.parts.train[1])
        for _ in range(self.epochs):
            orders = torch.stack([torch.randperm(count, generator=draw) for draw in draws])
            yield from list(orders.split(self.batch, 1))[: count // self.batch]

    def evaluate(self, networks: Networks, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and share of errors of every network, (copies, seeds)."""
        seeds = len(networks.parameters[0])
        loss, wrong = torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            for xs, ys in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                more = networks.each(losses_of, *(t.expand(seeds, *t.shape) for t in (xs, ys)))
                loss, wrong = loss + more[0], wrong + more[1]
        return loss / len(y), wrong / len(y)

    def train(
        self, method: Method, points: Sequence[Point], seeds: Sequence[int], *, test: bool, tick: Callable[[], Any]
    ) -> list[list[dict[str, Any]]]:
        """The record of every point and seed. The test set is touched only with ``test``, after the last step."""
        networks = Networks(self.build, len(points), seeds)
        optimizers = method.optimizers(networks.parameters, points)
        groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
        x, y = self.parts.train
        curve, positions = [], set(self.positions())
        few = [t[:1000] for t in self.parts.validation]
        for step, rows in enumerate(self.batches(seeds)):
            if step in positions:
                curve.append(self.evaluate(networks, *few)[0])
            if self.decay:
                for group, lr in groups:
                    group["lr"] = lr * (1.0 - step / self.steps)
            networks.backward(networks.each(loss_of, x[rows], y[rows]))
            for optimizer in optimizers:
                optimizer.step()
            tick()
        validation, error = self.evaluate(networks, *self.parts.validation)
        curve.append(self.evaluate(networks, *few)[0])
        found = {"score": validation, "validation_error": error, "curve": torch.stack(curve, -1)}
        if test:
            found["test"], found["test_error"] = self.evaluate(networks, *self.parts.test)
        records = networks.records(found)
        if test:
            method.inspect(optimizers, networks, records)
        return records


TASKS = {
    "digits": Images(digits, of_digits, epochs=30),
    "fashion": Images(fashion, of_fashion, epochs=4, decay=True, searched=(0, 1, 2), reported=tuple(range(100, 120))),
}
