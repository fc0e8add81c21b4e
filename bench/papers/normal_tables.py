"""Tables and pictures of batch normalisation preconditioning, from the files of bench/claims.py."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import compare, jobs
from .normalisers import BNPS, LAYERS, MEANS, METHODS, METHODS_OF, NETS, OF_IMAGES, OF_ROWS, SIZES, Normalised
from .pictures import grid, pyplot, save
from .quadrants import losses
from .tables import aligned, compared, joined, point, spread

if TYPE_CHECKING:
    from ..claims import Experiment

COLOURS = {"none": "#94a3b8", "BNP": "#c2410c", "BatchNorm": "#2563eb", "GroupNorm": "#0f766e"}
OF_LAYERS = ("#0f172a", "#c2410c", "#0f766e", "#7c3aed")
#: In pictures of trainings: the smallest and the largest batch, and the single pass.
SHOWN = tuple(
    task for task in METHODS if (task.endswith(("-1", "-8")) and task not in MEANS) or task.startswith("online")
)
#: What a report has, beside the best point of a search.
KINDS = {"best": [], "usual": ["default eps1"], "swapped": ["default eps1, plain lr"]}
#: What is compared: the loss as a ratio, errors as a difference.
WHAT = ("test", "error")


def colour(method: Normalised) -> str:
    return COLOURS["BNP" if method.is_bnp else method.norm or "none"]


def of_bnp(optimizer: str) -> Normalised:
    return Normalised(optimizer, BNPS[optimizer])


def against(experiment: Experiment, ours: Normalised, theirs: Normalised, kind: str = "best") -> list[str]:
    """The ratio of losses and the difference of errors in points, paired over seeds; empty without reports.

    ``kind``: of ours, to the best of theirs.
    """
    if theirs not in METHODS[experiment.task] or (ours, kind) == (theirs, "best"):
        return [""] * len(WHAT)
    case, other = experiment.get("report", ours), experiment.get("report", theirs)
    if not case or not other:
        return [""] * len(WHAT)
    return [str(compared(experiment, what, case, kind, other, "best") or "") for what in WHAT]


def results(experiment: Experiment) -> Iterator[list[str]]:
    for method in METHODS[experiment.task]:
        case, searched = experiment.get("report", method), experiment.get("search", method)
        if not case or not searched:
            continue
        for kind in case["points"]:
            row = [
                ", ".join([method.name, *KINDS[kind]]),
                point(case["points"][kind]),
                spread(losses(experiment, method, kind)),
                percent(errors(experiment, method, kind)),
            ]
            yield [*row, *against(experiment, method, Normalised(method.base), kind), str(searched["count"])]


def errors(experiment: Experiment, method: Normalised, kind: str = "best") -> list[float]:
    """In per cent, of every seed. One that diverged has some too."""
    return [100 * x for x in losses(experiment, method, kind, "test_error") if x is not None]


def percent(found: Sequence[float]) -> str:
    return f"{statistics.fmean(found):.1f} +- {statistics.stdev(found):.1f}"


def summary(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """BNP as it comes against the plain optimizer and against layers in the network."""
    for optimizer, (task, of) in itertools.product(BNPS, experiments.items()):
        pairs = [against(of, of_bnp(optimizer), Normalised(optimizer, norm), "usual") for norm in ("", *LAYERS)]
        if any(map(any, pairs)):
            yield [optimizer, task, *itertools.chain(*pairs)]


def defaults(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """What a search of eps1 gains over the default; around Adam also what its own learning rate loses."""
    for optimizer, (task, of) in itertools.product(BNPS, experiments.items()):
        ours = of_bnp(optimizer)
        if case := of.get("report", ours):
            searched = f"{case['points']['best']['eps1']:g}"
            for kind in [kind for kind in case["points"] if kind != "best"]:
                pairs = [against(of, ours, theirs, kind) for theirs in (ours, Normalised(optimizer))]
                lr = case["points"][kind]["lr"]
                yield [optimizer, task, searched, *KINDS[kind], f"{lr:.2g}", *itertools.chain(*pairs)]


def of_q(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    """The class's q beside others."""
    for task, of in experiments.items():
        pairs = [against(of, of_bnp("SGD"), other) for other in (OF_ROWS, OF_IMAGES)]
        if any(map(any, pairs)):
            yield [task, *itertools.chain(*pairs, against(of, OF_ROWS, Normalised("SGD")))]


