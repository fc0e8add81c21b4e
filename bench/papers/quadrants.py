"""Tables and pictures of Adam or Gauss-Newton, from the files of bench/claims.py."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import compare, jobs
from .pictures import grid, legend, pyplot, save
from .rules import (
    BASES,
    BY_EPS,
    FORMATS,
    GEODESIC,
    METHODS,
    OF_CLASS,
    POWERS,
    QUADRANTS,
    SHARES,
    SIZES,
    SOPHIA,
    THREE,
    USUAL,
    Rule,
)
from .tables import aligned, joined, point, spread

if TYPE_CHECKING:
    from ..claims import Experiment

COLOURS = {"SGD": "#94a3b8", "Adam": "#c2410c", "GN^-1": "#0f766e", "GN^-1/2": "#7c3aed", "Sophia": "#2563eb"}
STYLES = {"identity": ":", "kronecker": "--", "full": "-"}


def losses(experiment: Experiment, rule: Rule, kind: str = "best", what: str = "test") -> list[float | None]:
    """Of every seed on the test set, or none where the rule has no report."""
    case = experiment.get("report", rule)
    return [record[what] for record in case["runs"][kind]] if case and kind in case["runs"] else []


def ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> str:
    """Of losses, with a 95 % interval over the seeds of which neither side diverged; empty without reports."""
    if not ours or not theirs:
        return ""
    found, lost = compare.paired(ours, theirs, ratios=True), sum(x is None for x in ours)
    if math.isnan(found.mean):
        return f"{lost} of {len(ours)} diverged"
    return "{:.3g} [{:.3g}, {:.3g}]".format(*found) + (f", {lost} diverged" if lost else "")


def results(experiment: Experiment) -> Iterator[list[str]]:
    """A row for every rule: its best point, its loss and errors, and its loss in the formats."""
    for rule in METHODS[experiment.task]:
        case, searched = experiment.get("report", rule), experiment.get("search", rule)
        if not case or not searched:
            continue
        own = losses(experiment, rule)
        errors = [100 * of for of in losses(experiment, rule, what="test_error")]  # type: ignore[operator]
        row = [rule.name, point(case["points"]["best"]), spread(own), f"{statistics.fmean(errors):.1f}"]
        row += [ratio(losses(experiment, rule, kind), own) for kind in FORMATS]
        yield [*row, str(searched["count"])]


def against(experiments: dict[str, Experiment], pairs: Sequence[tuple[Rule, Rule]]) -> Iterator[list[str]]:
    """A row for every task: of each pair the loss of the first rule to that of the second."""
    for task, of in experiments.items():
        row = [ratio(losses(of, ours), losses(of, theirs)) for ours, theirs in pairs]
        if any(row):
            yield [task, *row]


#: Draws of seeds for an interval of what is no mean over seeds.
DRAWS = 2000


def factors(found: dict[tuple[str, str], list[float | None]]) -> list[list[float]]:
    """Geometric means of the factors between losses, with 95 % intervals over drawn seeds: between bases of a rule, powers in a
    basis, Adam and each power in a basis; last, by which factor bases are more than powers.
    """
    import numpy as np

    whole = [j for j in range(len(next(iter(found.values())))) if all(of[j] is not None for of in found.values())]
    logs = {key: np.log([of[j] for j in whole]) for key, of in found.items()}
    pairs = [
        [((rule, a), (rule, b)) for rule in THREE for a, b in itertools.combinations(BASES, 2)],
        [(("GN^-1", basis), ("GN^-1/2", basis)) for basis in BASES],
        *([(("Adam", basis), (power, basis)) for basis in BASES] for power in POWERS),
    ]
    draws = np.random.default_rng(0).integers(len(whole), size=(DRAWS, len(whole)))
    rows = np.concatenate([np.arange(len(whole))[None], draws])
    means = [np.mean([np.abs((logs[a] - logs[b])[rows].mean(1)) for a, b in of], 0) for of in pairs]
    return [
        [math.exp(x) for x in (of[0], *np.quantile(of[1:], (0.025, 0.975)))] for of in (*means, means[0] - means[1])
    ]


def summary(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """The factors, and where the mean loss of those that did not diverge is lowest."""
    for task, of in experiments.items():
        found = {(rule, basis): losses(of, Rule(rule, basis)) for rule, basis in itertools.product(THREE, BASES)}
        if not all(found.values()):
            continue
        best = min(found, key=lambda key: statistics.fmean(x for x in found[key] if x is not None))
        angles = losses(of, Rule("GN^-1/2"), what="cosine")
        known = [x for curve in angles for x in curve if x is not None]  # type: ignore[union-attr]
        cosine = f"{statistics.fmean(known):.3f}"
        written = ("{:.3g} [{:.3g}, {:.3g}]".format(*of) for of in factors(found))
        yield [task, *written, cosine, ", ".join(best)]


#: By which factor a loss may grow in a format before it counts.
GROWN = 1.1


def kept(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """In how many cases, a task and a basis each, a format costs more than ``GROWN``, and in how many anything beyond chance; the
    range of the others.
    """
    kinds = [(rule, kind, "best") for rule in THREE for kind in FORMATS]
    for (rule, kind, own), size in itertools.product((*kinds, ("Adam", "usual, fp16", "usual")), SIZES):
        pairs = (
            (losses(of, Rule(rule, basis), kind), losses(of, Rule(rule, basis), own))
            for task, of in experiments.items()
            for basis in BASES
            if task.endswith(size)
        )
        found = [compare.paired(*pair, ratios=True) for pair in pairs if all(pair)]
        # Of which there is no number has diverged.
        grown, sure = ([of for of in found if not of[k] <= most] for k, most in ((0, GROWN), (1, 1.0)))
        others = [of.mean for of in found if of.mean <= GROWN]
        if others:
            counts = (f"{len(of)} of {len(found)}" for of in (grown, sure))
            yield [rule, kind, size, *counts, f"{min(others):.3f}", f"{max(others):.3f}"]


def fixed(experiments: dict[str, Experiment], rules: Sequence[Rule]) -> Iterator[list[str]]:
    """By which factor the loss grows where the second hyper-parameter is fixed and the learning rate is searched: over the tasks'
    searches, on their first seeds, at learning rates a factor of 4 apart.
    """
    for rule, size in itertools.product(rules, SIZES):
        lr, second = rule.axes
        shares: dict[float, list[float]] = {}
        for task, of in experiments.items():
            case = of.get("search", rule) if task.endswith(size) and rule in METHODS[task] else None
            found: dict[float, float] = {}
            for searched in case["points"] if case else ():
                if float(jobs.coordinate(lr, searched["at"]["lr"])).is_integer():
                    first = searched["scores"][: len(jobs.TASKS[task].searched)]
                    score = statistics.fmean(math.inf if x is None else x for x in first)
                    at = searched["at"][second.name]
                    found[at] = min(found.get(at, math.inf), score)
            for at, score in found.items():
                shares.setdefault(at, []).append(score / min(found.values()))
        most = max(map(len, shares.values()), default=0)
        for at, of_tasks in sorted(shares.items()):
            if len(of_tasks) == most and all(map(math.isfinite, of_tasks)):
                mean = math.exp(statistics.fmean(map(math.log, of_tasks)))
                yield [rule.name, size, f"{second.name} {at:.0e}", f"{mean:.2f}", f"{max(of_tasks):.3g}", str(most)]


def sophias(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    for task, of in experiments.items():
        for rule in SOPHIA:
            for other in (Rule("SGD"), *map(Rule, THREE)):
                if row := ratio(losses(of, rule), losses(of, other)):
                    yield [task, rule.name, other.name, row]


def text(experiments: dict[str, Experiment]) -> str:
    parts = []
    head = ["hyper-parameters", "test loss", "errors, %", *(f"{kind} to float32" for kind in FORMATS), "points"]
    for task, experiment in experiments.items():
        if rows := list(results(experiment)):
            parts.append(aligned([[f"{task}, {len(jobs.TASKS[task].reported)} seeds", *head], *rows]))
    in_bases = [(Rule(rule, basis), Rule(rule)) for basis in BASES[1:] for rule in THREE]
    powers = [(Rule("GN^-1", basis), Rule("GN^-1/2", basis)) for basis in BASES]
    adams = [(Rule("Adam", basis), Rule(power, basis)) for power in POWERS for basis in BASES]
    all_rules = [Rule(rule, basis) for basis in BASES for rule in THREE]
    sections = [
        (
            "Factors between losses, geometric means: between bases of a rule, powers in a basis, Adam and each power in\n"
            "a basis; by which bases are more than powers; 95 %, seeds drawn again. A factor is 1 or more, so noise raises it.\n"
            "The mean cosine between the directions of Adam and GN^-1/2 in the coordinates; the lowest mean loss.",
            ["task", "bases", "powers", *(f"Adam, {p}" for p in POWERS), "bases to powers", "cosine", "lowest"],
            summary(experiments),
        ),
        (
            "Loss in a basis to that in the coordinates, and of GN^-1 to GN^-1/2; 95 %, paired over seeds.",
            ["task", *(ours.name for ours, _ in in_bases), *(f"powers, {ours.basis}" for ours, _ in powers)],
            against(experiments, [*in_bases, *powers]),
        ),
        (
            "Adam's loss to that of each power in the same basis.",
            ["task", *(theirs.name for _, theirs in adams)],
            against(experiments, adams),
        ),
        (
            "Loss to that of SGD with momentum.",
            ["task", *(rule.name for rule in all_rules)],
            against(experiments, [(rule, Rule("SGD")) for rule in all_rules]),
        ),
        (
            "Loss in the Kronecker basis to that in the full one.",
            ["task", *THREE],
            against(experiments, [(Rule(rule, "kronecker"), Rule(rule, "full")) for rule in THREE]),
        ),
        (
            "Loss between the coordinates and the full basis to that in the coordinates.",
            ["task", *(rule.name for rule in GEODESIC)],
            against(experiments, [(rule, Rule(rule.rule)) for rule in GEODESIC]),
        ),
        (
            f"Cases, of a task and a basis, in which a format multiplies the loss by more than {GROWN}, and at all\n"
            f"beyond chance; the range of those that are not grown. usual: 1 - beta2 of {USUAL}.",
            ["rule", "states", "batch", "grown", "beyond chance", "least", "most"],
            kept(experiments),
        ),
        (
            "Loss with a relative damping to that with eps, each searched, in the coordinates.",
            ["task", *POWERS],
            against(experiments, [(Rule(rule.rule), rule) for rule in BY_EPS]),
        ),
        (
            "Factor by which the best mean loss of a search grows where the second hyper-parameter is fixed.",
            ["rule", "batch", "fixed", "mean", "worst", "tasks"],
            fixed(experiments, [*(rule for rule in QUADRANTS if rule.is_curved), *BY_EPS]),
        ),
        (
            "Loss of the class's own Kronecker basis and curvature to that of the harness's, and to that in the coordinates.",
            ["task", *POWERS, *(f"{power} to coordinates" for power in POWERS)],
            against(
                experiments,
                [(rule, Rule(rule.rule, basis)) for basis in ("kronecker", "identity") for rule in OF_CLASS],
            ),
        ),
        ("Sophia's loss to others' in the coordinates.", ["task", "", "to", "ratio"], sophias(experiments)),
    ]
    return joined(parts, sections)


def draw(experiments: dict[str, Experiment], folder: Path) -> None:
    """Write what there is data for."""
    plt = pyplot()
    known = {task: of for task, of in experiments.items() if of.get("report", Rule("SGD"))}
    if not known:
        return
    pictures = {
        "bases": ends(plt, known),
        "curves": curves(plt, known),
        "formats": formats(plt, known),
        "directions": directions(plt, known),
    }
    if tasks := [task for task in known if Rule("Adam", "full", SHARES[0]) in METHODS[task]]:
        pictures["geodesic"] = geodesics(plt, known, tasks)
    save(plt, folder, {f"gauss-newton-{name}": figure for name, figure in pictures.items()})


def panels(plt: Any, tasks: Sequence[str], **options: Any) -> Any:
    """A row for full batches, one for small ones."""
    columns = math.ceil(len(tasks) / 2)
    figure, axes = grid(plt, 2 if len(tasks) > 1 else 1, columns, **options)
    order = sorted(tasks, key=lambda task: (task.endswith("small"), list(METHODS).index(task)))
    for ax, task in zip(axes.flat, order, strict=False):
        ax.set_title(task, fontsize=9)
        ax.tick_params(labelsize=7, which="both")
    return figure, list(zip(axes.flat, order, strict=False))


def legend_of_rules(figure: Any, names: Sequence[str], extra: Sequence[Any] = ()) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLOURS[name], label=name) for name in names]
    figure.legend(handles=[*handles, *extra], loc="outside right upper", frameon=False, fontsize=8)


def ends(plt: Any, experiments: dict[str, Experiment]) -> Any:
    """The claim of bases and powers: a point for each rule in each basis, with its interval."""
    figure, found = panels(plt, list(experiments))
    for ax, task in found:
        for k, rule in enumerate(("SGD", *THREE)):
            for x, basis in enumerate(BASES):
                values = [v for v in losses(experiments[task], Rule(rule, basis)) if v is not None]
                if not values:
                    continue
                logs = [math.log(v) for v in values]
                middle, wide = statistics.fmean(logs), 2.02 * statistics.stdev(logs) / len(logs) ** 0.5
                at = x + 0.16 * (k - 1.5)
                ax.plot([at, at], [math.exp(middle - wide), math.exp(middle + wide)], color=COLOURS[rule], linewidth=2)
                ax.plot(at, math.exp(middle), "o", color=COLOURS[rule], markersize=5)
        ax.set_xticks(range(len(BASES)), BASES)
        ax.set_yscale("log")
    figure.supylabel("test loss, geometric mean of seeds", fontsize=8)
    legend_of_rules(figure, ("SGD", *THREE))
    return figure


def curves(plt: Any, experiments: dict[str, Experiment]) -> Any:
    from matplotlib.lines import Line2D

    figure, found = panels(plt, list(experiments))
    for ax, task in found:
        shown = [Rule(rule, basis) for rule in ("SGD", *THREE) for basis in ("identity", "full")]
        for rule in (*shown, *SOPHIA[:1]):
            if case := experiments[task].get("report", rule) if rule in METHODS[task] else None:
                x, y = jobs.TASKS[task].positions(), compare.mean_curve(case["runs"]["best"])
                ax.plot(x, y, STYLES[rule.basis], color=COLOURS[rule.rule], linewidth=1.3)
        ax.set(yscale="log", xlabel="step")
    figure.supylabel("validation loss", fontsize=8)
    lines = [Line2D([], [], color="black", linestyle=STYLES[basis], label=basis) for basis in ("identity", "full")]
    legend_of_rules(figure, COLOURS, lines)
    return figure


def formats(plt: Any, experiments: dict[str, Experiment]) -> Any:
    """Loss in a format to that in float32; a cross above where seeds diverged."""
    figure, axes = grid(plt, 1, len(FORMATS), sharey=True)
    figure.set_size_inches(11, 4.2)
    tasks, top = list(experiments), 1e4
    for ax, kind in zip(axes[0], FORMATS, strict=True):
        for (k, rule), (j, basis) in itertools.product(enumerate(THREE), enumerate(BASES)):
            for x, task in enumerate(tasks):
                ours = losses(experiments[task], Rule(rule, basis), kind)
                if not ours:
                    continue
                at = x + 0.22 * (k - 1) + 0.06 * (j - 1)
                own = losses(experiments[task], Rule(rule, basis))
                found = compare.paired(ours, own, ratios=True).mean
                lost = math.isnan(found) or found > top
                ax.plot(at, top if lost else found, "x" if lost else "os^"[j], color=COLOURS[rule], markersize=4)
        ax.axhline(1.0, color="#0f172a", linewidth=0.5)
        ax.set(yscale="log", title=f"states in {kind}")
        ax.set_xticks(range(len(tasks)), tasks, rotation=60, ha="right", fontsize=7)
    axes[0][0].set_ylabel("loss to that of float32 states\n(x: above, or diverged)", fontsize=8)
    legend_of_rules(figure, THREE)
    return figure


def directions(plt: Any, experiments: dict[str, Experiment]) -> Any:
    figure, axes = grid(plt, 1, 2, sharey=True)
    for ax, size in zip(axes[0], ("full", "small"), strict=True):
        for task, of in experiments.items():
            if task.endswith(size) and (found := losses(of, Rule("GN^-1/2"), what="cosine")):
                known = ([x for x in at if x is not None] for at in zip(*found, strict=True))  # type: ignore[arg-type]
                y = [statistics.fmean(at) if at else math.nan for at in known]
                ax.plot(jobs.TASKS[task].positions()[1:], y, label=task)
        ax.set(xlabel="step", title=f"{size} batch", ylim=(0, 1.02))
        legend(ax)
    axes[0][0].set_ylabel("cosine between Adam's direction\nand that of GN^-1/2", fontsize=8)
    return figure


def geodesics(plt: Any, experiments: dict[str, Experiment], tasks: Sequence[str]) -> Any:
    figure, found = panels(plt, tasks)
    for ax, task in found:
        for name in THREE:
            rules = {0.0: Rule(name), **{s: Rule(name, "full", s) for s in SHARES}, 1.0: Rule(name, "full")}
            points = {s: [v for v in losses(experiments[task], rule) if v] for s, rule in rules.items()}
            shown = {s: math.exp(statistics.fmean(map(math.log, of))) for s, of in points.items() if of}
            ax.plot(*zip(*shown.items(), strict=True), "o-", color=COLOURS[name], markersize=4)
        ax.set(yscale="log", xlabel="s: coordinates at 0, full basis at 1")
    figure.supylabel("test loss", fontsize=8)
    legend_of_rules(figure, THREE)
    return figure
