"""The tables of bench/claims.py: tuned against tuned, the default against tuned, and what each ``hyper_lr`` costs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import compare, jobs
from .contenders import METHODS, Method

if TYPE_CHECKING:
    from ..claims import Experiment

#: By how many per cent a default may be worse than tuned.
ALLOWED = 10.0


#: The kind of run of one who tries three ``hyper_lr`` and keeps the best.
THREE = "three runs"


def records(case: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """One for each seed. Of three runs: what they chose on the seed before, by its score."""
    if kind != THREE:
        return case["runs"][kind]
    runs = [case["runs"][jobs.swapped(of)] for of in jobs.THREE_RUNS]
    chosen = compare.chosen([[record["score"] for record in of] for of in runs])
    return [runs[i][j] for j, i in enumerate(chosen)]


def values(case: dict[str, Any], kind: str) -> list[float | None]:
    return [record["test"] for record in records(case, kind)]


def spread(of: list[float | None]) -> str:
    """Mean and standard deviation of those that did not diverge, and how many did."""
    finite = [x for x in of if x is not None]
    lost = f", {len(of) - len(finite)} diverged" if len(finite) < len(of) else ""
    return f"{statistics.fmean(finite):.4g} +- {statistics.stdev(finite):.2g}{lost}" if len(finite) > 1 else "diverged"


def against(
    experiment: Experiment, case: dict[str, Any], kind: str, base: dict[str, Any], of: str
) -> compare.Difference:
    ratios = jobs.TASKS[experiment.task].ratios
    return compare.paired(values(case, kind), values(base, of), ratios=ratios)


def written(experiment: Experiment, difference: compare.Difference) -> str:
    """A difference of losses or returns."""
    return shown(difference, ratios=jobs.TASKS[experiment.task].ratios)


def shown(difference: compare.Difference, *, ratios: bool) -> str:
    """The difference with its interval and what it says; "none" where too many seeds have no value."""
    if math.isnan(difference.mean):
        return "none"
    digits = "{:.2f}" if ratios else "{:+.1f}"
    verdict = difference.verdict(1.0 if ratios else 0.0, rising=not ratios)
    return f"{digits} [{digits}, {digits}] {verdict}".format(*difference).rstrip()


def level(experiment: Experiment, base: dict[str, Any]) -> float:
    """A loss near that of the base's end, or the return that the task names."""
    task = jobs.TASKS[experiment.task]
    return task.target if task.unit == "return" else compare.NEAR * compare.mean_curve(base["runs"]["usual"])[-1]


def steps_to(experiment: Experiment, of: list[dict[str, Any]], goal: float) -> list[float]:
    """Of every seed, the steps to a level."""
    task = jobs.TASKS[experiment.task]
    return [compare.crossing(r["curve"], task.positions(), goal, rising=task.unit == "return") for r in of]


def steps_of(experiment: Experiment, case: dict[str, Any], kind: str, base: dict[str, Any]) -> list[str]:
    """Their median, the seeds that never got there, and the ratio to those of the base as usual."""
    ours = steps_to(experiment, records(case, kind), level(experiment, base))
    never = sum(map(math.isinf, ours))
    itself = case is base and kind == "usual"
    ratio = "" if itself else shown(paired_steps(experiment, case, kind, base), ratios=True)
    return [f"{statistics.median(ours):.0f}" + (f", {never} never" if never else ""), ratio]


def paired_steps(experiment: Experiment, case: dict[str, Any], kind: str, base: dict[str, Any]) -> compare.Difference:
    """A seed that never gets there counts as one that does at the last step, which is the least that it is worth."""
    goal, last = level(experiment, base), float(jobs.TASKS[experiment.task].steps)
    both = (steps_to(experiment, of, goal) for of in (records(case, kind), base["runs"]["usual"]))
    ours, theirs = ([min(x, last) for x in of] for of in both)
    return compare.paired(ours, theirs, ratios=True)


def errors(case: dict[str, Any], kind: str) -> list[float | None]:
    """Shares of wrong answers on the test set."""
    return [record["test_error"] for record in records(case, kind)]