def conditions(experiment: Experiment, method: Normalised) -> list[list[list[float]]]:
    """Geometric means over seeds, [position][layer][as they are, with BNP]; empty without a report."""
    case = experiment.get("report", method) if method in METHODS[experiment.task] else None
    found = [record["conditions"] for record in case["runs"]["best"] if "conditions" in record] if case else []
    together = functools.partial(zip, strict=True)
    return [[[middle(pair) for pair in together(*layer)] for layer in together(*at)] for at in together(*found)]


def middle(values: Sequence[float | None]) -> float:
    """The geometric mean, NaN where one is unknown."""
    known = [math.log(x) for x in values if x is not None]
    return math.exp(statistics.fmean(known)) if len(known) == len(values) else math.nan


def condition_rows(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    for task, of in experiments.items():
        for method in METHODS[task]:
            if found := conditions(of, method):
                ends = (" ".join(f"{plain:.3g} > {bnp:.3g}," for plain, bnp in found[k]) for k in (0, -1))
                yield [task, method.name, *(end.rstrip(",") for end in ends)]


def both(*others: str) -> list[str]:
    return [f"{what} to {other}" for other in others for what in ("loss", "errors")]


def hidden(experiment: Experiment, method: Normalised, k: int) -> str:
    """The geometric mean of condition numbers over layers but the first and positions but the start: k 0 as they are, 1 as BNP
    sees them.
    """
    found = [layer[k] for at in conditions(experiment, method)[1:] for layer in at[1:]]
    return f"{middle(found):.0f}" if found else ""


def hidden_rows(experiments: dict[str, Experiment]) -> Iterator[list[str]]:
    for optimizer, (task, of) in itertools.product(BNPS, experiments.items()):
        plain, ours = Normalised(optimizer), of_bnp(optimizer)
        layers = (hidden(of, Normalised(optimizer, norm), 0) for norm in LAYERS)
        row = [hidden(of, plain, 0), hidden(of, plain, 1), hidden(of, ours, 0), hidden(of, ours, 1), *layers]
        if any(row):
            yield [optimizer, task, *row]


def text(experiments: dict[str, Experiment]) -> str:
    parts = []
    head = ["hyper-parameters", "test loss", "errors, %", "loss to plain", "errors to plain", "points"]
    for task, experiment in experiments.items():
        if rows := list(results(experiment)):
            parts.append(aligned([[f"{task}, {len(jobs.TASKS[task].reported)} seeds", *head], *rows]))
    sections = [
        (
            "BNP with its default eps1 of 1e-2 to the plain optimizer and to layers in the network: ratio of losses,\n"
            "difference of errors in points; 95 %, paired over seeds.",
            ["BNP around", "task", *both("plain", *LAYERS)],
            summary(experiments),
        ),
        (
            "That to BNP with eps1 searched; around Adam also with the best learning rate of Adam alone.",
            ["BNP around", "task", "eps1 searched", "", "lr", *both("searched", "plain")],
            defaults(experiments),
        ),
        (
            "Around SGD, eps1 searched: q^2 = max(m, rows) / samples of convolutions to max(m / rows, 1) and to\n"
            "max(m / samples, 1); that of rows to plain.",
            ["task", *both("q of rows", "q of images"), *(f"{what} of rows to plain" for what in ("loss", "errors"))],
            of_q(experiments),
        ),
        (
            "Condition numbers of extended inputs, geometric means over seeds, layers but the first and positions but the start.",
            ["", "task", "plain", "as BNP would see them", "with BNP", "as BNP sees them", *LAYERS],
            hidden_rows(experiments),
        ),
        (
            "Condition numbers of each layer's extended inputs, as they are > as BNP sees them; geometric means of seeds.",
            ["task", "method", "start", "end"],
            condition_rows(experiments),
        ),
    ]
    return joined(parts, sections)


def draw(experiments: dict[str, Experiment], folder: Path) -> None:
    """Write what there is data for."""
    plt = pyplot()
    known = {task: of for task, of in experiments.items() if any(of.get("report", m) for m in METHODS[task])}
    shown = [task for task in SHOWN if task in known] or list(known)
    if not known:
        return
    pictures = {
        "batches": batches(plt, known),
        "curves": curves(plt, known, shown),
        "conditions": condition_curves(plt, known, shown),
    }
    save(plt, folder, {f"bnp-{name}": figure for name, figure in pictures.items()})


def legend_of(figure: Any, *lines: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **line) for line in lines]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)


