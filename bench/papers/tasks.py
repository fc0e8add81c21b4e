"""The papers' own tasks at small size, for ``python -m bench theory --tasks``: sparse parity and staircase
(docs/theory.md, C.5) for Adam or Gauss-Newton, and a convolutional classifier of digits for BNP, with one grid of learning
rates for every side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import precond

#: Sparse parity: y = x1 x2 x3. Staircase: y = x1 + x1 x2 + x1 x2 x3 + x1 x2 x3 x4. x uniform in {-1, 1}^20.
TASKS = {"parity, k = 3": 3, "staircase, k = 4": 4}
INPUTS, WIDTH, SEEDS = 20, 128, 3
#: Batch size: steps.
STEPS = {32: 1000, 4096: 200}
FED_EVERY = 10


def labels(task: str, x: Tensor) -> Tensor:
    products = x[..., : TASKS[task]].cumprod(-1)
    return products[..., -1] if task.startswith("parity") else products.sum(-1)


class Networks:
    """Many networks of one hidden layer at once: parameters of each are views of stacked ones. Copies of a seed start alike."""

    def __init__(self, copies: int) -> None:
        draw = torch.Generator().manual_seed(0)

        def start(*shape: int) -> Tensor:
            bound = shape[1] ** -0.5 if len(shape) > 1 else INPUTS**-0.5
            values = (2 * torch.rand(SEEDS, *shape, generator=draw) - 1) * bound
            return values.repeat(copies, *[1] * len(shape))

        self.stacked = [start(WIDTH, INPUTS), start(WIDTH), start(1, WIDTH), torch.zeros(copies * SEEDS, 1)]
        for t in self.stacked:
            t.requires_grad_()
        self.networks = [[nn.Parameter(t.detach()[i]) for t in self.stacked] for i in range(copies * SEEDS)]

    def forward(self, x: Tensor) -> Tensor:
        """x: (seeds, batch, inputs); the output is (networks, batch)."""
        w1, b1, w2, b2 = self.stacked
        x = x.repeat(w1.shape[0] // SEEDS, 1, 1)
        hidden = torch.relu(torch.baddbmm(b1[:, None], x, w1.mT))
        return torch.baddbmm(b2[:, None], hidden, w2.mT)[..., 0]

    def backward(self, x: Tensor, targets: Callable[[Tensor], Tensor]) -> None:
        """Gradients of the mean of (f - y)^2 / 2 for every network."""
        f = self.forward(x)
        loss = ((f - targets(f.detach())).square() / 2).mean(1).sum()
        # A run that diverges stands still, and the others go on.
        gradients = [g.nan_to_num(0.0, 0.0, 0.0).clamp_(-1e6, 1e6) for g in torch.autograd.grad(loss, self.stacked)]
        for t, *of in zip(gradients, *self.networks, strict=True):
            for p, g in zip(of, t.unbind(), strict=True):
                p.grad = g


def contenders() -> dict[str, tuple[Callable[[list[Any]], torch.optim.Optimizer], list[dict[str, float]]]]:
    """Each with its grid: learning rates, and for Gauss-Newton a damping beside, which the others do not have."""
    lrs = [2.0**i for i in (-10, -8, -6, -4, -2)]
    damped = {
        -1.0: [dict(lr=2.0**i, eps=eps) for i in (-9, -7, -5) for eps in (1e-2, 1e-1)],
        -0.5: [dict(lr=2.0**i, eps=eps) for i in (-8, -6, -4) for eps in (1e-4, 1e-2)],
    }
    betas = (0.9, 0.99)

    def gauss_newton(power: float, basis: str):
        return lambda groups: precond.GaussNewton(groups, betas=betas, power=power, basis=basis, basis_frequency=1)

    def adam(groups):
        return precond.GaussNewton(groups, betas=betas, power=-0.5, curvature="gradient", basis="kronecker", eps=1e-16)

    plain = [dict(lr=lr) for lr in lrs]
    return {
        "SGD": (lambda groups: precond.SGD(groups, momentum=0.9), [dict(lr=2.0**i) for i in (-8, -6, -4, -2, 0)]),
        "Adam, identity": (lambda groups: precond.Adam(groups, betas=betas), plain),
        "Adam, Kronecker": (adam, plain),
        "GN^-1, identity": (gauss_newton(-1.0, "identity"), damped[-1.0]),
        "GN^-1, Kronecker": (gauss_newton(-1.0, "kronecker"), damped[-1.0]),
        "GN^-1/2, identity": (gauss_newton(-0.5, "identity"), damped[-0.5]),
        "GN^-1/2, Kronecker": (gauss_newton(-0.5, "kronecker"), damped[-0.5]),
    }


def points(seed: int, size: int) -> Tensor:
    bits = torch.randint(0, 2, (SEEDS, size, INPUTS), generator=torch.Generator().manual_seed(seed))
    return 2.0 * bits - 1.0


def train(
    task: str, size: int, make: Callable[[list[Any]], torch.optim.Optimizer], grid: list[dict[str, Any]], steps: int
) -> tuple[Tensor, list[Tensor], Networks, torch.optim.Optimizer]:
    """Test losses, (grid, seeds), the curves of them, and what was trained. Every network of a seed sees the same batches."""
    nets = Networks(len(grid))
    groups = [
        dict(options, params=[p for net in nets.networks[i * SEEDS : (i + 1) * SEEDS] for p in net])
        for i, options in enumerate(grid)
    ]
    optimizer = make(groups)
    held_out = points(10**6, 4096)
    goal = labels(task, held_out).repeat(len(grid), 1)

    def test() -> Tensor:
        with torch.no_grad():
            losses = ((nets.forward(held_out) - goal).square() / 2).mean(1)
        return losses.view(len(grid), SEEDS).nan_to_num(math.inf)

    curve = []
    draw = torch.Generator().manual_seed(7)
    fed = isinstance(optimizer, precond.GaussNewton) and optimizer.param_groups[0]["curvature"] == "gnb"
    for t in range(steps):
        if t % max(steps // 25, 1) == 0:
            curve.append(test())
        if fed and t % FED_EVERY == 0:
            # A batch of its own, as in the paper; labels from the model are its outputs plus N(0, 1).
            nets.backward(points(10**5 + t, size), lambda f: f + torch.randn(f.shape, generator=draw))
            optimizer.update_curvature(batch_size=size)
        x = points(t, size)
        y = labels(task, x).repeat(len(grid), 1)
        nets.backward(x, lambda f, y=y: y)
        for group, options in zip(optimizer.param_groups, grid, strict=True):
            group["lr"] = options["lr"] * (1 - t / steps)
        optimizer.step()
    curve.append(test())
    return curve[-1], curve, nets, optimizer


def quadrants(shrink: int = 1) -> list[dict[str, Any]]:
    """The test loss of every contender at the best of its grid, chosen by the mean over seeds."""
    found = []
    todo = [(task, size, name) for task in TASKS for size in STEPS for name in contenders()]
    for task, size, name in tqdm(todo, desc="parity and staircase"):
        make, grid = contenders()[name]
        ends, curve, nets, optimizer = train(task, size, make, grid, STEPS[size] // shrink)
        best = int(ends.mean(1).argmin())
        row = {"task": task, "batch": size, "contender": name, "loss": ends[best].mean().item()}
        row |= {"seeds": ends[best].tolist(), "options": grid[best], "grid": ends.mean(1).tolist()}
        row["curve"] = [losses[best].mean().item() for losses in curve]
        found.append(row)
        if name == "Adam, Kronecker":
            found += interpolated(task, size, nets, optimizer, best, grid, STEPS[size] // shrink)
    return found


def interpolated(
    task: str, size: int, nets: Networks, trained: Any, best: int, grid: list[dict[str, Any]], steps: int
) -> list[dict[str, Any]]:
    """Adam in fixed bases between the coordinates (s = 0) and the Kronecker bases (s = 1) that a run of Adam ended with, on the
    hidden layer; the rest has no basis. Each seed has bases of its own, so groups of their own.
    """
    shares, rows = (0.0, 0.25, 0.5, 0.75, 1.0), []
    lr = grid[best]["lr"]
    ends = [trained.state[nets.networks[best * SEEDS + seed][0]] for seed in range(SEEDS)]

    def make(groups: list[Any]) -> torch.optim.Optimizer:
        split = []
        for share, group in zip(shares, groups, strict=True):
            split.append({"lr": lr, "params": [p for i, p in enumerate(group["params"]) if i % 4]})
            for seed in range(SEEDS):
                pair = [ends[seed][f"basis_{side}_0"] for side in ("left", "right")]
                pair = [precond.interpolate_basis(torch.eye(len(q)), q, share) for q in pair]
                split.append({"lr": lr, "params": [group["params"][4 * seed]], "basis": tuple(pair)})
        return precond.GaussNewton(split, betas=(0.9, 0.99), power=-0.5, curvature="gradient", eps=1e-16)

    losses, _, _, _ = train(task, size, _scheduled(make, len(shares)), [dict(lr=lr)] * len(shares), steps)
    for share, of in zip(shares, losses, strict=True):
        name = f"Adam, fixed basis at s = {share:g}"
        rows.append({"task": task, "batch": size, "contender": name, "loss": of.mean().item(), "seeds": of.tolist()})
    return rows


def _scheduled(make: Callable[[list[Any]], torch.optim.Optimizer], copies: int):
    """Let ``train`` set one learning rate per copy where an optimizer has several groups for each."""

    def made(groups: list[Any]) -> torch.optim.Optimizer:
        optimizer = make(groups)
        each = len(optimizer.param_groups) // copies
        first = optimizer.param_groups[::each]
        everything = list(optimizer.param_groups)

        def spread(*_: Any) -> None:
            for i, group in enumerate(everything):
                group["lr"] = first[i // each]["lr"]

        optimizer.register_step_pre_hook(spread)
        return _First(optimizer, first)  # type: ignore[return-value]

    return made


class _First:
    """An optimizer of which only the first group of each copy shows."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        self.optimizer, self.param_groups, self.step = optimizer, groups, optimizer.step


