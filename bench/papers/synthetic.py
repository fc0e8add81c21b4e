"""Training on drawn problems by rules in bases: what bench/claims.py searches and reports of Adam or Gauss-Newton."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .frames import frame
from .problems import PROBLEMS, Problem, loss_of, score_of, wrong_of
from .rules import Rule
from .search import Point
from .stacked import Networks

MARKS = 20
#: Losses below are 0: float32 has no more.
FLOOR = 1e-12
#: Gradients whose squares, summed, are finite in float32.
LARGEST = 1e15
#: Steps of the curvature's own batches before the first of the parameters.
WARM = 8


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Training on all data or on fresh batches; the learning rate falls linearly to 0, the score is the loss at the end."""

    problem: str
    #: 0: the whole batch with exact targets, so that nothing is noise.
    batch: int
    steps: int
    #: Inputs of the curvature's own batch at every step, and the decay of the mean over such batches: about 1000 inputs each
    #: way, while a curvature of before 100 steps is of another network.
    curvature_batch: int = 32
    beta2: float = 0.95
    #: Steps between batches that bases learn from, and between bases.
    learn: int = 1
    refresh: int = 20
    searched: tuple[int, ...] = (0, 1, 2)
    reported: tuple[int, ...] = tuple(range(100, 140))

    unit, ratios = "loss", True
    runoff, priced = tuple(range(50, 57)), ()

    def settings(self) -> dict[str, Any]:
        names = ("batch", "steps", "curvature_batch", "beta2", "learn", "refresh")
        count = sum(p.numel() for p in self.of.build().parameters())
        return {**{name: getattr(self, name) for name in names}, "parameters": count}

    @property
    def of(self) -> Problem:
        return PROBLEMS[self.problem]

    def positions(self) -> list[int]:
        return sorted({-(-k * self.steps // MARKS) for k in range(MARKS + 1)})

    def drawn(self, worlds: list[Any], draws: list[torch.Generator], size: int, exact: bool) -> tuple[Tensor, Tensor]:
        """(seeds, size, ...) each."""
        pairs = [self.of.draw(world, draw, size, exact) for world, draw in zip(worlds, draws, strict=True)]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])

    def noise(self, draws: list[torch.Generator], shape: torch.Size) -> Tensor:
        """Signs, which have the covariance 1 of a model with squared loss, or Gumbel's noise, whose maximum draws a label."""
        if self.of.cross_entropy:
            return torch.stack([-(-torch.rand(shape, generator=draw).clamp(min=1e-12).log()).log() for draw in draws])
        return torch.stack([2.0 * torch.randint(2, shape, generator=draw) - 1.0 for draw in draws])

    def samples(self, networks: Networks, worlds: list[Any], draws: list[torch.Generator]) -> list[Tensor]:
        """Gradients of every input of the curvature's batch; the sum of their outer products is the Gauss-Newton matrix."""
        x, y = self.drawn(worlds, draws, self.curvature_batch, False)
        found = networks.each_input(score_of(self.of.cross_entropy), x, self.noise(draws, y.shape[1:]))
        # Of a sequence the mean is over its tokens.
        count = y[0].numel() // y.shape[-1]
        return [g * count**-0.5 for g in found]

    def train(
        self, method: Rule, points: Sequence[Point], seeds: Sequence[int], *, test: bool, tick: Callable[[], Any]
    ) -> list[list[dict[str, Any]]]:
        """The record of every point and seed."""
        networks = Networks(self.of.build, len(points), seeds)

        def generators(kind: int) -> list[torch.Generator]:
            return [torch.Generator().manual_seed(10 * seed + kind) for seed in seeds]

        worlds = [self.of.world(draw) for draw in generators(0)]
        data, curvature = generators(1), generators(2)
        whole = self.drawn(worlds, generators(3), self.of.whole, True) if not self.batch else None
        validation = self.drawn(worlds, generators(4), self.of.held_out, True)
        loss, wrong = loss_of(self.of.cross_entropy), wrong_of(self.of.cross_entropy)
        stacked = list(networks.stacked.values())
        shapes = [t.shape[2:] for t in stacked]
        axes = frame(method.frame, shapes, self.beta2, method.share)
        sees = method.is_curved or axes.learns
        warm = [self.samples(networks, worlds, curvature) for _ in range(WARM if sees else 0)]
        for of in warm:
            axes.learn(of)
        axes.refresh()
        rotated = Rotated(method, networks, points, axes, self.beta2)
        angles = Angles(self.beta2) if test and method.is_curved and not axes.learns else None

        def evaluate(data: tuple[Tensor, Tensor]) -> Tensor:
            with torch.no_grad():
                return networks.each(loss, *data).clamp(min=FLOOR)

        for of in warm if method.is_curved else ():
            rotated.feed(axes.squares(of))
        for _ in range(WARM if method.kind == "class" else 0):
            rotated.feed_mean(self.samples(networks, worlds, curvature))
        curve, positions = [], set(self.positions())
        for step in range(self.steps):
            if step in positions:
                curve.append(evaluate(validation))
            if sees:
                of = self.samples(networks, worlds, curvature)
                if step % self.learn == 0:
                    axes.learn(of)
                if step and step % self.refresh == 0:
                    rotated.refresh()
                if method.is_curved:
                    rotated.feed(axes.squares(of))
            elif method.fed_every and step % method.fed_every == 0:
                rotated.feed_mean(self.samples(networks, worlds, curvature))
            networks.backward(networks.each(loss, *(whole or self.drawn(worlds, data, self.batch, False))))
            rotated.step(1.0 - step / self.steps)
            if angles is not None:
                angles.add(networks.gradients, axes.squares(of))
                if step + 1 in positions:
                    angles.take()
            tick()
        end = evaluate(validation)
        curve.append(end)
        found = {"score": end, "curve": torch.stack(curve, -1)}
        if test:
            held_out = self.drawn(worlds, generators(5), self.of.held_out, True)
            found["test"] = evaluate(held_out)
            found["test_error"] = networks.each(wrong, *held_out)
            if angles is not None:
                found["cosine"] = torch.stack(angles.taken, -1)
        return networks.records(found)


class Rotated:
    """An optimizer of precond on the coordinates z of a frame: a group for each point, a parameter for each network."""

    def __init__(self, method: Rule, networks: Networks, points: Sequence[Point], frame: Any, beta2: float) -> None:
        self.method, self.networks, self.frame = method, networks, frame
        self.stacked = list(networks.stacked.values())
        self.shape = self.stacked[0].shape[:2]
        self.z = [t.detach().clone() for t in frame.turn([t.detach() for t in self.stacked])]
        self.gradients = [torch.zeros_like(z) for z in self.z]
        #: ``views[k][i][j]``: of tensor k, point i and seed j.
        self.views = [
            [[nn.Parameter(z[i, j]) for j in range(self.shape[1])] for i in range(self.shape[0])] for z in self.z
        ]
        for views, g in zip(self.views, self.gradients, strict=True):
            for i, j in self._indices():
                views[i][j].grad = g[i, j]
        of = [[views[i][j] for views in self.views for j in range(self.shape[1])] for i in range(self.shape[0])]
        self.optimizer = method.optimizer(of, points, beta2)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def _indices(self) -> Iterator[tuple[int, int]]:
        return ((i, j) for i in range(self.shape[0]) for j in range(self.shape[1]))

    def refresh(self) -> None:
        """Take the frame's bases of now, and bring z and the states into them."""
        before = copy.copy(self.frame)
        self.frame.refresh()
        self._put(self.z, self.frame.turn([t.detach() for t in self.stacked]))
        state = self.optimizer.state
        for name in ("exp_avg", "exp_avg_sq", "curvature"):
            if name not in state.get(self.views[0][0][0], {}):
                continue
            of = [
                torch.stack([torch.stack([state[p][name].float() for p in row]) for row in views])
                for views in self.views
            ]
            new = self.frame.turn(before.back(of)) if name == "exp_avg" else self.frame.moved(of, before)
            for views, t in zip(self.views, new, strict=True):
                for i, j in self._indices():
                    state[views[i][j]][name].copy_(t[i, j])

    @staticmethod
    def _put(to: list[Tensor], values: list[Tensor]) -> None:
        with torch.no_grad():
            for t, value in zip(to, values, strict=True):
                t.copy_(value)

    def _taken(self, g: Tensor) -> Tensor:
        """0 for the class's own basis where a network has diverged: it raises on what has no eigenvectors."""
        if self.method.kind != "class":
            return g
        size = g.abs().flatten(2).amax(2)[(..., *[None] * (g.dim() - 2))]
        return torch.where(size < LARGEST, g, 0.0)

    def feed(self, h: list[Tensor]) -> None:
        """The diagonal of the Gauss-Newton matrix in the frame."""
        estimates = [t[i, j] for i in range(self.shape[0]) for t in h for j in range(self.shape[1])]
        self.optimizer.update_curvature(estimates=estimates)

    def feed_mean(self, samples: list[Tensor]) -> None:
        """The gradient of the mean loss on labels that the model drew, times the root of the batch size: Sophia has that in its
        step, as an option.
        """
        inside = self.optimizer.param_groups[0].get("batch_size", 1.0)
        self._put(self.gradients, [self._taken(s.sum(2) / inside**0.5) for s in samples])
        self.optimizer.update_curvature()

    def step(self, share: float) -> None:
        """One step on the networks' gradients, at a share of the learning rate."""
        self._put(self.gradients, [self._taken(g) for g in self.frame.turn(self.networks.gradients)])
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * share
        self.optimizer.step()
        self._put(self.stacked, self.frame.back(self.z))


class Angles:
    """Cosines between g / sqrt(v), with v a mean of g^2, and g / sqrt(h): the directions of Adam and of GN^-1/2."""

    def __init__(self, beta2: float) -> None:
        self.beta2 = beta2
        self.means: list[list[Tensor]] = []
        self.taken: list[Tensor] = []

    def add(self, gradients: list[Tensor], h: list[Tensor]) -> None:
        new = [[g.square() for g in gradients], h]
        old = self.means or new
        self.means = [
            [a.lerp(b, 1.0 - self.beta2) for a, b in zip(*pair, strict=True)] for pair in zip(old, new, strict=True)
        ]
        self.gradients = gradients

    def take(self) -> None:
        parts = []
        for g, v, h in zip(self.gradients, *self.means, strict=True):
            a, b = g / (v.sqrt() + 1e-12), g / (h.sqrt() + 1e-12)
            parts.append(torch.stack([(x * y).flatten(2).sum(2) for x, y in ((a, b), (a, a), (b, b))]))
        ab, aa, bb = torch.stack(parts).sum(0)
        self.taken.append(ab / (aa * bb).sqrt())


#: With all data the curvature is of as many inputs in a few steps: Gauss-Newton is not to lose by a poor estimate.
MANY = dict(curvature_batch=256, beta2=0.8)
LARGE = dict(learn=5, refresh=40, reported=tuple(range(100, 120)))
TASKS = {
    **{f"{name}-full": Synthetic(name, 0, 100, **MANY) for name in ("regression", "softmax", "parity", "staircase")},
    **{f"{name}-small": Synthetic(name, 16, 400) for name in ("regression", "softmax", "parity", "staircase")},
    # Of a sequence each token is an input.
    "transformer-full": Synthetic("transformer", 0, 200, **{**MANY, **LARGE, "curvature_batch": 128}),
    "transformer-small": Synthetic("transformer", 16, 400, **LARGE),
}
