"""The harness of BNP's experiments: stacked networks train as one does by the library and by torch's modules."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import precond
from bench import claims
from bench.papers import images, jobs, normal_tables, normalised, normalisers
from bench.papers.normalised import Training
from bench.papers.normalisers import MOMENTUM, Normalised

BUILDS = {
    "dense": functools.partial(normalised.dense, 64),
    "conv": normalised.conv_of_digits,
    "mean": normalised.mean_of_digits,
}
POINTS = [{"lr": 0.01, "running": 0.1}, {"lr": 0.02, "running": 0.1}]
#: BNP divides the step of one image by its number of inputs.
FAST = [{"lr": 0.1, "eps1": 0.01}, {"lr": 2.0, "eps1": 0.1}]
SEEDS = (3, 4)


def batches(steps, size=4):
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(steps, len(SEEDS), size, 1, 8, 8, generator=draw) + 0.5
    return list(zip(x, torch.randint(10, (steps, len(SEEDS), size), generator=draw), strict=True))


def sequential(net, norm):
    """The same network of torch's modules."""
    has_bias = norm != "BatchNorm"
    if net == "dense":
        layers = [nn.Linear(64, 48, has_bias), nn.Linear(48, 32, has_bias), nn.Linear(32, 10)]
    elif net == "mean":
        layers = [nn.Conv2d(1, 16, 3, padding=1, bias=has_bias), nn.Conv2d(16, 32, 3, bias=has_bias), nn.Linear(32, 10)]
    else:
        layers = [nn.Conv2d(1, 8, 3, bias=has_bias), nn.Conv2d(8, 16, 3, stride=2, bias=has_bias), nn.Linear(64, 10)]
    of_norm = {
        "": lambda channels: nn.Identity(),
        "BatchNorm": nn.BatchNorm1d if net == "dense" else nn.BatchNorm2d,
        "GroupNorm": lambda channels: nn.GroupNorm(4, channels),
    }[norm]
    parts = [nn.Flatten()] if net == "dense" else []
    for layer in layers[:-1]:
        parts += [layer, of_norm(layer.weight.shape[0]), nn.ReLU()]
    head = {"dense": [], "conv": [nn.Flatten()], "mean": [nn.AdaptiveAvgPool2d(1), nn.Flatten()]}[net]
    return nn.Sequential(*parts, *head, layers[-1])


