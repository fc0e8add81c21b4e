"""The tables of bench/claims.py: tuned against tuned, the default against tuned, and what each ``hyper_lr`` costs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from . import compare, contenders, jobs
from .contenders import METHODS, SPECTRA, Method

if TYPE_CHECKING:
    from ..claims import Experiment

#: By how many per cent a default may be worse than tuned.
ALLOWED = 10.0
#: The kind of run of one who tries three ``hyper_lr`` and keeps the best.
THREE = "three runs"
#: Where a record has what is compared.
FIELDS = {"test": "test", "validation": "score", "error": "test_error"}


class Compared(NamedTuple):
    """A difference, whether it is a ratio, and whether more is better."""

    difference: compare.Difference
    ratios: bool
    rising: bool = False

    def verdict(self) -> str:
        """ "better", "worse", "" for neither, or "none" where too many seeds have no value."""
        if math.isnan(self.difference.mean):
            return "none"
        return self.difference.verdict(1.0 if self.ratios else 0.0, rising=self.rising)

    def __str__(self) -> str:
        if (verdict := self.verdict()) == "none":
            return verdict
        digits = "{:.2f}" if self.ratios else "{:+.1f}"
        return f"{digits} [{digits}, {digits}] {verdict}".format(*self.difference).rstrip()


def defaults_of(experiments: dict[str, Experiment]) -> list[tuple[Experiment, Method]]:
    """The methods that are of FOP's kind of defaults, of every task."""
    return [(of, method) for task, of in experiments.items() for method in METHODS[task] if method.is_default]


