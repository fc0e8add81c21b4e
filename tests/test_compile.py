"""torch.compile over every optimizer and wrapper: the bits of an eager run, no more graphs than torch has, none for a new lr."""

from __future__ import annotations

import copy
import functools
import gc

import pytest
import torch
from support.cases import BACKEND
from support.dcp_training import data, model_of, weights
from support.methods import ALL, AROUND_STATES, Method, of_class
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import precond

pytestmark = [
    pytest.mark.skipif(BACKEND != "cpu", reason="Dynamo sees the same of every backend"),
    pytest.mark.filterwarnings("ignore"),  # what Dynamo says of profilers and graph breaks
]

STEPS = 3
METHODS = [*ALL, *AROUND_STATES]
#: What is compiled, and who changes lr meanwhile.
WAYS = {"a train step": "assigned", "a step with a closure": "scheduled", "step alone": "a tensor"}
STOCK = Method("torch's AdamW", of_class(torch.optim.AdamW, lr=0.01))


@pytest.fixture(autouse=True, scope="module")
def _fast():
    """One thread; and no timing of guards, for which Dynamo empties the cache: a third of the time here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0, raising=False)
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
    assert graphs <= graphs_of_stock(way)
    if way == "a train step" and not method.closure:
        assert graphs == 1  # of the forward
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
    assert training.scaler.get_scale() == eager.scaler.get_scale() == 512.0
    assert all(map(torch.equal, training.model.parameters(), eager.model.parameters()))


# What BNP sees of a compiled model.


def twice(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net(x) + net(x.flip(0))


def checkpointed(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(net, x, use_reentrant=False)


def with_other_weights(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    doubled = {name: 2.0 * p.detach() for name, p in net.named_parameters()}
    return net(x) + torch.func.functional_call(net, doubled, (x,))


def mapped(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net(x) + torch.vmap(net)(x.unsqueeze(0))[0]


def partly_without_gradients(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        seen = net(x)
    return net(x) + seen


def observed(forward, backend, micro_batches=2):
    """Parameters and statistics after steps of a model that is compiled, unless ``backend`` is None."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = precond.BNP(net, precond.AdamW(net.parameters(), lr=0.01), stat_momentum=0.5)
    run = forward if backend is None else torch.compile(forward, backend=backend)
    for step, rows in enumerate((5, 5, 7, 3)):
        optimizer.zero_grad()
        for batch in range(micro_batches):
            generator = torch.Generator().manual_seed(10 * step + batch)
            run(net, torch.randn(rows, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()], [optimizer.own[layer.weight] for layer in (net[0], net[2])]


@pytest.mark.parametrize("forward", [twice, checkpointed, with_other_weights, mapped, partly_without_gradients])
def test_a_compiled_model_shows_what_an_eager_one_does(forward):
    """For batches of several sizes, and by a backend that makes other tensors of weights and inputs."""
    params, statistics = observed(forward, None)
    found, others = observed(forward, "aot_eager")
    assert all(map(torch.equal, params, found))
    for own, other in zip(statistics, others, strict=True):
        assert own["rows"] == other["rows"] == 6 * (2 if forward is twice else 1)
        assert torch.equal(own["mean"], other["mean"])
        assert torch.equal(own["var"], other["var"])


def test_what_a_graph_has_of_a_hook_is_a_proper_operator_and_outlives_its_optimizer():
    net = nn.Linear(6, 8)
    optimizer = precond.BNP(net, precond.AdamW(net.parameters()))
    (hook,) = net._forward_hooks.values()
    arguments = hook.token, net.weight.detach(), torch.randn(3, 6), torch.randn(3, 8)
    torch.library.opcheck(torch.ops.precond.observe.default, arguments)
    assert not optimizer._pending  # it hands over copies
    torch.ops.precond.observe(*arguments)
    assert optimizer._pending[net.weight].rows == 3
    compiled, x = torch.compile(net, backend="eager"), torch.randn(3, 6)
    copied = torch.compile(copy.deepcopy(net), backend="eager")
    optimizer.remove()
    for other in (copied, compiled):
        other(x).sum().backward()
    assert not optimizer._pending
    del optimizer
    gc.collect()
    torch.ops.precond.observe(*arguments)
