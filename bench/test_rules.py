"""Adam or Gauss-Newton in the harness: frames turn and come back, curvature is that of the model, runs are their own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.func import functional_call, jacrev

import precond
from bench import claims
from bench.papers import frames, jobs, quadrants, rules, synthetic
from bench.papers.rules import Rule
from bench.papers.stacked import Networks

SHAPES = [torch.Size(shape) for shape in ((3, 4), (5,))]


def tensors(seed, *batch):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, *batch, *shape, generator=draw) for shape in SHAPES]


def flat(of, start=2):
    return torch.cat([t.flatten(start) for t in of], -1)


def learnt(basis, seed=0, share=1.0):
    frame = frames.frame(basis, SHAPES, 0.5, share)
    for k in range(3):
        frame.learn(tensors(seed + k, 8))
    frame.refresh()
    return frame


def matrix_of(frame, z):
    """The matrix whose columns are what unit vectors of z are turned back to."""
    columns = []
    for k in range(flat(z).shape[-1]):
        unit = torch.zeros_like(flat(z))
        unit[..., k] = 1.0
        parts = unit.split([t[0, 0].numel() for t in z], -1)
        columns.append(flat(frame.back([part.view_as(t) for t, part in zip(z, parts, strict=True)])))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("basis", rules.BASES)
def test_a_frame_turns_back_and_has_the_diagonal_in_its_coordinates(basis):
    frame, g, samples = learnt(basis), tensors(7), tensors(8, 8)
    z = frame.turn(g)
    torch.testing.assert_close(flat(frame.back(z)), flat(g), rtol=1e-5, atol=1e-5)
    U, rows = matrix_of(frame, z), flat(samples, 3)
    torch.testing.assert_close((flat(g)[..., None, :] @ U)[..., 0, :], flat(z), rtol=1e-4, atol=1e-4)
    expected = (U.mT @ (rows.mT @ rows) @ U).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(flat(frame.squares(samples)), expected, rtol=1e-4, atol=1e-4)
    # Squares in another basis: of a matrix that is diagonal in this one, the diagonal there.
    other, v = learnt(basis, seed=20), [t.square() for t in z]
    W = matrix_of(other, z)
    expected = (W.mT @ U @ torch.diag_embed(flat(v)) @ U.mT @ W).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(flat(other.moved(v, frame)), expected, rtol=1e-3, atol=1e-3)


def test_the_full_basis_is_that_of_all_samples_and_a_share_lies_on_the_way():
    samples = tensors(0, 40)
    frame = frames.frame("full", SHAPES, 0.5, 1.0)
    frame.learn(samples)
    frame.refresh()
    rows = flat(samples, 3)
    G = frame.basis.mT @ (rows.mT @ rows) @ frame.basis
    off = G - torch.diag_embed(G.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3 * G.max()
    half = learnt("full", share=0.5)
    whole = learnt("full")
    expected = precond.interpolate_basis(torch.eye(17), whole.basis[1, 2], 0.5)
    torch.testing.assert_close(half.basis[1, 2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", ["parity-small", "regression-small", "softmax-small", "transformer-small"])
def test_samples_have_the_gauss_newton_matrix_as_their_second_moment(task):
    """One output: exactly. Drawn labels: in the mean, held against J^T (Hessian of the loss) J of the same inputs."""
    kind = dataclasses.replace(synthetic.TASKS[task], curvature_batch=2)
    networks = Networks(kind.of.build, 1, (3,))
    worlds = [kind.of.world(torch.Generator().manual_seed(0))]
    x, y = kind.drawn(worlds, [torch.Generator().manual_seed(1)], 2, False)
    parameters = {name: t[0, 0].detach() for name, t in networks.stacked.items()}
    J = jacrev(lambda p: functional_call(networks.module, p, (x[0],)))(parameters)
    rows = torch.cat([J[name].flatten(y[0].dim()) for name in parameters], -1).flatten(0, -3)
    f = functional_call(networks.module, parameters, (x[0],)).detach().flatten(0, -2)
    p = f.softmax(-1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None] if kind.of.cross_entropy else torch.eye(f.shape[-1])
    G = (rows.mT @ H @ rows).mean(0)
    found = torch.zeros_like(G)
    draws = 1 if task.startswith("parity") else 500
    score = synthetic.score_of(kind.of.cross_entropy)
    noise = [torch.Generator().manual_seed(2)]
    for _ in range(draws):
        samples = networks.each_input(score, x, kind.noise(noise, y.shape[1:]))
        of = torch.cat([s.flatten(3) for s in samples], 3)[0, 0]
        found += of.mT @ of / len(f)
    found /= draws
    assert (found - G).norm() < (1e-5 if draws == 1 else 0.15) * G.norm()


def test_a_rule_in_the_full_basis_is_the_class_with_that_basis():
    """Steps of the harness against precond.GaussNewton(basis=U) on the parameters as one vector."""
    kind = dataclasses.replace(synthetic.TASKS["parity-full"], steps=4, refresh=100)
    rule, point = Rule("GN^-1", "full"), {"lr": 0.1, "damping": 0.1}
    frame = learnt("full")
    networks = Networks(lambda: torch.nn.Linear(4, 3), 1, (5,))
    networks.stacked = {"weight": torch.randn(1, 1, 3, 4), "bias": torch.randn(1, 1, 5)}
    networks.gradients = [t[:1, :1] for t in tensors(1)]
    frame.basis = frame.basis[:1, :1]
    p = torch.nn.Parameter(flat(networks.stacked.values())[0, 0].clone())
    rotated = synthetic.Rotated(rule, networks, [point], frame, 0.95)
    alone = rule.optimizer([[p]], [point], 0.95)
    alone.param_groups[0]["basis"] = frame.basis[0, 0]
    for step in range(kind.steps):
        h = torch.rand(17, generator=torch.Generator().manual_seed(step))
        rotated.feed([h.view(1, 1, 17)])
        alone.update_curvature(estimates=[h])
        for g, new in zip(networks.gradients, tensors(30 + step), strict=True):
            g.copy_(new[:1, :1])
        p.grad = flat(networks.gradients)[0, 0].clone()
        rotated.step(1.0)
        alone.step()
    torch.testing.assert_close(flat(networks.stacked.values())[0, 0], p.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("basis", ["kronecker", "full"])
def test_a_new_basis_moves_neither_the_parameters_nor_the_mean_of_gradients(basis):
    kind = synthetic.TASKS["softmax-small"]
    networks = Networks(kind.of.build, 2, (3, 4))
    axes = frames.frame(basis, [t.shape[2:] for t in networks.stacked.values()], 0.5, 1.0)

    def samples(seed):
        draw = torch.Generator().manual_seed(seed)
        return [torch.randn(2, 2, 9, *t.shape[2:], generator=draw) for t in networks.stacked.values()]

    axes.learn(samples(0))
    axes.refresh()
    points = [{"lr": 0.1, "one_minus_beta2": 0.1}] * 2
    rotated = synthetic.Rotated(Rule("Adam", basis), networks, points, axes, 0.95)
    for seed in range(3):
        for g, new in zip(networks.gradients, samples(10 + seed), strict=True):
            g.copy_(new[:, :, 0])
        rotated.step(1.0)

    def seen(name):
        state = rotated.optimizer.state
        of = [torch.stack([torch.stack([state[p][name] for p in row]) for row in views]) for views in rotated.views]
        return flat(axes.back(of)), flat(of)

    before, (mean, _), (_, squares) = flat(axes.back(rotated.z)), seen("exp_avg"), seen("exp_avg_sq")
    axes.learn([100 * s for s in samples(50)])
    rotated.refresh()
    torch.testing.assert_close(flat(axes.back(rotated.z)), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen("exp_avg")[0], mean, rtol=1e-4, atol=1e-5)
    now = seen("exp_avg_sq")[1]
    torch.testing.assert_close(now.sum(-1), squares.sum(-1), rtol=1e-4, atol=1e-5)
    assert (now - squares).abs().max() > 1e-3


@pytest.mark.parametrize("rule", [rules.SOPHIA[0], Rule("GN^-1", "kronecker", kind="class")], ids=lambda of: of.name)
def test_a_mean_gradient_is_fed_as_the_batch_times_its_square(rule):
    """What the step divides by, but for rho: B g^2, with g the gradient of the mean over B inputs."""
    kind = synthetic.TASKS["parity-small"]
    networks = Networks(kind.of.build, 1, (3,))
    point = {axis.name: axis.value(0) for axis in rule.axes} | ({"damping": 0.0} if rule.kind else {})
    axes = frames.frame("identity", [], 0.5, 1.0)
    rotated = synthetic.Rotated(rule, networks, [point], axes, 0.95)
    samples = [torch.randn(1, 1, 7, *t.shape[2:]) for t in networks.stacked.values()]
    rotated.feed_mean(samples)
    bias = rotated.views[1][0][0]  # no basis turns it
    group, h = rotated.optimizer.param_groups[0], rotated.optimizer.state[bias]["curvature"]
    # One of its estimates is 1 - beta2 of Sophia's mean, and all of the other's.
    found = h * group["batch_size"] / (1 - group["betas"][1]) if rule.rule == "Sophia" else h
    torch.testing.assert_close(found, samples[1][0, 0].sum(0).square(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("basis", rules.BASES)
@pytest.mark.parametrize("task", ["softmax-small", "parity-full"])
def test_a_run_depends_on_its_point_and_seed_alone(task, basis):
    kind = dataclasses.replace(synthetic.TASKS[task], steps=25)
    rule, points = Rule("GN^-1/2", basis), [{"lr": lr, "damping": 0.1} for lr in (0.05, 0.1, 1e30, 0.2)]
    together = kind.train(rule, points, (3, 4), test=False, tick=lambda: None)
    alone = kind.train(rule, points[1:2], (4,), test=False, tick=lambda: None)
    assert together[1][1]["score"] == pytest.approx(alone[0][0]["score"], rel=1e-2)
    assert not together[2][0]["score"] < 1e3
    assert len({of[1]["score"] for of in together}) == 4


def test_cosines_are_of_the_roots_of_both_means():
    angles, draw = synthetic.Angles(0.5), torch.Generator().manual_seed(0)
    for _ in range(3):
        g = [torch.randn(1, 2, 4, generator=draw), torch.randn(1, 2, 3, generator=draw)]
        h = [torch.rand(t.shape, generator=draw) + 0.1 for t in g]
        angles.add(g, h)
    angles.take()
    v, k = (flat(of) for of in angles.means)
    expected = torch.cosine_similarity(flat(g) / v.sqrt(), flat(g) / k.sqrt(), dim=-1)
    torch.testing.assert_close(angles.taken[0], expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_a_number_is_wrong():
    for cross_entropy in (False, True):
        wrong = synthetic.wrong_of(cross_entropy)
        y = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        assert wrong(lambda x: x, torch.tensor([[1.0, 0.0], [0.2, torch.nan]]), y) == 0.5


def test_every_option_of_a_point_reaches_its_parameters():
    for rule in {rule for of in rules.METHODS.values() for rule in of}:
        points = [{axis.name: axis.value(at) for axis in rule.axes} for at in (1, 0, -1)]
        points = [point | ({"state_format": "bf16"} if rule.tried() else {}) for point in points]
        parameters = [[torch.nn.Parameter(torch.ones(2))] for _ in points]
        optimizer = rule.optimizer(parameters, points, 0.95)
        for group, point in zip(optimizer.param_groups, points, strict=True):
            for name, value in point.items():
                complement = {"one_minus_momentum": "momentum", "one_minus_beta2": "betas"}.get(name)
                found = group[complement or name]
                found = found[1] if complement == "betas" else found
                assert found == (1.0 - value if complement else value)
            if rule.kind == "class":
                assert (group["basis"], group["curvature"]) == ("kronecker", "gnb")
            assert group.get("power", -1.0) == rules.POWERS.get(rule.rule, -1.0)


def test_a_search_and_its_report_are_in_the_tables_and_the_pictures(tmp_path, monkeypatch):
    """Everything from end to end, at the smallest size."""
    task = "transformer-full"
    small = dataclasses.replace(synthetic.TASKS[task], steps=6, searched=(0,), reported=(100, 101))
    monkeypatch.setitem(jobs.TASKS, task, small)
    methods = (*rules.QUADRANTS[:4], rules.BY_EPS[0], rules.SOPHIA[1])
    monkeypatch.setitem(rules.METHODS, task, methods)
    monkeypatch.setitem(jobs.METHODS, task, methods)
    monkeypatch.setattr(
        jobs.Searcher,
        "settle",
        lambda self, searches, count: [
            self.evaluate([(0.0,) * len(s.axes)]) and (0.0,) * len(s.axes) for s in searches
        ],
    )
    monkeypatch.setattr(jobs.Searcher, "points", lambda self: [])
    experiment = claims.Experiment(tmp_path, task)
    for rule in methods:
        while kind := experiment.ready(rule):
            experiment.add(kind, rule, *claims.timed(experiment.job(kind, rule), 1))
    text = quadrants.text({task: experiment})
    assert "Sophia, identity, published  Adam, identity" in text
    assert text.count("Adam, identity") >= 2
    quadrants.draw({task: experiment}, tmp_path)
    for name in ("bases", "curves", "formats", "directions"):
        assert (tmp_path / f"gauss-newton-{name}.png").read_bytes().startswith(b"\x89PNG")
    record = experiment.get("report", rules.QUADRANTS[3])["runs"]
    assert "cosine" in record["best"][0]
    assert "curve" not in record["fp16"][0]
