"""Search of hyper-parameters on a geometric lattice that grows until its best point has a worse neighbour on every side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

At = tuple[float, ...]
Point = dict[str, float]


@dataclass(frozen=True)
class Axis:
    """``start * factor ** coordinate``. A coordinate of ``lowest`` or ``highest`` is a natural end, with a value of its own.

    A natural end is a value beyond which the method is the same or not defined: a ``hyper_lr`` of 0, a momentum of 0. A best
    point there is not at an edge of the search. Every other end moves as far as the best point does.
    """

    name: str
    start: float
    factor: float
    first: tuple[int, ...]
    #: How often the distance of neighbours is halved around the best point.
    halvings: int = 0
    lowest: tuple[int, float] | None = None
    highest: tuple[int, float] | None = None

    def value(self, at: float) -> float:
        for end in (self.lowest, self.highest):
            if end and at == end[0]:
                return end[1]
        return self.start * self.factor**at

    def near(self, at: float, step: float) -> list[float]:
        """The coordinate and its neighbours, none beyond a natural end."""
        low = self.lowest[0] if self.lowest else -math.inf
        high = self.highest[0] if self.highest else math.inf
        return [x for x in (at - step, at, at + step) if low <= x <= high]


class Search:
    """Which points to evaluate next, by the scores so far: the lower, the better.

    The first grid; then all neighbours of the best point, diagonal ones too, until none is missing; then neighbours at half the
    distance along the axes that may be halved, as often as they may. So methods with the same axes take about as many points:
    one whose best point lies far out takes more, and its record has their number.
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        self.axes = tuple(axes)
        self.scores: dict[At, float] = {}
        self.halved = 0

    def point(self, at: At) -> Point:
        return {axis.name: axis.value(x) for axis, x in zip(self.axes, at, strict=True)}

    @property
    def best(self) -> At:
        """Raises RuntimeError where no point has a finite score."""
        at = min(self.scores, key=self.scores.__getitem__)
        if not math.isfinite(self.scores[at]):
            raise RuntimeError(f"no point of {[self.point(at) for at in self.scores]} has a finite score")
        return at

    def first(self, count: int) -> list[At]:
        """The points of the lowest scores that are finite."""
        return [at for at in sorted(self.scores, key=self.scores.__getitem__)[:count] if math.isfinite(self.scores[at])]

    def neighbours(self) -> set[At]:
        """Of the best point, as far apart as they are now."""
        steps = [2.0 ** -min(self.halved, axis.halvings) for axis in self.axes]
        near = [axis.near(x, step) for axis, x, step in zip(self.axes, self.best, steps, strict=True)]
        return set(itertools.product(*near))

    def wanted(self) -> list[At]:
        """Points to evaluate now; none where the search is over."""
        if not self.scores:
            return list(itertools.product(*(map(float, axis.first) for axis in self.axes)))
        while not (missing := sorted(self.neighbours() - set(self.scores))):
            if self.halved >= max(axis.halvings for axis in self.axes):
                return []
            self.halved += 1
        return missing

    def run(self, evaluate: Callable[[list[At]], Iterable[float]]) -> At:
        """The best point."""
        return run_together([self], evaluate)[0]


def run_together(
    searches: Sequence[Search], evaluate: Callable[[list[At]], Iterable[float]], rounds: int = 25
) -> list[At]:
    """The best point of every search; what they want at a time is evaluated at once, and each point once.

    Raises RuntimeError where one is at an edge after so many rounds.
    """
    for _ in range(rounds):
        wanted = {search: search.wanted() for search in searches}
        points = sorted(set(itertools.chain(*wanted.values())))
        if not points:
            return [search.best for search in searches]
        scores = dict(zip(points, evaluate(points), strict=True))
        for search, of in wanted.items():
            search.scores.update({at: scores[at] for at in of})
    edge = [search.point(search.best) for search, of in wanted.items() if of]
    raise RuntimeError(f"after {rounds} rounds {edge[0]} is at the edge of the grid still")
