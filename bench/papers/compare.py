"""What two methods differ by: paired over seeds, with intervals, at the end and on the way."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

#: Share by which a loss may exceed that of the base's end and counts as reached.
NEAR = 1.05


class Difference(NamedTuple):
    """Mean over seeds and 95 % interval: of the ratio of losses (below 1 is better) or the difference of returns (above 0)."""

    mean: float
    low: float
    high: float

    def verdict(self, neutral: float, *, rising: bool) -> str:
        """ "better", "worse", or "" where the interval has the value of no difference in it."""
        if self.low <= neutral <= self.high or math.isnan(self.mean):
            return ""
        return "better" if (self.low > neutral) == rising else "worse"


def paired(ours: Sequence[float | None], theirs: Sequence[float | None], *, ratios: bool) -> Difference:
    """Ours against theirs, seed by seed (Student's t; of logarithms where ratios are asked for).

    Seeds of which one side diverged are left out, and tables say how many; where that is more than a fifth there is no number.
    """
    from scipy import stats  # type: ignore[import-untyped]

    pairs = [(x, y) for x, y in zip(ours, theirs, strict=True) if x is not None and y is not None]
    if len(pairs) < max(0.8 * len(ours), 2):
        return Difference(math.nan, math.nan, math.nan)
    a, b = ([math.log(x) for x in of] if ratios else list(of) for of in zip(*pairs, strict=True))
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = statistics.fmean(x - y for x, y in zip(a, b, strict=True)), float(interval.low), float(interval.high)
    if all(x == y for x, y in zip(a, b, strict=True)):
        found = 0.0, 0.0, 0.0
    return Difference(*map(math.exp, found)) if ratios else Difference(*found)


def chosen(scores: Sequence[Sequence[float | None]]) -> list[int]:
    """For each seed, which of the rows (one for each candidate) has the lowest score on the seed before: one who trains each of
    them once, chooses, and trains again.
    """
    count = len(scores[0])
    finite = [[math.inf if x is None else x for x in row] for row in scores]
    return [min(range(len(finite)), key=lambda i: finite[i][j - 1]) for j in range(count)]


def crossing(curve: Sequence[float | None], positions: Sequence[float], level: float, *, rising: bool) -> float:
    """The first position at which a curve has reached the level, by a line between two of its points; inf where none has."""
    sign = 1.0 if rising else -1.0
    before: tuple[float, float] | None = None
    for x, y in zip(positions, curve, strict=True):
        if y is None or math.isnan(y):
            return math.inf
        above = sign * (y - level)
        if above >= 0.0:
            if before is None:
                return x
            return before[0] + (x - before[0]) * -before[1] / (above - before[1])
        before = x, above
    return math.inf


def mean_curve(records: Sequence[dict[str, Any]]) -> list[float]:
    """The mean over seeds, NaN where one of them diverged."""
    rows = ([math.nan if y is None else y for y in record["curve"]] for record in records)
    return [statistics.fmean(of) for of in zip(*rows, strict=True)]


def excess(ours: Sequence[float | None], best: Sequence[float | None]) -> Difference:
    """By which share of the best mean score ours are worse, paired over seeds. Scores: the lower, the better."""
    found = paired(ours, best, ratios=False)
    if math.isnan(found.mean):
        return found
    unit = abs(statistics.fmean(x for x in best if x is not None))
    return Difference(*(x / unit for x in found))