def point(at: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in at.items())


def searches(experiment: Experiment) -> Iterator[list[str]]:
    """The best point of every search, with its mean score over the seeds that chose it: lower than on others."""
    for method in METHODS[experiment.task]:
        searched = experiment.get("search", method)
        for kind in ("usual", "best") if searched and not method.mode else ("best",) if searched else ():
            scores = next(of["scores"] for of in searched["points"] if of["at"] == searched[kind])  # type: ignore[index]
            name = method.name if kind == "best" else f"  {kind}"
            row = [name, point(searched[kind]), f"{statistics.fmean(scores):.4g}", str(len(scores))]  # type: ignore[index]
            yield [*row, str(searched["count"])]  # type: ignore[index]


def tuned(experiment: Experiment) -> Iterator[list[str]]:
    """A row for every method with a report: on the test set, against its base."""
    for method in METHODS[experiment.task]:
        case, base = experiment.get("report", method.name), experiment.get("report", method.base)
        searched = experiment.get("search", method.name)
        if not case or not base or not searched:
            continue
        kinds = ("best", "default", *map(jobs.swapped, jobs.THREE_RUNS), THREE) if method.is_default else ("best",)
        for kind in kinds if method.mode else ("usual", "hasty", "best"):
            of = values(case, kind)
            at = f"hyper_lr of {', '.join(map(str, jobs.THREE_RUNS))}" if kind == THREE else point(case["points"][kind])
            row = [method.name if kind == "best" else f"  {kind}", at, spread(of)]
            row += steps_of(experiment, case, kind, base)
            for other in ("usual", "best"):
                itself = case is base and kind == other
                row.append("" if itself else written(experiment, against(experiment, case, kind, base, other)))
            yield [*row, str(searched["count"]) if kind == "best" else ""]


def price(experiment: Experiment, method: Method) -> dict[float, compare.Difference]:
    """By which share every ``hyper_lr`` of the first grid is worse than the tuned one, on seeds of their own."""
    case = experiment.get("prices", method)
    if not case:
        return {}
    best = case["best"]["scores"]
    return {of["at"]["hyper_lr"]: compare.excess(of["scores"], best) for of in case["points"]}


