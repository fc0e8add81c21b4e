"""Small batches of images, one of them at a time too: BNP, batch and group normalisation (Lange, Helfrich, Ye 2022)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import precond
from precond._wrappers.standardised import Coordinates, moved, squared_q, squared_scales, step_in_z

from . import images, normalisers
from .images import CHUNK, Data, Images
from .normalisers import BNPS, CONSTANTS, LEAST, OF_IMAGES, OF_ROWS, Normalised
from .search import Point
from .stacked import Networks

#: torch's of BatchNorm and GroupNorm.
EPS = 1e-5
GROUPS = 4
#: Of conditions: positions in a training, images, and seeds.
TAKEN, SEEN, SHOWN = 5, 500, 3

Moments = tuple[Tensor, Tensor]


class Norm(nn.Module):
    """Batch or group normalisation of channels, as torch's; running statistics are given and returned."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind, self.channels = kind, channels
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, given: Moments | None) -> tuple[Tensor, Moments | None]:
        """The normalised x, and the batch's mean and unbiased variance where it was normalised by these."""
        if self.kind == "GroupNorm":
            return F.group_norm(x, GROUPS, self.weight, self.bias, EPS), None
        shape, taken = (-1, *[1] * (x.dim() - 2)), None
        if given is None:
            count = x.numel() // self.channels
            var, mean = torch.var_mean(x, channel_dims(x), correction=0)
            taken = mean.detach(), var.detach() * (count / (count - 1))
        else:
            mean, var = given
        scale = self.weight * (var + EPS).rsqrt()
        return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape), taken


def channel_dims(x: Tensor) -> list[int]:
    """All dimensions but that of channels, the second one."""
    return [0, *range(2, x.dim())]


class Net(nn.Module):
    """Layers with a normalisation, if there is one, and a ReLU after each but the last."""

    def __init__(self, layers: Sequence[nn.Module], norm: str, mean: bool = False) -> None:
        super().__init__()
        #: A linear layer sees the mean over positions, else all of them.
        self.mean = mean
        self.layers = nn.ModuleList(layers)
        channels = [layer.weight.shape[0] for layer in layers[:-1]]
        for layer in layers[:-1] if norm == "BatchNorm" else ():
            # The mean takes it off again: its gradient is rounding, of which Adam makes whole steps.
            layer.bias = None
        self.norms = nn.ModuleList(Norm(norm, count) for count in channels if norm)
        #: Of every layer in the last forward: images times positions, and images. Numbers, which vmap does not return.
        self.rows: list[tuple[int, int]] = []

    def forward(
        self, x: Tensor, given: Sequence[Moments] | None = None, observe: bool = False
    ) -> tuple[Tensor, list[Moments], list[Moments]]:
        """Logits, the moments of the input of every layer (with ``observe``), and those that BatchNorm took.

        ``given``: the running statistics of BatchNorm, for evaluation.
        """
        seen, taken, rows = [], [], []
        for k, layer in enumerate(self.layers):
            if isinstance(layer, nn.Linear):
                x = x.mean((2, 3)) if self.mean else x.flatten(1)
            if observe:
                var, mean = torch.var_mean(x.detach(), channel_dims(x), correction=0)
                seen.append((mean, var))
            x = layer(x)
            rows.append((x.numel() // layer.weight.shape[0], len(x)))
            if k < len(self.norms):
                x, of_batch = self.norms[k](x, given[k] if given else None)
                if of_batch is not None:
                    taken.append(of_batch)
            x = x if layer is self.layers[-1] else F.relu(x)
        self.rows = rows
        return x, seen, taken


def dense(inputs: int, norm: str = "") -> Net:
    return Net([nn.Linear(inputs, 48), nn.Linear(48, 32), nn.Linear(32, 10)], norm)


def conv_of_digits(norm: str = "") -> Net:
    return Net([nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3, stride=2), nn.Linear(64, 10)], norm)


def conv_of_fashion(norm: str = "") -> Net:
    convolutions = [nn.Conv2d(1, 8, 3, stride=2), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3)]
    return Net([*convolutions, nn.Linear(64, 10)], norm)


def mean_of_digits(norm: str = "") -> Net:
    return Net([nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3), nn.Linear(32, 10)], norm, mean=True)


def mean_of_fashion(norm: str = "") -> Net:
    convolutions = [nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2), nn.Conv2d(16, 32, 3, stride=2)]
    return Net([*convolutions, nn.Linear(32, 10)], norm, mean=True)


@functools.cache
def small_fashion() -> Data:
    """14 x 14, 5,000 of them to train on."""
    train, *rest = ((F.avg_pool2d(x, 2), y) for x, y in dataclasses.astuple(images.fashion()))
    return Data((train[0][:5_000], train[1][:5_000]), *rest)