def of_methods() -> list[dict[str, Any]]:
    return [{"color": of, "label": name} for name, of in COLOURS.items()]


def batches(plt: Any, experiments: dict[str, Experiment]) -> Any:
    """Losses and errors over the size of a batch, with intervals of their means."""
    figure, axes = grid(plt, len(BNPS), 2 * len(NETS), sharex=True)
    for row, (optimizer, methods) in zip(axes, METHODS_OF.items(), strict=True):
        for (net, what), ax in zip(itertools.product(NETS, WHAT), row, strict=True):
            for k, method in enumerate(methods):
                found: dict[int, list[float]] = {}
                for size in SIZES:
                    of = experiments.get(f"{net}-{size}")
                    if of and method in METHODS[of.task]:
                        kind = "usual" if method.is_bnp else "best"
                        every = losses(of, method, kind) if what == "test" else errors(of, method, kind)
                        if len(values := [x for x in every if x is not None]) > 1:
                            found[size] = values
                x = [size * 1.03 ** (k - 1.5) for size in found]
                y = [statistics.fmean(of) for of in found.values()]
                wide = [2.09 * statistics.stdev(of) / len(of) ** 0.5 for of in found.values()]
                if found:
                    ax.errorbar(x, y, wide, fmt="o-", color=colour(method), markersize=3, linewidth=1.2)
            ax.set_title(f"{optimizer}, {net}: {'test loss' if what == 'test' else 'errors, %'}", fontsize=9)
            ax.set_xscale("log", base=2)
            ax.set_xticks(SIZES, SIZES)
            if ax.has_data():
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:.4g}")
                ax.yaxis.set_minor_formatter("{x:.4g}")
            ax.tick_params(axis="y", labelsize=7, which="both")
    figure.supxlabel("images in a batch, same number of passes", fontsize=8)
    legend_of(figure, *of_methods())
    return figure


def panels(plt: Any, tasks: Sequence[str]) -> tuple[Any, list[tuple[Any, str, str]]]:
    """A row for each optimizer, a column for each task."""
    figure, axes = grid(plt, len(BNPS), len(tasks))
    found = [(ax, *of) for ax, of in zip(axes.flat, itertools.product(BNPS, tasks), strict=True)]
    for ax, optimizer, task in found:
        ax.set_title(f"{optimizer}, {task}", fontsize=9)
        ax.tick_params(labelsize=7, which="both")
        ax.set_yscale("log")
    return figure, found


def curves(plt: Any, experiments: dict[str, Experiment], tasks: Sequence[str]) -> Any:
    figure, found = panels(plt, tasks)
    for ax, optimizer, task in found:
        for method in METHODS_OF[optimizer]:
            if method in METHODS[task] and (case := experiments[task].get("report", method)):
                x, y = jobs.TASKS[task].positions(), compare.mean_curve(case["runs"]["best"])
                ax.plot(x, y, color=colour(method), linewidth=1.3)
    figure.supylabel("validation loss, mean of seeds", fontsize=8)
    legend_of(figure, *of_methods())
    return figure


def condition_curves(plt: Any, experiments: dict[str, Experiment], tasks: Sequence[str]) -> Any:
    """Of the layers' inputs: in the plain network, as BNP sees them in its own, and behind GroupNorm."""
    lines = {"plain": ("-", "", 0), "with BNP": ("--", "BNP", 1), "with GroupNorm": (":", "GroupNorm", 0)}
    figure, found = panels(plt, tasks)
    for ax, optimizer, task in found:
        for style, norm, k in lines.values():
            method = of_bnp(optimizer) if norm == "BNP" else Normalised(optimizer, norm)
            for layer, of in enumerate(zip(*conditions(experiments[task], method), strict=True)):
                y = [pair[k] for pair in of]
                ax.plot(jobs.TASKS[task].taken(), y, style, color=OF_LAYERS[layer], linewidth=1.2)
    figure.supylabel("condition number of [1, inputs]", fontsize=8)
    layers = [{"color": of, "label": f"layer {k + 1}"} for k, of in enumerate(OF_LAYERS)]
    legend_of(figure, *layers, *({"color": "black", "linestyle": of[0], "label": name} for name, of in lines.items()))
    return figure