def copied(training, net, i, j):
    """A network of modules with the parameters of one stacked network."""
    single = sequential(net, training.method.layer)
    own = {name: t.detach()[i, j] for name, t in training.networks.stacked.items()}
    kinds = {"layers": (nn.Linear, nn.Conv2d), "norms": (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)}
    with torch.no_grad():
        for kind, types in kinds.items():
            for k, module in enumerate(m for m in single if isinstance(m, types)):
                for name, p in module.named_parameters():
                    p.copy_(own[f"{kind}.{k}.{name}"])
    return single


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("net", BUILDS)
@pytest.mark.parametrize("name", normalisers.METHODS_OF)
@pytest.mark.parametrize("is_bnp", [False, True])
def test_stacked_networks_train_as_one_does_by_the_library(net, name, is_bnp, size):
    method = Normalised(name, normalisers.BNPS[name] if is_bnp else "")
    i, j, steps = 1, 1, 10
    points = FAST if is_bnp and name == "SGD" else POINTS
    training = Training(BUILDS[net], method, points, SEEDS)
    single = copied(training, net, i, j)
    lr = points[i]["lr"]
    base = (
        precond.SGD(single.parameters(), lr, momentum=MOMENTUM)
        if name == "SGD"
        else precond.Adam(single.parameters(), lr)
    )
    compose = "gradient" if name == "SGD" else "direction"
    eps1 = points[i].get("eps1", 1e-2)
    optimizer = precond.BNP(single, base, eps1=eps1, compose=compose) if is_bnp else base
    started = [p.detach().clone() for p in single.parameters()]
    for step, (x, y) in enumerate(batches(steps, size)):
        share = 1.0 - step / steps
        training.step(x, y, share)
        base.param_groups[0]["lr"] = lr * share
        optimizer.zero_grad()
        F.cross_entropy(single(x[j]), y[j]).backward()
        optimizer.step()
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(single.parameters(), started, strict=True))
    for p, t in zip(single.parameters(), training.networks.stacked.values(), strict=True):
        torch.testing.assert_close(t.detach()[i, j], p.detach(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("norm", normalisers.LAYERS)
@pytest.mark.parametrize("net", BUILDS)
def test_normalised_networks_are_torchs_in_training_and_in_evaluation(net, norm):
    training = Training(BUILDS[net], Normalised("SGD", norm), POINTS, SEEDS)
    i, j = 1, 0
    single = copied(training, net, i, j)
    optimizer = torch.optim.SGD(single.parameters(), POINTS[i]["lr"], momentum=MOMENTUM)
    *seen, (x, y) = batches(9)
    for of in seen:
        training.step(*of, 1.0)
        optimizer.zero_grad()
        F.cross_entropy(single(of[0][j]), of[1][j]).backward()
        optimizer.step()
    again = copied(training, net, i, j)
    for p, q in zip(again.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    if norm == "BatchNorm":
        for k, module in enumerate(m for m in single if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
            for of, own in zip(training.of_norms[k], (module.running_mean, module.running_var), strict=True):
                torch.testing.assert_close(of[i, j], own, rtol=1e-4, atol=1e-4)
    single.eval()
    with torch.no_grad():
        expected = F.cross_entropy(single(x[j]), y[j])
    loss, wrong = training.evaluate(x[j], y[j])
    torch.testing.assert_close(loss[i, j], expected, rtol=1e-4, atol=1e-4)
    assert 0.0 <= wrong[i, j] <= 1.0
    network, _ = training.one(i, j)
    torch.testing.assert_close(network(x[j]), single(x[j]), rtol=1e-4, atol=1e-4)


def small(task):
    data = normalised.TASKS[task].parts

    def few():
        return images.Data(*((x[:60], y[:60]) for x, y in (data.train, data.validation, data.test)))

    return dataclasses.replace(normalised.TASKS[task], data=few, epochs=1, reported=(100, 101, 102))


@pytest.mark.parametrize("method", normalisers.METHODS["conv-2"], ids=lambda of: of.name)
def test_a_run_depends_on_its_point_and_seed_alone(method):
    task = small("conv-2")
    together = task.train(method, [{"lr": 3e3}, *POINTS], (1, 7), test=False, tick=lambda: None)
    alone = task.train(method, POINTS[1:], (7,), test=False, tick=lambda: None)
    for key in ("score", "validation_error", "curve"):
        assert together[2][1][key] == pytest.approx(alone[0][0][key], rel=1e-3), key


def test_condition_numbers_are_those_of_the_diagnostics():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 1, 3, 1, 10, 1]) + 2.0
    expected = precond.diagnostics.layer_conditions(x)
    found = normalised.condition_numbers(nn.Linear(6, 2), x, 1e-2)
    assert found == pytest.approx([expected["inputs"], expected["bnp"]], rel=1e-4)
    # A kernel of one tap is a dense layer on the channels of every position.
    positions = x.view(75, 2, 2, 6).permute(0, 3, 1, 2)
    assert normalised.condition_numbers(nn.Conv2d(6, 2, 1), positions, 1e-2) == pytest.approx(found, rel=1e-4)


def test_batch_norm_is_left_out_where_torch_has_none():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(4)(torch.randn(1, 4))
    for task, methods in normalisers.METHODS.items():
        if task not in normalisers.MEANS:
            assert (Normalised("SGD", "BatchNorm") in methods) == (task not in ("dense-1", "online-dense"))


def test_a_search_and_its_report_are_in_the_tables_and_the_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(jobs.TASKS, "dense-8", small("dense-8"))
    experiment = claims.Experiment(tmp_path, "dense-8")
    for method in (Normalised("SGD"), Normalised("SGD", "BNP")):
        while kind := experiment.ready(method):
            experiment.add(kind, method, *claims.timed(experiment.job(kind, method), 1))
    text = normal_tables.text({"dense-8": experiment})
    # In its rows: of the task, and of conditions.
    assert text.count("SGD, BNP ") == 2
    assert "BNP around  task" in text
    normal_tables.draw({"dense-8": experiment}, tmp_path)
    for name in ("batches", "curves", "conditions"):
        assert (tmp_path / f"bnp-{name}.png").read_bytes().startswith(b"\x89PNG")