@functools.cache
def few_fashion() -> Data:
    """28 x 28, 1,600 of them to train on, 1,000 to choose by and 1,000 to report on."""
    parts = zip(dataclasses.astuple(images.fashion()), (1_600, 1_000, 1_000), strict=True)
    return Data(*((x[:count], y[:count]) for (x, y), count in parts))


class Training:
    """Stacked networks with their optimizer, and the statistics of their layers: for BNP, and of BatchNorm."""

    def __init__(
        self, build: Callable[[str], Net], method: Normalised, points: Sequence[Point], seeds: Sequence[int]
    ) -> None:
        self.method = method
        self.build = functools.partial(build, method.layer)
        self.networks = Networks(self.build, len(points), seeds)
        self.shape = len(points), len(seeds)
        # Updates are by element, so that the networks of a point are one parameter each.
        tensors = list(zip(self.networks.stacked.values(), self.networks.gradients, strict=True))
        of = [[parameter(t.detach()[i], g[i]) for t, g in tensors] for i in range(len(points))]
        self.optimizer = method.optimizer(of, points)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        module = self.networks.module
        layers = module.layers if method.is_bnp else ()
        # Of all networks one layer with a group for each, weight and bias: what Coordinates transforms in one call.
        self.merged = [parameter(t.detach().flatten(0, 2), g.flatten(0, 2)) for t, g in tensors[: 2 * len(layers)]]
        self.of_inputs = [self.start(layer.weight.shape[1]) for layer in layers]
        self.least = torch.tensor([point.get("eps1", LEAST.start) for point in points])[:, None, None]
        #: The share of a batch in BatchNorm's statistics.
        self.running = torch.tensor([point.get("running", 0.0) for point in points])[:, None, None]
        self.of_norms = [self.start(norm.channels) for norm in module.norms if norm.kind == "BatchNorm"]

    def start(self, channels: int) -> Moments:
        return torch.zeros(*self.shape, channels), torch.ones(*self.shape, channels)

    def step(self, x: Tensor, y: Tensor, share: float) -> None:
        """One step on a batch of each seed, at a share of the learning rate."""
        losses, seen, taken = self.networks.each(self.loss, x, y)
        self.networks.backward(losses)
        pairs = zip(self.of_norms, taken, strict=True)
        self.of_norms = [(mean.lerp(m, self.running), var.lerp(v, self.running)) for (mean, var), (m, v) in pairs]
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * share
        pairs = zip(self.of_inputs, seen, strict=True)
        self.of_inputs = [moved(*old, new, CONSTANTS["stat_momentum"]) for old, new in pairs]
        with torch.no_grad():
            if self.method.norm == BNPS["Adam"]:
                step_in_z(self.coordinates(), {}, self.step_on)
            else:
                for of in self.coordinates():
                    self.put(of.gradients())
                self.optimizer.step()

    def loss(self, network: Callable[..., Any], x: Tensor, y: Tensor) -> tuple[Tensor, list[Moments], list[Moments]]:
        logits, seen, taken = network(x, None, self.method.is_bnp)
        return F.cross_entropy(logits, y), seen, taken

    def coordinates(self) -> list[Coordinates]:
        """Of every layer, all networks together; none where BNP is not used."""
        found, rows = [], self.networks.module.rows if self.method.is_bnp else []
        of_layers = zip(self.merged[::2], self.merged[1::2], self.of_inputs, rows, strict=True)
        for weight, bias, (mean, var), (count, samples) in of_layers:
            s2 = squared_scales(var, self.least, CONSTANTS["eps2"])
            of_rows = {OF_ROWS: (count, count), OF_IMAGES: (samples, samples)}
            q2 = squared_q(weight, *of_rows.get(self.method, (count, samples)))
            found.append(Coordinates(weight, bias, mean.flatten(), s2.flatten(), q2))
        return found

    def put(self, gradients: dict[Tensor, Tensor]) -> None:
        for p, g in gradients.items():
            p.grad.copy_(g)  # type: ignore[union-attr]

    def step_on(self, gradients: dict[Tensor, Tensor]) -> None:
        self.put(gradients)
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and share of errors of every network, with running statistics: (copies, seeds)."""
        loss, wrong = torch.zeros(()), torch.zeros(())
        statistics = [t for of in self.of_norms for t in of]

        def sums(network: Callable[..., Any], x: Tensor, y: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
            return images.losses_of(lambda x: network(x, list(zip(given[::2], given[1::2], strict=True)))[0], x, y)

        for part in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            inputs = [t.expand(*self.shape, *t.shape) for t in part]
            more = self.networks.each(sums, *inputs, *statistics, shared=False)
            loss, wrong = loss + more[0], wrong + more[1]
        return loss / len(y), wrong / len(y)

    def one(self, i: int, j: int) -> tuple[Callable[[Tensor], Tensor], Net]:
        """The network of a point and seed, as it evaluates, and its module."""
        module = self.build()
        parameters = {name: t.detach()[i, j] for name, t in self.networks.stacked.items()}
        given = [(mean[i, j], var[i, j]) for mean, var in self.of_norms]
        return lambda x: functional_call(module, parameters, (x, given))[0], module

    def conditions(self, i: int, j: int, x: Tensor) -> list[list[float]]:
        """Of every layer of one network: condition numbers of its extended inputs, plain and as BNP sees them."""
        network, module = self.one(i, j)
        inputs: list[Tensor] = []
        hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in module.layers]
        with torch.no_grad():
            network(x)
        for hook in hooks:
            hook.remove()
        eps1 = self.least[i].item()
        return [condition_numbers(layer, of, eps1) for layer, of in zip(module.layers, inputs, strict=True)]


def parameter(value: Tensor, grad: Tensor) -> nn.Parameter:
    """With the memory of both."""
    p = nn.Parameter(value)
    p.grad = grad
    return p


def condition_numbers(layer: nn.Module, x: Tensor, eps1: float) -> list[float]:
    """Of the rows that a layer sees, as they are and with channels standardised as by BNP, whose taps share a scale."""
    var, mean = torch.var_mean(x, channel_dims(x), correction=0)
    s2 = squared_scales(var, eps1, CONSTANTS["eps2"])
    shape = (-1, *[1] * (x.dim() - 2))
    found = []
    for of in (x, (x - mean.view(shape)) / s2.sqrt().view(shape)):
        rows = of if isinstance(layer, nn.Linear) else F.unfold(of, layer.kernel_size, stride=layer.stride).mT
        found.append(precond.diagnostics.layer_conditions(rows)["inputs"])
    return found


@dataclasses.dataclass(frozen=True)
class Normalising(Images):
    """Training of a network on some passes; the learning rate falls linearly to 0, the score is the loss at the end."""

    build: Callable[..., Net]
    decay: bool = True
    searched: tuple[int, ...] = (0, 1, 2)
    reported: tuple[int, ...] = tuple(range(100, 120))

    runoff, priced = tuple(range(50, 57)), ()

    def taken(self) -> list[int]:
        """Steps after which conditions are taken; the first is the start."""
        return [k * self.steps // (TAKEN - 1) for k in range(TAKEN)]

    def train(  # type: ignore[override]
        self, method: Normalised, points: Sequence[Point], seeds: Sequence[int], *, test: bool, tick: Callable[[], Any]
    ) -> list[list[dict[str, Any]]]:
        """The record of every point and seed. The test set is touched only with ``test``, after the last step."""
        training = Training(self.build, method, points, seeds)
        x, y = self.parts.train
        few = [t[:1000] for t in self.parts.validation]
        curve, positions, taken = [], set(self.positions()), set(self.taken() if test else ())
        conditions: list[list[Any]] = [[] for _ in range(min(SHOWN, len(seeds)))]

        def look(step: int) -> None:
            if step in positions:
                curve.append(training.evaluate(*few)[0])
            if step in taken:
                for j, of in enumerate(conditions):
                    of.append(training.conditions(0, j, x[:SEEN]))

        for step, rows in enumerate(self.batches(seeds)):
            look(step)
            training.step(x[rows], y[rows], 1.0 - step / self.steps)
            tick()
        look(self.steps)
        found = dict(zip(("score", "validation_error"), training.evaluate(*self.parts.validation), strict=True))
        found["curve"] = torch.stack(curve, -1)
        if test:
            found["test"], found["test_error"] = training.evaluate(*self.parts.test)
        records = training.networks.records(found)
        for j, of in enumerate(conditions if test else ()):
            records[0][j]["conditions"] = of
        return records


#: Passes over the 1,000 images.
PASSES = 3
TASKS = {
    **{
        f"{net}-{size}": Normalising(images.digits, build, PASSES, size)
        for net, build in (("dense", functools.partial(dense, 64)), ("conv", conv_of_digits))
        for size in normalisers.SIZES
    },
    "mean-1": Normalising(images.digits, mean_of_digits, PASSES, 1),
    "mean-8": Normalising(images.digits, mean_of_digits, PASSES, 8),
    # Of 28 x 28: the dearest step of all, so few of them.
    "mean-large": Normalising(few_fashion, mean_of_fashion, 1, 8, reported=tuple(range(100, 110))),
    "online-dense": Normalising(small_fashion, functools.partial(dense, 196), 1, 1),
    "online-conv": Normalising(small_fashion, conv_of_fashion, 1, 1),
}