def defaults(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """What every ``hyper_lr`` costs, and the worst of each."""
    found = {
        (task, method): price(experiment, method)
        for task, experiment in experiments.items()
        for method in METHODS[task]
        if method.is_default and experiment.get("prices", method)
    }
    values = sorted(set().union(*found.values())) if found else []
    yield ["task", "method", *(f"{h:.2g}" for h in values)]
    for (task, method), of in found.items():
        cells = [of[h] for h in values]
        yield [task, method.name, *(f"{100 * d.mean:+.0f} [{100 * d.low:+.0f}, {100 * d.high:+.0f}]" for d in cells)]
    for name, of_all in (("mean", statistics.fmean), ("worst", max)):
        if found:
            # Of which there is no number counts as worst.
            shares = ([math.inf if math.isnan(of[h].mean) else of[h].mean for of in found.values()] for h in values)
            yield [name, "", *(f"{100 * of_all(of):+.0f}" for of in shares)]


def choices(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """What it costs to try some ``hyper_lr`` with one seed, each at its best lr, and to keep the best: mean and worst of all."""
    cases = [
        case
        for task, experiment in experiments.items()
        for method in METHODS[task]
        if method.is_default and (case := experiment.get("prices", method))
    ]
    if not cases:
        return
    values = [of["at"]["hyper_lr"] for of in cases[0]["points"]]
    for count in (1, 2, 3):
        for of in itertools.combinations(range(len(values)), count):
            found = []
            for case in cases:
                scores = [case["points"][i]["scores"] for i in of]
                ours = [scores[i][j] for j, i in enumerate(compare.chosen(scores))]
                found.append(compare.excess(ours, case["best"]["scores"]).mean)
            found = [math.inf if math.isnan(x) else 100 * x for x in found]
            beyond = sum(x > ALLOWED for x in found)
            tried = ", ".join(f"{values[i]:.2g}" for i in of)
            yield [tried, f"{statistics.fmean(found):+.1f}", f"{max(found):+.0f}", f"{beyond} of {len(found)}"]


def kept(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """How the default ``hyper_lr`` at its best learning rate compares with the tuned one."""
    for task, experiment in experiments.items():
        for method in METHODS[task]:
            case = experiment.get("report", method.name) if method.is_default else None
            if case and "default" in case["runs"]:
                yield [task, method.name, written(experiment, against(experiment, case, "default", case, "best"))]


#: What `verdicts` counts: scores, steps and errors, and the run of the base that they are compared with.
COMPARED = (("score", "usual"), ("score", "best"), ("steps", "usual"), ("error", "usual"), ("error", "best"))


def verdict(experiment: Experiment, method: Method, kind: str, what: str, other: str) -> str | None:
    """ "better", "worse", "" or "none" (no number) of a kind of run against one of the base's; None where one is missing."""
    case, base = experiment.get("report", method), experiment.get("report", method.base)
    ratios = jobs.TASKS[experiment.task].ratios
    if not case or not base or (what == "error" and not ratios):
        return None
    if what == "steps":
        found, rising = paired_steps(experiment, case, kind, base), False
    elif what == "error":
        found, rising, ratios = compare.paired(errors(case, kind), errors(base, other), ratios=False), False, False
    else:
        found, rising = against(experiment, case, kind, base, other), not ratios
    neutral = 1.0 if ratios or what == "steps" else 0.0
    return "none" if math.isnan(found.mean) else found.verdict(neutral, rising=rising)


def verdicts(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """How often FOP with the class's kind of defaults is better and worse than its base by more than an interval."""
    pairs = [(of, method) for task, of in experiments.items() for method in METHODS[task] if method.is_default]
    for kind in ("best", "default", *map(jobs.swapped, jobs.THREE_RUNS), THREE):
        row = [kind]
        for compared in COMPARED:
            found = [said for pair in pairs if (said := verdict(*pair, kind, *compared)) is not None]
            none = f", {found.count('none')} diverged" if "none" in found else ""
            row.append(f"{found.count('better')} better, {found.count('worse')} worse{none} of {len(found)}")
        yield row


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def text(experiments: dict[str, Experiment]) -> str:
    parts = []
    for task, experiment in experiments.items():
        unit = jobs.TASKS[task].unit
        if rows := list(searches(experiment)):
            parts.append(aligned([[f"{task}, searches", "hyper-parameters", "score", "seeds", "points"], *rows]))
        head = [
            task,
            "hyper-parameters",
            f"test {unit}",
            "steps",
            "to base's",
            "to base, usual",
            "to base, tuned",
            "points",
        ]
        if rows := list(tuned(experiment)):
            parts.append(aligned([head, *rows]))
    parts.append(
        "usual: lr searched, the rest torch's; hasty: that with twice the lr; best: all searched; default: FOP's hyper_lr at\n"
        "its best lr; swapped: this hyper_lr at the lr of the usual base; three runs: the best of those on the seed before."
    )
    parts.append("FOP against its base, by more than a 95 % interval (one in twenty by chance):")
    head = ["FOP at", *(f"{what}, to base, {'usual' if other == 'usual' else 'tuned'}" for what, other in COMPARED)]
    parts.append(aligned([head, *verdicts(experiments)]))
    parts.append(
        f"Worse than tuned by %, each hyper_lr at its best lr, seeds of their own, 95 % (allowed: {ALLOWED:.0f}):"
    )
    parts.append(aligned(list(defaults(experiments))))
    parts.append("Worse than tuned by %, of one who tries these with one seed, and keeps the best:")
    parts.append(aligned([["hyper_lr", "mean", "worst", f"beyond {ALLOWED:.0f}"], *choices(experiments)]))
    parts.append("The class's defaults against tuned, on fresh seeds:")
    parts.append(aligned([["task", "method", "default / tuned"], *kept(experiments)]))
    return "\n\n".join(parts)
