"""The two parts of an experiment, each a job of its own process: a search on validation, and a report on other seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from . import contenders, control, images, normalised, normalisers, rules, synthetic
from .contenders import Method
from .normalisers import Normalised
from .rules import Rule
from .search import At, Axis, Point, Search, run_together

TASKS: dict[str, Any] = {**images.TASKS, **control.TASKS, **synthetic.TASKS, **normalised.TASKS}
METHODS: dict[str, tuple[Method, ...] | tuple[Rule, ...] | tuple[Normalised, ...]] = {
    **contenders.METHODS,
    **rules.METHODS,
    **normalisers.METHODS,
}
#: Points of a search that are trained with more seeds before one is chosen.
FINALISTS = 4
#: Networks that are trained at once: bounds memory.
TOGETHER = 200


def tried(method: Method | Rule | Normalised) -> list[Any] | None:
    """What a report tries beside what a search has found, as a record has it."""
    return rounded(method.tried())


def named(task: str, name: str) -> Any:
    return next(method for method in METHODS[task] if method.name == name)


def rounded(value: Any) -> Any:
    """With five significant digits; what is not finite is None, since JSON has no word for it."""
    if isinstance(value, dict):
        return {key: rounded(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(of) for of in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


class Trainer:
    """Trains points in parts of at most ``TOGETHER`` networks, under a progress bar."""

    def __init__(self, task: str, method: Method | Rule | Normalised, seeds: Sequence[int], bar: tqdm) -> None:
        self.task, self.method, self.seeds, self.bar = TASKS[task], method, seeds, bar

    def __call__(self, points: Sequence[Point], *, test: bool = False) -> list[list[dict[str, Any]]]:
        size = max(TOGETHER // len(self.seeds), 1)
        self.bar.total = self.bar.n + len(points) * self.task.steps
        records = []
        for i in range(0, len(points), size):
            part = points[i : i + size]
            records += self.task.train(self.method, part, self.seeds, test=test, tick=self.tick(len(part)))
        return records

    def tick(self, count: int) -> Callable[[], Any]:
        """Move the bar by a step of so many points."""
        return lambda: self.bar.update(count)


def progress(task: str, name: str, position: int) -> tqdm:
    layout = "{desc} {bar:20} {n_fmt}/{total_fmt} steps {elapsed}"
    return tqdm(desc=f"{task}: {name}", position=position, leave=False, bar_format=layout, mininterval=1.0)


def fixed(axis: Axis, at: float) -> Axis:
    """The axis with one coordinate alone, of the first grid's."""
    if at not in axis.first:
        raise ValueError(f"{axis.name} must be of the first grid {axis.first}, got coordinate {at}")
    end = at, axis.value(at)
    return dataclasses.replace(axis, first=(int(at),), lowest=end, highest=end)


def coordinate(axis: Axis, value: float) -> float:
    """The coordinate of a value that the axis has."""
    ends = [end[0] for end in (axis.lowest, axis.highest) if end and end[1] == value]
    if ends:
        return ends[0]
    # Records have five digits, coordinates are multiples of a half.
    at = round(2 * math.log(value / axis.start, axis.factor)) / 2
    if not math.isclose(axis.value(at), value, rel_tol=1e-3):
        raise ValueError(f"{axis.name} must be on its axis of factor {axis.factor:g} around {axis.start}, got {value}")
    return at


