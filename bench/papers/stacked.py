"""Many small networks of one kind at once: their parameters are views of stacked tensors, and torch.func runs them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


class Networks:
    """``copies`` x seeds networks. Those of a seed start alike and see the same inputs; none knows of another.

    ``parameters[i][j]`` are those of copy i and seed j, ordinary parameters with gradients, for any optimizer.
    """

    def __init__(self, build: Callable[[], nn.Module], copies: int, seeds: Sequence[int]) -> None:
        modules = []
        for seed in seeds:
            torch.manual_seed(seed)
            modules.append(build())
        self.module = build().to("meta")
        self.names = [name for name, _ in self.module.named_parameters()]
        started = [dict(module.named_parameters()) for module in modules]
        self.stacked: dict[str, Tensor] = {}
        for name in self.names:
            of = torch.stack([parameters[name].detach() for parameters in started])
            self.stacked[name] = of.expand(copies, *of.shape).clone().requires_grad_()
        self.gradients = [torch.zeros_like(t) for t in self.stacked.values()]
        self.parameters = [[self._views(i, j) for j in range(len(seeds))] for i in range(copies)]

    def _views(self, i: int, j: int) -> list[nn.Parameter]:
        views = []
        for t, g in zip(self.stacked.values(), self.gradients, strict=True):
            p = nn.Parameter(t.detach()[i, j])
            p.grad = g[i, j]
            views.append(p)
        return views

    def each(self, of_one: Callable[..., Any], *inputs: Tensor, shared: bool = True) -> Any:
        """``of_one(network, *inputs)`` of every network: inputs of each seed, (seeds, ...), or with ``shared=False`` of each."""

        def called(parameters: dict[str, Tensor], *inputs: Tensor) -> Any:
            return of_one(lambda *x: functional_call(self.module, parameters, x), *inputs)

        of_seeds = vmap(called, randomness="error")
        return vmap(of_seeds, in_dims=(0, *[None if shared else 0] * len(inputs)))(self.stacked, *inputs)

    def each_input(self, score: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        """Gradients of ``score(network, *input)`` for every input of every network: (copies, seeds, batch, *shape)."""

        def called(parameters: dict[str, Tensor], *one: Tensor) -> Tensor:
            return score(lambda *x: functional_call(self.module, parameters, x), *one)

        of_batch = vmap(grad(called), in_dims=(None, *[0] * len(inputs)))
        parameters = {name: t.detach() for name, t in self.stacked.items()}
        found = vmap(vmap(of_batch), in_dims=(0, *[None] * len(inputs)))(parameters, *inputs)
        return list(found.values())

    def finite(self) -> Tensor:
        """Which networks have finite parameters, (copies, seeds)."""
        return torch.stack([t.detach().isfinite().flatten(2).all(2) for t in self.stacked.values()]).all(0)

    @staticmethod
    def records(found: dict[str, Tensor]) -> list[list[dict[str, Any]]]:
        """One for every copy and seed, of tensors (copies, seeds, ...)."""
        lists = {name: values.tolist() for name, values in found.items()}
        copies, seeds = next(iter(found.values())).shape[:2]
        return [[{name: of[i][j] for name, of in lists.items()} for j in range(seeds)] for i in range(copies)]

    def backward(self, losses: Tensor) -> None:
        """Gradients of every network's loss, (copies, seeds). One that diverged has NaN of its own."""
        for buffer, g in zip(
            self.gradients, torch.autograd.grad(losses.sum(), list(self.stacked.values())), strict=True
        ):
            buffer.copy_(g)
