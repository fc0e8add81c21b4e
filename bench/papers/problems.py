"""Problems whose data are drawn: least squares, softmax regression, sparse parity, staircase, and a language of order 2."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Problem:
    """``world(seed)`` has what a seed draws once; ``draw`` takes a batch of it."""

    build: Callable[[], nn.Module]
    world: Callable[[torch.Generator], Any]
    #: Inputs and targets of a batch of so many; ``exact`` targets are expectations.
    draw: Callable[[Any, torch.Generator, int, bool], tuple[Tensor, Tensor]]
    #: Of what a full batch, a validation set and a test set have.
    whole: int
    held_out: int
    cross_entropy: bool = False


# Least squares and softmax regression on inputs of condition number 100.

INPUTS, CLASSES, OUTPUTS = 12, 5, 4


def orthogonal(draw: torch.Generator, size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=draw))[0]


def root_of(draw: torch.Generator) -> Tensor:
    """Of a covariance with eigenvalues from 1e-2 to 1, in a random basis."""
    return torch.logspace(-1, 0, INPUTS)[:, None] * orthogonal(draw, INPUTS)


class Mixed(nn.Module):
    """A W x with a matrix A that is given beside x: the Gauss-Newton matrix is A^T A (x) E[x x^T]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(OUTPUTS, INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        A = x[..., INPUTS:].unflatten(-1, (OUTPUTS, OUTPUTS))
        return (A @ (x[..., :INPUTS] @ self.weight.T)[..., None])[..., 0]


def mixed_world(draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    A = torch.logspace(-1, 0, OUTPUTS)[:, None] * orthogonal(draw, OUTPUTS)
    return root_of(draw), A, torch.randn(OUTPUTS, INPUTS, generator=draw)


def draw_mixed(world: Any, draw: torch.Generator, size: int, exact: bool) -> tuple[Tensor, Tensor]:
    root, A, W = world
    x = torch.randn(size, INPUTS, generator=draw) @ root
    y = x @ W.T @ A.T
    if not exact:
        y = y + 0.1 * torch.randn(size, OUTPUTS, generator=draw)
    return torch.cat([x, A.flatten().expand(size, -1)], 1), y


def labelled(p: Tensor, draw: torch.Generator, exact: bool) -> Tensor:
    """Probabilities, or labels that are drawn with them, as such."""
    if exact:
        return p
    labels = torch.multinomial(p.flatten(0, -2), 1, generator=draw)[:, 0]
    return F.one_hot(labels, p.shape[-1]).to(p).view_as(p)


def softmax_world(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    return root_of(draw), 3.0 * torch.randn(CLASSES, INPUTS, generator=draw)


def draw_softmax(world: Any, draw: torch.Generator, size: int, exact: bool) -> tuple[Tensor, Tensor]:
    root, W = world
    x = torch.randn(size, INPUTS, generator=draw) @ root
    return x, labelled((x @ W.T).softmax(-1), draw, exact)


# Sparse parity and staircase (docs/theory.md, C.5): the whole batch is every input.

BITS, WIDTH = 10, 24
CUBE = 2.0 * ((torch.arange(2**BITS)[:, None] >> torch.arange(BITS)) & 1) - 1.0


def parity(x: Tensor) -> Tensor:
    return x[:, :3].prod(1, keepdim=True)


def staircase(x: Tensor) -> Tensor:
    return x[:, :4].cumprod(1).sum(1, keepdim=True)


def bits(labels: Callable[[Tensor], Tensor]) -> Problem:
    def draw_bits(world: Any, draw: torch.Generator, size: int, exact: bool) -> tuple[Tensor, Tensor]:
        if exact:
            return CUBE, labels(CUBE)
        x = CUBE[torch.randint(len(CUBE), (size,), generator=draw)]
        return x, labels(x) + 0.5 * torch.randn(size, 1, generator=draw)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(BITS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    return Problem(build, lambda draw: None, draw_bits, len(CUBE), len(CUBE))


# A language whose next token hangs on the two before.

TOKENS, LENGTH, DIM = 8, 9, 8


class Transformer(nn.Module):
    """One layer with one head, normalised before each part; a logit for each position that has two tokens."""

    def __init__(self) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)

        self.token, self.position = weight(TOKENS, DIM), weight(LENGTH, DIM)
        self.query, self.key, self.value, self.output = (weight(DIM, DIM) for _ in range(4))
        self.up, self.down, self.head = weight(2 * DIM, DIM), weight(DIM, 2 * DIM), weight(TOKENS, DIM)

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.token + self.position
        n = F.rms_norm(h, (DIM,))
        scores = (n @ self.query.T) @ (n @ self.key.T).mT * DIM**-0.5
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        h = h + scores.where(mask, -1e9).softmax(-1) @ (n @ self.value.T) @ self.output.T
        h = h + F.relu(F.rms_norm(h, (DIM,)) @ self.up.T) @ self.down.T
        return F.rms_norm(h, (DIM,))[..., 1:, :] @ self.head.T


def language(draw: torch.Generator) -> Tensor:
    return (1.5 * torch.randn(TOKENS, TOKENS, TOKENS, generator=draw)).softmax(-1)


def draw_language(world: Tensor, draw: torch.Generator, size: int, exact: bool) -> tuple[Tensor, Tensor]:
    tokens = [torch.randint(TOKENS, (size,), generator=draw) for _ in range(2)]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(world[tokens[-2], tokens[-1]], 1, generator=draw)[:, 0])
    all_ = torch.stack(tokens, 1)
    x, after = F.one_hot(all_[:, :LENGTH], TOKENS).float(), all_[:, 2 : LENGTH + 1]
    p = world[all_[:, : LENGTH - 1], all_[:, 1:LENGTH]]
    return x, p if exact else F.one_hot(after, TOKENS).float()


PROBLEMS = {
    "regression": Problem(Mixed, mixed_world, draw_mixed, 512, 1024),
    "softmax": Problem(lambda: nn.Linear(INPUTS, CLASSES), softmax_world, draw_softmax, 512, 1024, True),
    "parity": bits(parity),
    "staircase": bits(staircase),
    "transformer": Problem(Transformer, language, draw_language, 128, 256, True),
}


def loss_of(cross_entropy: bool) -> Callable[..., Tensor]:
    """Over a batch: half the squared distance, or the divergence from the probabilities of the target."""

    def loss(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        return each(network(x), y).mean()

    def each(f: Tensor, y: Tensor) -> Tensor:
        if cross_entropy:
            return (torch.special.xlogy(y, y) - y * f.log_softmax(-1)).sum(-1)
        return (f - y).square().sum(-1) / 2

    return loss


def wrong_of(cross_entropy: bool) -> Callable[..., Tensor]:
    """The share of outputs that are nearer to another answer."""

    def wrong(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        f = network(x)
        right = f.argmax(-1) == y.argmax(-1) if cross_entropy else ((f - y).abs() <= 0.5).all(-1)
        # What is not a number is no answer.
        return 1.0 - (right & f.isfinite().all(-1)).float().mean()

    return wrong


def score_of(cross_entropy: bool) -> Callable[..., Tensor]:
    """Of one input: its gradient is J^T times minus the slope on an output that the model drew, from ``noise``."""

    def scored(network: Callable[[Tensor], Tensor], x: Tensor, noise: Tensor) -> Tensor:
        f = network(x[None])[0]
        if not cross_entropy:
            return -(f * noise).sum()
        drawn = (f.detach() + noise).detach()
        label = (drawn == drawn.amax(-1, keepdim=True)).to(f)
        return -(label * f.log_softmax(-1)).sum()

    return scored