# Digits: BNP against its base. FOP has experiments of its own: bench/claims.py.

LRS = {"SGD": [0.003, 0.01, 0.03, 0.1, 0.3], "Adam": [0.0003, 0.001, 0.003, 0.01, 0.03]}
BASES = {
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "Adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
}
#: None of these has a grid beyond that of its base.
AROUND: dict[str, Callable[[nn.Module, torch.optim.Optimizer], torch.optim.Optimizer]] = {
    "": lambda model, base: base,
    "BNP": lambda model, base: precond.BNP(model, base, compose="direction"),
}
EPOCHS = 8


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    # float64, for which BNP has one text on every machine.
    return torch.tensor(data.images[order] / 16.0, dtype=torch.float64)[:, None], torch.tensor(data.target[order])


def classifier() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).double()


def classify(x: Tensor, y: Tensor, base: str, around: str, lr: float, size: int, seed: int, epochs: int) -> list[float]:
    """Losses of training after every epoch, validation loss, test loss and test error of one run."""
    torch.manual_seed(seed)
    model = classifier()
    train_x, valid_x, test_x = x.split([1000, 297, 500])
    train_y, valid_y, test_y = y.split([1000, 297, 500])
    optimizer = AROUND[around](model, BASES[base](model.parameters(), lr))
    curve = []
    for _ in range(epochs):
        for rows in torch.randperm(1000).split(size):
            optimizer.zero_grad()
            F.cross_entropy(model(train_x[rows]), train_y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            curve.append(F.cross_entropy(model(train_x), train_y).item())
    with torch.no_grad():
        logits = model(test_x)
        valid = F.cross_entropy(model(valid_x), valid_y).item()
        error = (logits.argmax(1) != test_y).double().mean().item()
        return [*curve, valid, F.cross_entropy(logits, test_y).item(), error]


def classifiers(epochs: int = EPOCHS) -> list[dict[str, Any]]:
    """Test losses and errors at the learning rate of the best validation loss, three seeds."""
    x, y = digits()
    found = []
    todo = [(base, around, size) for size in (64, 4) for base in BASES for around in AROUND]
    for base, around, size in tqdm(todo, desc="digits"):
        few = max(epochs // 4, 1) if size < 64 else epochs
        runs = {lr: [classify(x, y, base, around, lr, size, seed, few) for seed in range(SEEDS)] for lr in LRS[base]}
        validation = {lr: statistics.mean(run[-3] for run in of) for lr, of in runs.items()}
        finite = {lr: v for lr, v in validation.items() if math.isfinite(v)}
        lr = min(finite, key=finite.__getitem__)
        row = {"batch": size, "base": base, "around": around, "lr": lr, "epochs": few}
        for i, name in enumerate(("validation", "loss", "error"), -3):
            row[name] = statistics.mean(run[i] for run in runs[lr])
            row[f"{name}_deviation"] = statistics.stdev(run[i] for run in runs[lr])
        row["curve"] = [statistics.mean(of) for of in zip(*(run[:few] for run in runs[lr]), strict=True)]
        row["grid"] = {str(k): v for k, v in validation.items()}
        found.append(row)
    return found


def run() -> dict[str, Any]:
    return {"digits": classifiers(), "quadrants": quadrants()}


def text(found: dict[str, Any]) -> str:
    lines = [f"{'task':18}{'batch':>6}  {'contender':32}{'test loss':>10}  best of the grid"]
    for row in found["quadrants"]:
        options = ", ".join(f"{k} {v:g}" for k, v in row.get("options", {}).items())
        lines.append(f"{row['task']:18}{row['batch']:6}  {row['contender']:32}{row['loss']:10.2e}  {options}")
    lines.append(f"\n{'digits':18}{'batch':>6}  {'optimizer':32}{'test loss':>10}{'error':>16}")
    for row in found["digits"]:
        name = (
            f"{row['around']}({row['base']}), lr {row['lr']:g}" if row["around"] else f"{row['base']}, lr {row['lr']:g}"
        )
        error = f"{100 * row['error']:.1f} +- {100 * row['error_deviation']:.1f} %"
        lines.append(f"{row['epochs']:2} epochs{'':9}{row['batch']:6}  {name:32}{row['loss']:10.3f}{error:>16}")
    return "\n".join(lines)
