"""What FOP adds to the time of a training step of one network, for bench/claims.py: interleaved in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import precond

from .. import record, timing
from . import control, images


class Residual(nn.Module):
    """Two 3 x 3 convolutions around which the input goes."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(o), nn.BatchNorm2d(o)])
        self.around = nn.Conv2d(i, o, 1, stride, bias=False) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(torch.relu(self.norms[0](self.first(x)))))
        return torch.relu(y + self.around(x))


def resnet18() -> nn.Module:
    """For images of 32 x 32: 11.2 million parameters."""
    widths = (64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [Residual(i, o, 1 if i == o else 2) for i, o in zip((64, *widths), widths, strict=False)]
    first = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def policy(logits_and_value: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    """Products of A2C's loss, with arbitrary goals."""
    logits, value = logits_and_value
    return F.cross_entropy(logits, y % 2) + (value - y).square().mean()


#: The network, the shape of its inputs, the loss.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[..., Tensor]]] = {
    "digits": (images.of_digits, (64, 1, 8, 8), F.cross_entropy),
    "fashion": (images.of_fashion, (64, 1, 28, 28), F.cross_entropy),
    "cartpole": (lambda: control.ActorCritic(4, 2), (128, 4), policy),
    "acrobot": (lambda: control.ActorCritic(6, 3), (128, 6), policy),
    "ResNet-18": (resnet18, (64, 3, 32, 32), F.cross_entropy),
}
BASES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda params: precond.SGD(params, lr=1e-3),
    "momentum": lambda params: precond.SGD(params, lr=1e-3, momentum=0.9),
    "Adam": lambda params: precond.Adam(params),
    "RMSprop": lambda params: precond.RMSprop(params),
}


def measure(path: Path, seconds: float = 4.0) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of forward and backward pass, and of the step of every base, alone and with FOP; medians."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (build, shape, loss_of) in NETWORKS.items():
        torch.manual_seed(0)
        model = build()
        x, y = torch.randn(shape), torch.randint(0, 10, shape[:1])

        def both(
            model: nn.Module = model, x: Tensor = x, y: Tensor = y, loss_of: Callable[..., Tensor] = loss_of
        ) -> None:
            model.zero_grad()
            loss_of(model(x), y).backward()

        calls: dict[str, Callable[[], object]] = {"forward and backward": both}
        for base, make in BASES.items():
            calls[base] = make(list(model.parameters())).step
            for mode in ("spatial", "input"):
                # A hyper_lr so small that M, and with it the work, stays as at the start.
                # Around plain SGD "gradient" is the same method and copies no parameters.
                compose = "gradient" if base == "SGD" else "direction"
                fop = precond.FOP(make(list(model.parameters())), 1e-6, mode, compose=compose)
                calls[f"FOP({base}), {mode}"] = fop.step
        both()
        times = timing.interleaved(calls, seconds, least=9)
        found[name] = {call: timing.quartiles(of)[1] * 1e3 for call, of in times.items()}
        line = ", ".join(f"{call} {ms:.3g}" for call, ms in found[name].items())
        print(f"{name}, ms: {line}", flush=True)
    record.write(path, json.dumps({"environment": timing.environment(), "ms": found}, indent=1) + "\n")
    return found