class Searcher:
    """A search of a method on a task, with the scores of every seed.

    The minimum of noisy means is one that was lucky, often beside a cliff. So the first points of a search are trained with ten
    more seeds before one of them is chosen.
    """

    def __init__(self, task: str, method: Method | Rule | Normalised, bar: tqdm) -> None:
        self.task, self.method, self.bar = TASKS[task], method, bar
        self.key = task
        self.whole, self.found = Search(method.axes), dict[At, list[float]]()

    def evaluate(self, wanted: list[At]) -> list[float]:
        self._train(wanted, self.task.searched)
        return [self.score(at) for at in wanted]

    def _train(self, ats: list[At], seeds: Sequence[int]) -> None:
        train = Trainer(self.key, self.method, seeds, self.bar)
        for at, records in zip(ats, train([self.whole.point(at) for at in ats]), strict=True):
            self.found.setdefault(at, []).extend(record["score"] for record in records)

    def score(self, at: At) -> float:
        """The mean over seeds, of which one that diverged counts as infinite."""
        mean = statistics.fmean(self.found[at])
        return mean if math.isfinite(mean) else math.inf

    def know(self, points: list[dict[str, Any]]) -> None:
        """Take over what a search has recorded."""
        for point in points:
            at = tuple(coordinate(axis, point["at"][axis.name]) for axis in self.whole.axes)
            self.found[at] = [math.inf if score is None else score for score in point["scores"]]
            self.whole.scores[at] = self.score(at)

    def settle(self, searches: Sequence[Search], finalists: int) -> list[At]:
        """The best point of every search, after its first ones had more seeds, as often as they change."""
        while True:
            best = run_together(searches, self.evaluate)
            more = sorted({at for search in searches for at in search.first(finalists) if not self._is_settled(at)})
            if not more:
                return best
            self._train(more, self.task.runoff)
            for search in (*searches, self.whole):
                search.scores.update({at: self.score(at) for at in more if at in search.scores})

    def _is_settled(self, at: At) -> bool:
        return len(self.found[at]) > len(self.task.searched)

    def along_lr(self, coordinates: Sequence[float]) -> list[At]:
        """The best point for each of these coordinates of the second axis, found with what is known already."""
        lr, second = self.whole.axes
        lines = []
        for at in coordinates:
            line = Search((lr, fixed(second, at)))
            known = {point: score for point, score in self.whole.scores.items() if point[1] == at}
            if any(map(math.isfinite, known.values())):
                line.scores = known
            lines.append(line)
        best = self.settle(lines, finalists=2)
        for line in lines:
            self.whole.scores.update(line.scores)
        return best

    def points(self) -> list[dict[str, Any]]:
        """What is recorded."""
        return [{"at": self.whole.point(at), "scores": scores} for at, scores in sorted(self.found.items())]


def search(task: str, name: str, known: list[dict[str, Any]], position: int = 1) -> dict[str, Any]:
    """All points with their scores, the best one, and for a base the best one with its usual second hyper-parameter."""
    torch.set_num_threads(1)
    method = named(task, name)
    with progress(task, name, position) as bar:
        search = Searcher(task, method, bar)
        search.know(known)
        (best,) = search.settle([search.whole], FINALISTS)
        usual = best
        if method.usual:
            (usual,) = search.along_lr([coordinate(method.axes[1], *method.usual.values())])
            (best,) = search.settle([search.whole], FINALISTS)
    point, points = search.whole.point, search.points()
    return rounded({"best": point(best), "usual": point(usual), "count": len(points), "points": points})


def prices(task: str, name: str, searched: dict[str, Any], position: int = 1) -> dict[str, Any]:
    """What every ``hyper_lr`` of the first grid costs: each at a learning rate of its own search, scores of other seeds than the
    search's and the report's. For the choice of a default: the test set is not touched.
    """
    torch.set_num_threads(1)
    method = named(task, name)
    with progress(task, f"{name}, prices", position) as bar:
        search = Searcher(task, method, bar)
        search.know(searched["points"])
        points = [search.whole.point(at) for at in search.along_lr([float(at) for at in method.axes[1].first])]
        records = Trainer(task, method, TASKS[task].priced, bar)([*points, searched["best"]])
    *scores, best = [[record["score"] for record in of] for of in records]
    found = [{"at": point, "scores": of} for point, of in zip(points, scores, strict=True)]
    best_one = {"at": searched["best"], "scores": best}
    return rounded({"points": found, "best": best_one, "seeds": TASKS[task].priced})


def report(
    task: str,
    name: str,
    searched: dict[str, Any],
    base: dict[str, Any],
    priced: dict[str, Any] | None,
    position: int = 1,
) -> dict[str, Any]:
    """Records of fresh seeds at the best point, and at the others that the method names."""
    torch.set_num_threads(1)
    method = named(task, name)
    points = {"best": searched["best"], **method.others(searched, base, priced)}
    with progress(task, f"{name}, report", position) as bar:
        distinct = [point for i, point in enumerate(points.values()) if point not in list(points.values())[:i]]
        records = Trainer(task, method, TASKS[task].reported, bar)(distinct, test=True)
    runs = {kind: records[distinct.index(point)] for kind, point in points.items()}
    for kind in runs:
        if kind != "best":
            runs[kind] = [{k: of for k, of in record.items() if k not in method.of_best} for record in runs[kind]]
    return rounded({"points": points, "tried": tried(method), "seeds": TASKS[task].reported, "runs": runs})
