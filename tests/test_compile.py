"""torch.compile over every optimizer and wrapper: the bits of an eager run, no more graphs than torch has, none for a new lr."""

from __future__ import annotations

import functools

import pytest
import torch
from support.cases import BACKEND
from support.dcp_training import data, model_of, weights
from support.methods import ALL, AROUND_STATES, Method, of_class
from torch import nn
from torch._dynamo.utils import counters

import precond

pytestmark = [
    pytest.mark.skipif(BACKEND != "cpu", reason="Dynamo sees the same of every backend"),
    pytest.mark.filterwarnings("ignore"),  # what Dynamo says of profilers and graph breaks
]

STEPS = 4
METHODS = [*ALL, *AROUND_STATES]
#: What is compiled, and who changes lr meanwhile.
WAYS = {"a train step": "assigned", "a step with a closure": "scheduled", "step alone": "a tensor"}
STOCK = Method("torch's AdamW", of_class(torch.optim.AdamW, lr=0.01))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Training:
    """A run whose steps are compiled or not."""

    def __init__(self, method: Method, way: str) -> None:
        self.method, self.way = method, way
        self.model = model_of(method)
        self.optimizer = method.make(self.model)
        self.scheduler = None
        if WAYS.get(way) == "a tensor":
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]))
        if WAYS.get(way) == "scheduled":
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0 / (1.0 + step))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)

    def loss(self) -> torch.Tensor:
        return (self.model(self.x).float() - 1.0).square().mean()

    def closure(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def train_step(self) -> torch.Tensor:
        if self.method.closure:
            return self.optimizer.step(self.closure)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def scaled_step(self) -> torch.Tensor:
        loss = self.loss()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss

    def step_with_closure(self) -> torch.Tensor:
        return self.optimizer.step(self.closure)

    def function(self):
        """What is compiled."""
        if self.way == "step alone":
            return self.optimizer.step
        return {
            "a train step": self.train_step,
            "a step with a closure": self.step_with_closure,
            "a scaled step": self.scaled_step,
        }[self.way]

    def run(self, step) -> list[float]:
        """Losses of all steps. ``step`` is the function, compiled or not; ``frames`` counts what was compiled until each."""
        losses, self.frames = [], []
        for number in range(STEPS):
            self.x = data(self.method, number)
            if self.way == "step alone" and not self.method.closure:
                losses.append(self.closure().item())
                step()
            else:
                losses.append((step(self.closure) if self.way == "step alone" else step()).item())
            self.frames.append(counters["frames"]["total"])
            if self.scheduler is not None:
                self.scheduler.step()
            elif WAYS.get(self.way) is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] *= 0.75  # a tensor in place
        return losses


def compiled(method: Method, way: str) -> tuple[Training, list[float], int]:
    """A compiled run, its losses, and the number of its graphs."""
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    training = Training(method, way)
    return training, training.run(torch.compile(training.function(), backend=backend)), len(graphs)


@functools.cache
def graphs_of_stock(way: str) -> int:
    return compiled(STOCK, way)[2]


def watched(method: Method, model: nn.Module) -> int:
    """How many layers have a hook of BNP, which runs between two graphs."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    return len(layers) if method.name.startswith("bnp") else 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_compiled_run_is_the_eager_one_in_no_more_graphs_than_stocks(method, way):
    eager = Training(method, way)
    expected = eager.run(eager.function())
    training, losses, graphs = compiled(method, way)
    assert losses == expected
    found = weights(training.model, training.optimizer)
    for name, value in weights(eager.model, eager.optimizer).items():
        assert torch.equal(found[name], value), name
    layers = watched(method, training.model)
    assert graphs <= graphs_of_stock(way) + layers
    if way == "a train step" and not method.closure:
        assert graphs == (layers or 1)  # of the forward alone
    # Neither a new lr nor states that the first step has made. torch's classes compile their second step again.
    assert training.frames[0] > 0
    assert training.frames == training.frames[:1] * STEPS


SCALED = [
    *(method for method in METHODS if not method.closure and method.name in ("adamw", "muon", "grouped", "bnp", "fop")),
    Method("fused", of_class(precond.AdamW, lr=0.01, fused=True)),
    Method("fused_clipped", of_class(precond.AdamW, lr=0.01, fused=True, max_grad_norm=0.1)),
]


@pytest.mark.parametrize("method", SCALED, ids=str)
def test_a_compiled_step_may_have_a_loss_scaler(method):
    eager = Training(method, "a scaled step")
    expected = eager.run(eager.function())
    training, losses, _ = compiled(method, "a scaled step")
    assert losses == expected
    assert training.scaler.get_scale() == eager.scaler.get_scale() == 1024.0
    assert all(map(torch.equal, training.model.parameters(), eager.model.parameters()))
