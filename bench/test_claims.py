"""The harness of bench/claims.py: searches end inside, networks do not know of each other, runs go on. See test_control.py."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import claims
from bench.papers import compare, contenders, control, images, jobs, tables
from bench.papers.contenders import METHODS, Method
from bench.papers.search import Axis, Search
from bench.papers.stacked import Networks

# The search.

LR = Axis("lr", 0.1, 4.0, (-1, 0, 1), halvings=2)
SECOND = Axis("second", 1.0, 10.0, (-1, 0, 1), lowest=(-3, 0.0))


@pytest.mark.parametrize("optimum", [(0.0, 0.0), (7.3, -2.2), (-5.8, 4.1), (0.4, -9.0)])
def test_a_search_ends_with_a_best_point_that_has_worse_neighbours_on_every_side(optimum):
    search = Search([LR, SECOND])

    def bowl(at):
        # Correlated, so that neighbours along the axes alone would not do.
        x, y = at[0] - optimum[0], at[1] - max(optimum[1], -3.0)
        return x * x + y * y + 1.6 * x * y

    best = search.run(lambda wanted: [bowl(at) for at in wanted])
    around = search.neighbours() - {best}
    assert around <= set(search.scores)
    assert all(search.scores[at] >= search.scores[best] for at in around)
    assert {at[0] - best[0] for at in around} >= {-0.25, 0.25}
    assert abs(best[0] - optimum[0]) <= 0.5
    if optimum[1] < -3:
        assert search.point(best)["second"] == 0.0
    else:
        assert {at[1] - best[1] for at in around} >= {-1.0, 1.0}


def test_a_search_that_improves_for_ever_says_so():
    with pytest.raises(RuntimeError, match="edge of the grid"):
        Search([LR]).run(lambda wanted: [-at[0] for at in wanted])
    with pytest.raises(RuntimeError, match="finite score"):
        Search([LR]).run(lambda wanted: [math.inf for _ in wanted])


def test_a_point_is_evaluated_once_and_a_diverged_one_is_none_to_choose():
    seen = []

    def evaluate(wanted):
        seen.extend(wanted)
        return [math.inf if at[0] > 0.3 else (at[0] - 1.0) ** 2 for at in wanted]

    best = Search([LR]).run(evaluate)
    assert len(seen) == len(set(seen))
    assert best == (0.25,)


def test_a_point_that_was_lucky_is_not_chosen(monkeypatch):
    """With more seeds it is worse; the one that is chosen has neighbours on every side, and each point is settled once."""
    searcher, trained = jobs.Searcher("digits", Method("SGD"), None), []

    def train(self, ats, seeds):
        for at in ats:
            trained.append((at, tuple(seeds)))
            lucky = at == (1.0,) and seeds == self.task.searched
            self.found.setdefault(at, []).extend([0.1 if lucky else 1.0 + abs(at[0] + 0.5)] * len(seeds))

    monkeypatch.setattr(jobs.Searcher, "_train", train)
    (best,) = searcher.settle([searcher.whole], 2)
    assert best == (-0.5,)
    assert searcher.whole.neighbours() <= set(searcher.whole.scores)
    assert len(trained) == len(set(trained))
    assert ((1.0,), searcher.task.runoff) in trained
    assert len(searcher.found[best]) == 15
    again = jobs.Searcher("digits", Method("SGD"), None)
    again.know(jobs.rounded(searcher.points()))
    trained.clear()
    assert again.settle([again.whole], 2) == [best]
    assert not trained


# Networks side by side.


def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 10))


def test_stacked_networks_have_the_gradients_that_each_has_alone():
    networks = Networks(build, 3, (5, 6))
    with torch.no_grad():
        for i, j in itertools.product(range(3), range(2)):
            for p in networks.parameters[i][j]:
                p.mul_(1.0 + 0.1 * i)
    x, y = torch.randn(2, 7, 1, 8, 8), torch.randint(0, 10, (2, 7))
    networks.backward(networks.each(images.loss_of, x, y))
    for i, j in itertools.product(range(3), range(2)):
        torch.manual_seed((5, 6)[j])
        alone = build()
        with torch.no_grad():
            for p in alone.parameters():
                p.mul_(1.0 + 0.1 * i)
        F.cross_entropy(alone(x[j]), y[j]).backward()
        for p, expected in zip(networks.parameters[i][j], alone.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), expected.detach(), rtol=0, atol=0)
            torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_a_network_that_diverged_leaves_the_others_alone():
    networks = Networks(build, 3, (5,))
    with torch.no_grad():
        networks.parameters[1][0][0].fill_(math.nan)
    x, y = torch.randn(1, 7, 1, 8, 8), torch.randint(0, 10, (1, 7))
    networks.backward(networks.each(images.loss_of, x, y))
    for i in range(3):
        assert all(p.grad.isfinite().all() for p in networks.parameters[i][0]) == (i != 1)
    for p, q in zip(networks.parameters[0][0], networks.parameters[2][0], strict=True):
        assert torch.equal(p.grad, q.grad)


SMALL = {
    "digits": dataclasses.replace(images.TASKS["digits"], epochs=1, searched=(0, 1), reported=tuple(range(100, 110))),
    "cartpole": dataclasses.replace(control.TASKS["cartpole"], updates=40),
}


@pytest.mark.parametrize("task", SMALL)
def test_a_run_depends_on_its_point_and_seed_alone(task, monkeypatch):
    # Two windows, each as long as an episode may be.
    monkeypatch.setattr(control, "WINDOWS", 1)
    method = Method("Adam", "input", ("hypergradient",))
    points = [{"lr": 0.003, "hyper_lr": h} for h in (0.0, 0.03, 0.1)]

    def train(points, seeds):
        return SMALL[task].train(method, points, seeds, test=False, tick=lambda: None)

    together, alone = train(points, (3, 4)), train(points[1:2], (4,))
    # Other products for another number of networks: their last bits differ.
    assert together[1][1]["score"] == pytest.approx(alone[0][0]["score"], rel=1e-2)
    assert len({of[0]["score"] for of in together}) == 3
    base = SMALL[task].train(Method("Adam"), [{"lr": 0.003}], (3, 4), test=False, tick=lambda: None)
    assert base[0][0]["score"] == pytest.approx(together[0][0]["score"], rel=1e-3)


def test_only_a_report_sees_the_test_set():
    def data():
        parts = images.digits()
        return dataclasses.replace(parts, test=(None, None))

    task = dataclasses.replace(SMALL["digits"], data=data)
    record = task.train(Method("SGD"), [{"lr": 0.1}], (0,), test=False, tick=lambda: None)[0][0]
    assert math.isfinite(record["score"])
    assert "test" not in record
    with pytest.raises(AttributeError):
        task.train(Method("SGD"), [{"lr": 0.1}], (0,), test=True, tick=lambda: None)


def test_every_option_of_a_point_reaches_its_parameters():
    for method in {method for of in METHODS.values() for method in of}:
        points = [{axis.name: axis.value(at) for axis in method.axes} for at in (1, 0, -1)]
        parameters = [[[nn.Parameter(torch.ones(2, 2))]] for _ in points]
        for optimizer in method.optimizers(parameters, points):
            for group in optimizer.param_groups:
                index = next(i for i, of in enumerate(parameters) if of[0][0] is group["params"][0])
                assert group["lr"] == points[index]["lr"]
                assert getattr(optimizer, "hyper_lr", None) == points[index].get("hyper_lr")
                second = {
                    "momentum": lambda g: ("one_minus_momentum", 1 - g["momentum"]),
                    "Adam": lambda g: ("one_minus_beta2", 1 - g["betas"][1]),
                    "RMSprop": lambda g: ("one_minus_alpha", 1 - g["alpha"]),
                    "SGD": lambda g: ("", g["momentum"]),
                }[method.base](group)
                usual = {"momentum": 0.1, "Adam": 1e-3, "RMSprop": 1e-2, "SGD": 0.0}[method.base]
                assert second[1] == pytest.approx(points[index].get(second[0], usual))


def test_fashion_mnist_is_read_from_a_folder(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setenv("PRECOND_FASHION_MNIST", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        images.fashion()
    for name, count in (("train", 15_000), ("t10k", 30)):
        for kind, header, size in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
            values = (np.arange(count * size) // size % 10).astype(np.uint8)
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(bytes(header) + values.tobytes(), 1))
    monkeypatch.setenv("PRECOND_FASHION_MNIST", str(tmp_path))
    data = images.fashion()
    for (x, y), count in ((data.train, 10_000), (data.validation, 5_000), (data.test, 30)):
        assert x.shape == (count, 1, 28, 28)
        assert torch.equal(((x + 0.286) * 255)[:, 0, 3, 5].round().long(), y)


# Comparisons.


def test_differences_are_paired_and_intervals_are_students():
    base = [1.0, 2.0, 4.0, 8.0]
    smaller = compare.paired([x * y for x, y in zip(base, (0.9, 0.92, 0.88, 0.9), strict=True)], base, ratios=True)
    assert smaller == pytest.approx((0.9, 0.87, 0.93), abs=5e-3)
    assert smaller.verdict(1.0, rising=False) == "better"
    assert smaller.verdict(1.0, rising=True) == "worse"
    found = compare.paired([1.0, 3.0, 3.0, 9.0], base, ratios=False)
    # The mean of 0, 1, -1, 1 is 1/4, their deviation 0.957; t of 3 degrees at 97.5 % is 3.182.
    assert found == pytest.approx((0.25, 0.25 - 3.182 * 0.957 / 2, 0.25 + 3.182 * 0.957 / 2), rel=1e-3)
    assert not found.verdict(0.0, rising=True)
    assert compare.paired(base, base, ratios=True) == (1.0, 1.0, 1.0)
    assert math.isnan(compare.paired([1.0, None], [1.0, 2.0], ratios=True).mean)
    assert compare.paired([*base, None], [*base, 1.0], ratios=True).mean == 1.0
    # Losses fall, returns rise, and what has no number is neither.
    less, none = compare.Difference(0.5, 0.4, 0.6), compare.Difference(math.nan, math.nan, math.nan)
    assert str(tables.Compared(less, True)) == "0.50 [0.40, 0.60] better"
    assert str(tables.Compared(less, False, True)) == "+0.5 [+0.4, +0.6] better"
    assert tables.Compared(less, False).verdict() == "worse"
    assert str(tables.Compared(none, True)) == tables.Compared(none, True).verdict() == "none"


def test_a_curve_reaches_a_level_between_its_points():
    assert compare.crossing([4.0, 2.0, 1.0], [0, 10, 20], 3.0, rising=False) == pytest.approx(5.0)
    assert compare.crossing([0.0, 2.0, 1.0], [0, 10, 20], 2.0, rising=True) == 10.0
    assert compare.crossing([4.0, None, 1.0], [0, 10, 20], 2.0, rising=False) == math.inf
    assert compare.crossing([4.0, 3.5], [0, 10], 3.0, rising=False) == math.inf
    assert compare.excess([1.1, 1.3], [1.0, 1.0]).mean == pytest.approx(0.2)
    assert compare.excess([-200.0, -190.0], [-250.0, -250.0]).mean == pytest.approx(0.22)


def test_a_seed_that_never_gets_there_counts_as_the_last_step(tmp_path):
    experiment = claims.Experiment(tmp_path, "digits")
    last, count = images.TASKS["digits"].steps, len(images.TASKS["digits"].positions())

    def case(*reached):
        curves = ([9.0] * (count // 2) + [1.0 if of else 9.0] * (count - count // 2) for of in reached)
        return {"runs": {"usual": [{"curve": curve} for curve in curves]}}

    base = case(True, True)
    level = compare.NEAR * 1.0
    assert tables.level(experiment, base) == level
    ours = tables.steps_to(experiment, case(True, False)["runs"]["usual"], level)
    assert ours[1] == math.inf
    expected = math.sqrt(last / ours[0])
    found = tables.paired_steps(experiment, case(True, False), "usual", base)
    assert found.mean == pytest.approx(expected)
    assert tables.steps_of(experiment, case(True, False), "usual", base).endswith(", 1 never")


def test_one_who_tries_chooses_on_one_seed_and_trains_on_the_next():
    assert compare.chosen([[1.0, 5.0, 3.0], [2.0, None, 1.0], [3.0, 4.0, 4.0]]) == [1, 0, 2]
    runs = {
        contenders.swapped(of): [{"score": s, "test": s + of} for s in (1.0 + of, 2.0 - of)]
        for of in contenders.THREE_RUNS
    }
    first, _, last = contenders.THREE_RUNS
    assert tables.values({"runs": runs}, tables.THREE) == pytest.approx([1.0 + last + last, 2.0 - first + first])


# The command.


def test_a_run_that_was_cut_off_goes_on_and_what_changed_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setitem(jobs.TASKS, "digits", SMALL["digits"])
    base, fop = Method("SGD"), Method("SGD", "spatial", ("hypergradient",))
    done, changes = [], {}

    def job(kind, result):
        def run(task, name, *given, position=1):
            done.append((kind, name))
            if changes.get("fails") == (kind, name):
                raise RuntimeError("at the edge")
            seeds = {"prices": jobs.TASKS[task].priced, "report": jobs.TASKS[task].reported}.get(kind, ())
            return dict(result, tried=jobs.tried(jobs.named(task, name)), seeds=list(seeds))

        return run

    def go(until=99, fresh=False):
        experiment = claims.Experiment(tmp_path, "digits", fresh=fresh)
        while ready := [(kind, method) for method in (fop, base) if (kind := experiment.ready(method))]:
            kind, method = ready[0]
            try:
                result, seconds = claims.timed(experiment.job(kind, method), 1)
            except RuntimeError as error:
                experiment.fail(kind, method, error)
                continue
            experiment.add(kind, method, result, seconds)
            if len(done) == until:
                raise KeyboardInterrupt

    for kind, result in (("search", {"best": {"lr": 0.1}}), ("prices", {"points": []}), ("report", {"runs": {}})):
        monkeypatch.setattr(jobs, kind, job(kind, result))
    with pytest.raises(KeyboardInterrupt):
        go(until=2)
    go()
    expected = [("search", fop.name), ("prices", fop.name), ("search", "SGD"), ("report", fop.name), ("report", "SGD")]
    assert done == expected
    monkeypatch.setattr(contenders, "default_hyper_lr", lambda: 0.5)
    go()
    assert done[5:] == [("report", fop.name)]
    cases = {result["case"]: result for result in json.loads((tmp_path / "digits.json").read_text())["results"]}
    assert cases[f"report {fop.name}"]["tried"][0] == 0.5
    assert cases["search SGD"]["where"]["commit"]
    # So are other seeds.
    done.clear()
    monkeypatch.setitem(jobs.TASKS, "digits", dataclasses.replace(SMALL["digits"], reported=(7, 8)))
    go()
    assert sorted(done) == [("report", fop.name), ("report", "SGD")]
    # A fresh start does all again, one that was cut off counts the rest as it is.
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        go(until=1, fresh=True)
    go()
    assert done == expected[:1]
    go(fresh=True)
    assert sorted(done[1:]) == sorted(expected)
    # Another axis is another method; a job that fails is tried again by the next run.
    done.clear()
    monkeypatch.setitem(contenders.FIRST, "SGD", dataclasses.replace(contenders.LR, start=0.1))
    changes["fails"] = "report", "SGD"
    go()
    assert sorted(done) == sorted(expected)
    changes.clear()
    go()
    assert done[5:] == [("report", "SGD")]


def test_a_default_is_of_the_first_grid_or_says_so():
    axis = Axis("hyper_lr", 1e-2, 10**0.5, (-2, -1, 0, 1, 2), lowest=(-6, 0.0))
    assert [jobs.coordinate(axis, of) for of in (0.01, 0.0031623, 0.1, 0.0)] == [0, -1, 2, -6]
    assert jobs.fixed(axis, -1.0).near(-1.0, 1.0) == [-1.0]
    with pytest.raises(ValueError, match=r"hyper_lr must be on its axis of factor .*, got 0.003"):
        jobs.coordinate(axis, 0.003)
    with pytest.raises(ValueError, match=r"hyper_lr must be of the first grid .* got coordinate -0.5"):
        jobs.fixed(axis, jobs.coordinate(axis, 0.0056234))


def test_a_search_and_its_report_are_in_the_tables_and_the_pictures(tmp_path, monkeypatch, capsys):
    """Everything from end to end in one process, at the smallest size."""
    monkeypatch.setitem(jobs.TASKS, "digits", SMALL["digits"])
    from bench.papers import pictures

    experiment = claims.Experiment(tmp_path, "digits")
    for method in (Method("SGD"), Method("SGD", "spatial", ("hypergradient",))):
        while kind := experiment.ready(method):
            experiment.add(kind, method, *claims.timed(experiment.job(kind, method), 1))
    text = tables.text({"digits": experiment})
    # In its row and among the counts: of 1 method, five comparisons for each of six kinds of run.
    assert len(re.findall(r"^ *three runs  ", text, re.MULTILINE)) == 2
    assert len(re.findall(r"(better|worse|diverged) of 1\b", text)) == 30
    # Searches, reports, prices and defaults, and the spectra of three layers.
    assert text.count("FOP(SGD), spatial, hypergradient") == 4 + 3
    assert "swapped" in text
    pictures.draw({"digits": experiment}, tmp_path)
    for name in ("fop-steps", "fop-hyper-lr"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    spectra = experiment.get("report", "FOP(SGD), spatial, hypergradient")["runs"]["best"][0]["preconditioners"]
    assert len(spectra["0.weight"]["matrix"]) == 9
    assert len(spectra["5.weight"]["eigenvalues"]) == 64


# The claim itself.


@pytest.mark.large
def test_fop_around_rmsprop_has_a_lower_loss_on_digits():
    """The largest gain of the reports, 0.93 over 40 seeds: 0.89 over these, 0.82 to 0.96 (docs/methods/fop.md)."""
    task, seeds = images.TASKS["digits"], range(300, 320)

    def losses(method, point):
        return [record["test"] for record in task.train(method, [point], seeds, test=True, tick=lambda: None)[0]]

    alone = losses(Method("RMSprop"), {"lr": 0.005})
    fop = losses(Method("RMSprop", "input", ("hypergradient",), "direction"), {"lr": 0.005, "hyper_lr": 0.316})
    assert compare.paired(fop, alone, ratios=True).mean < 1.0


@pytest.mark.large
def test_a_search_of_sgd_on_digits_ends_inside():
    found = jobs.search("digits", "SGD", [])
    rates = sorted(of["at"]["lr"] for of in found["points"])
    assert rates[0] < found["best"]["lr"] < rates[-1]
    assert 0.1 < found["best"]["lr"] < 3.0
    settled = [of for of in found["points"] if len(of["scores"]) == 15]
    assert found["best"] in [of["at"] for of in settled]
    assert len(settled) >= jobs.FINALISTS