def records(case: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """One for each seed. Of three runs: what they chose on the seed before, by its score."""
    if kind != THREE:
        return case["runs"][kind]
    runs = [case["runs"][contenders.swapped(of)] for of in contenders.THREE_RUNS]
    chosen = compare.chosen([[record["score"] for record in of] for of in runs])
    return [runs[i][j] for j, i in enumerate(chosen)]


def values(case: dict[str, Any], kind: str) -> list[float | None]:
    return [record["test"] for record in records(case, kind)]


def spread(of: list[float | None]) -> str:
    """Mean and standard deviation of those that did not diverge, and how many did."""
    finite = [x for x in of if x is not None]
    lost = f", {len(of) - len(finite)} diverged" if len(finite) < len(of) else ""
    return f"{statistics.fmean(finite):.4g} +- {statistics.stdev(finite):.2g}{lost}" if len(finite) > 1 else "diverged"


def compared(
    experiment: Experiment, what: str, case: dict[str, Any], kind: str, base: dict[str, Any], of: str
) -> Compared | None:
    """A kind of run of one case against one of another: "test", "validation", "error" in points of per cent, "steps"."""
    ratios = jobs.TASKS[experiment.task].ratios
    if what == "steps":
        return Compared(paired_steps(experiment, case, kind, base), True)
    if what != "test" and not ratios:
        return None
    ours, theirs = ([r[FIELDS[what]] for r in records(*pair)] for pair in ((case, kind), (base, of)))
    if what == "error":
        found = compare.paired(ours, theirs, ratios=False)
        return Compared(compare.Difference(*(100 * x for x in found)), False)
    return Compared(compare.paired(ours, theirs, ratios=ratios), ratios, not ratios)


def level(experiment: Experiment, base: dict[str, Any]) -> float:
    """A loss near that of the base's end, or the return that the task names."""
    task = jobs.TASKS[experiment.task]
    return task.target if task.unit == "return" else compare.NEAR * compare.mean_curve(base["runs"]["usual"])[-1]


def steps_to(experiment: Experiment, of: list[dict[str, Any]], goal: float) -> list[float]:
    """Of every seed, the steps to a level."""
    task = jobs.TASKS[experiment.task]
    return [compare.crossing(r["curve"], task.positions(), goal, rising=task.unit == "return") for r in of]


def steps_of(experiment: Experiment, case: dict[str, Any], kind: str, base: dict[str, Any]) -> str:
    """Their median, and how many seeds never got there."""
    ours = steps_to(experiment, records(case, kind), level(experiment, base))
    never = sum(map(math.isinf, ours))
    return f"{statistics.median(ours):.0f}" + (f", {never} never" if never else "")


def paired_steps(experiment: Experiment, case: dict[str, Any], kind: str, base: dict[str, Any]) -> compare.Difference:
    """Ratios to those of the base as usual. A seed that never gets there counts as one that does at the last step: the least
    that it is worth.
    """
    goal, last = level(experiment, base), float(jobs.TASKS[experiment.task].steps)
    both = (steps_to(experiment, of, goal) for of in (records(case, kind), base["runs"]["usual"]))
    ours, theirs = ([min(x, last) for x in of] for of in both)
    return compare.paired(ours, theirs, ratios=True)


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
        kinds = (
            ("best", "default", *map(contenders.swapped, contenders.THREE_RUNS), THREE)
            if method.is_default
            else ("best",)
        )
        for kind in kinds if method.mode else ("usual", "hasty", "best"):
            of = values(case, kind)
            at = (
                f"hyper_lr of {', '.join(map(str, contenders.THREE_RUNS))}"
                if kind == THREE
                else point(case["points"][kind])
            )
            row = [method.name if kind == "best" else f"  {kind}", at, spread(of)]
            row.append(steps_of(experiment, case, kind, base))
            for what, other in COMPARED:
                itself = case is base and kind == other
                row.append("" if itself else str(compared(experiment, what, case, kind, base, other) or ""))
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
    found = {pair: of for pair in defaults_of(experiments) if (of := price(*pair))}
    values = sorted(set().union(*found.values())) if found else []
    yield ["task", "method", *(f"{h:.2g}" for h in values)]
    for (experiment, method), of in found.items():
        row = [f"{100 * d.mean:+.0f} [{100 * d.low:+.0f}, {100 * d.high:+.0f}]" for d in (of[h] for h in values)]
        yield [experiment.task, method.name, *row]
    for name, of_all in (("mean", statistics.fmean), ("worst", max)):
        if found:
            # Of which there is no number counts as worst.
            shares = ([math.inf if math.isnan(of[h].mean) else of[h].mean for of in found.values()] for h in values)
            yield [name, "", *(f"{100 * of_all(of):+.0f}" for of in shares)]


def choices(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """What it costs to try some ``hyper_lr`` with one seed, each at its best lr, and to keep the best: mean and worst of all."""
    cases = [case for of, method in defaults_of(experiments) if (case := of.get("prices", method))]
    if not cases:
        return
    values = [of["at"]["hyper_lr"] for of in cases[0]["points"]]
    for of in itertools.chain(*(itertools.combinations(range(len(values)), count) for count in (1, 2, 3))):
        found = []
        for case in cases:
            scores = [case["points"][i]["scores"] for i in of]
            ours = [scores[i][j] for j, i in enumerate(compare.chosen(scores))]
            mean = compare.excess(ours, case["best"]["scores"]).mean
            found.append(math.inf if math.isnan(mean) else 100 * mean)
        beyond = sum(x > ALLOWED for x in found)
        tried = ", ".join(f"{values[i]:.2g}" for i in of)
        yield [tried, f"{statistics.fmean(found):+.1f}", f"{max(found):+.0f}", f"{beyond} of {len(found)}"]


def kept(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """How the default ``hyper_lr`` at its best learning rate compares with the tuned one."""
    for experiment, method in defaults_of(experiments):
        if case := experiment.get("report", method):
            both = (compared(experiment, what, case, "default", case, "best") for what in ("test", "validation"))
            yield [experiment.task, method.name, *(str(of or "") for of in both)]


def spectra(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """The smallest and the largest eigenvalue of M M^T of the places of a kernel, from seed to seed."""
    for experiment, method in defaults_of(experiments):
        case = experiment.get("report", method) if method.mode == "spatial" else None
        found = [of for r in case["runs"]["best"] if (of := r.get("preconditioners"))] if case else []
        for layer in found[0] if found else ():
            ends = [[end(of[layer]["eigenvalues"]) for of in found] for end in (min, max)]
            yield [experiment.task, method.name, layer, *(f"{min(of):.3g} to {max(of):.3g}" for of in ends)]


#: What is compared with a base, and with which of its runs.
COMPARED = (("steps", "usual"), ("test", "usual"), ("test", "best"), ("error", "usual"), ("error", "best"))
HEADS = [f"{what} to {'base' if of == 'usual' else 'tuned base'}" for what, of in COMPARED]


def verdicts(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """How often FOP with the class's kind of defaults is better and worse than its base by more than an interval."""
    cases = [(of, of.get("report", method), of.get("report", method.base)) for of, method in defaults_of(experiments)]
    for kind in ("best", "default", *map(contenders.swapped, contenders.THREE_RUNS), THREE):
        row = [kind]
        for what, other in COMPARED:
            pairs = (compared(of, what, case, kind, base, other) for of, case, base in cases if case and base)
            found = [pair.verdict() for pair in pairs if pair]
            none = f", {found.count('none')} diverged" if "none" in found else ""
            row.append(f"{found.count('better')} better, {found.count('worse')} worse{none} of {len(found)}")
        yield row


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def joined(parts: list[str], sections: Iterable[tuple[str, list[str], Iterable[list[str]]]]) -> str:
    """The parts, then under its title and its head each section that has rows."""
    for title, head, found in sections:
        if rows := list(found):
            parts = [*parts, title, aligned([head, *rows])]
    return "\n\n".join(parts)


def text(experiments: dict[str, Experiment]) -> str:
    parts = []
    for task, experiment in experiments.items():
        unit = jobs.TASKS[task].unit
        if rows := list(searches(experiment)):
            parts.append(aligned([[f"{task}, searches", "hyper-parameters", "score", "seeds", "points"], *rows]))
        head = [task, "hyper-parameters", f"test {unit}", "steps", *HEADS, "points"]
        if rows := list(tuned(experiment)):
            parts.append(aligned([head, *rows]))
    parts.append(
        "usual: lr searched, the rest torch's; hasty: that with twice the lr; best: all searched; default: FOP's hyper_lr at\n"
        "its best lr; swapped: this hyper_lr at the lr of the usual base; three runs: the best of those on the seed before.\n"
        "steps to the level of the usual base's end, error in points of per cent."
    )
    parts.append("FOP against its base, by more than a 95 % interval (one in twenty by chance):")
    parts.append(aligned([["FOP at", *HEADS], *verdicts(experiments)]))
    parts.append(
        f"Worse than tuned by %, each hyper_lr at its best lr, seeds of their own, 95 % (allowed: {ALLOWED:.0f}):"
    )
    parts.append(aligned(list(defaults(experiments))))
    parts.append("Worse than tuned by %, of one who tries these with one seed, and keeps the best:")
    parts.append(aligned([["hyper_lr", "mean", "worst", f"beyond {ALLOWED:.0f}"], *choices(experiments)]))
    parts.append("The class's defaults against tuned, on fresh seeds:")
    parts.append(aligned([["task", "method", "test", "validation"], *kept(experiments)]))
    parts.append(f"Eigenvalues of M M^T at the end, smallest and largest, over {SPECTRA} seeds:")
    parts.append(aligned([["task", "method", "layer", "smallest", "largest"], *spectra(experiments)]))
    return "\n\n".join(parts)
