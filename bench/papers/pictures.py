"""Pictures of bench/claims.py: curves over steps and over time, the price of a ``hyper_lr``, learnt preconditioners."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import compare, contenders, jobs, tables
from .contenders import BASES, METHODS, Method

if TYPE_CHECKING:
    from ..claims import Experiment

COLOURS = {"usual": "#94a3b8", "best": "#0f172a", "spatial": "#c2410c", "input": "#0f766e"}
#: A base searches its learning rate alone, and its second hyper-parameter too; FOP is shown at the first of these lr.
LABELS = {"usual": "base, lr tuned", "best": "base, all tuned", "spatial": "FOP, spatial", "input": "FOP, input"}
#: At ``hyper_lr`` 1e-2, at which trainings differ most from their base's.
SHOWN = contenders.swapped(1e-2)
#: Where both are one, both are seen.
STYLES = {"best": ":"}
OF_BASES = dict(zip(BASES, ("#2563eb", "#c2410c", "#0f766e", "#7c3aed"), strict=True))
#: The end of a training is shown: losses up to so many times the lowest.
HIGHEST = 5.0


def draw(experiments: dict[str, Experiment], folder: Path) -> None:
    """Write what there is data for."""
    plt = pyplot()
    overhead = folder / "overhead.json"
    per_step = json.loads(overhead.read_text())["ms"] if overhead.exists() else {}
    pictures = {"fop-steps": curves(plt, experiments, {}), "fop-hyper-lr": prices(plt, experiments)}
    if per_step:
        pictures["fop-time"] = curves(plt, experiments, per_step)
    if "fashion" in experiments:
        pictures["fop-spatial"] = preconditioners(plt, experiments["fashion"])
    save(plt, folder, {name: figure for name, figure in pictures.items() if figure is not None}, dpi=100)


def pyplot() -> Any:
    """matplotlib's, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(plt: Any, folder: Path, figures: dict[str, Any], dpi: int = 90) -> None:
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=dpi)
        plt.close(figure)


def grid(plt: Any, rows: int, columns: int, **options: Any) -> Any:
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.9 * rows), layout="constrained", squeeze=False, **options
    )
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(ax: Any) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=6)


def milliseconds(per_step: dict[str, dict[str, float]], task: str, method: Method) -> float:
    """Of a training step of one network."""
    of = per_step[task]
    name = f"FOP({method.base}), {method.mode}" if method.mode else method.base
    return of["forward and backward"] + of[name]


def curves(plt: Any, experiments: dict[str, Experiment], per_step: dict[str, dict[str, float]]) -> Any:
    """Means over seeds: a row of panels for each task, a column for each base; over seconds where times of a step are given."""
    tasks = [task for task, experiment in experiments.items() if experiment.get("report", "SGD")]
    if not tasks:
        return None
    figure, axes = grid(plt, len(tasks), len(BASES), sharey="row")
    for row, task in zip(axes, tasks, strict=True):
        experiment, kind = experiments[task], jobs.TASKS[task]
        for ax, base in zip(row, BASES, strict=True):
            shown = [(Method(base), "usual", "usual"), (Method(base), "best", "best")]
            shown += [
                (method, SHOWN, method.mode) for method in METHODS[task] if method.base == base and method.is_default
            ]
            for method, point, look in shown:
                case = experiment.get("report", method.name)
                if not case or point not in case["runs"]:
                    continue
                scale = milliseconds(per_step, task, method) / 1e3 if per_step else 1.0
                x, y = [scale * at for at in kind.positions()], compare.mean_curve(case["runs"][point])
                ax.plot(x, y, color=COLOURS[look], label=LABELS[look], linewidth=1.4, linestyle=STYLES.get(look, "-"))
            ax.set_title(f"{task}: {base}", fontsize=9)
            ax.set_xlabel("seconds" if per_step else "step", fontsize=8)
            ax.tick_params(labelsize=7, which="both")
            legend(ax)
        if kind.unit == "loss":
            row[0].set_yscale("log", subs=(2, 3, 5))
            row[0].yaxis.set_major_formatter("{x:g}")
            row[0].yaxis.set_minor_formatter("{x:g}")
            lowest = min(min(line.get_ydata()) for ax in row for line in ax.lines)
            row[0].set_ylim(0.93 * lowest, HIGHEST * lowest)
        row[0].set_ylabel("validation loss" if kind.unit == "loss" else "return", fontsize=8)
    return figure


def prices(plt: Any, experiments: dict[str, Experiment]) -> Any:
    """What every ``hyper_lr`` costs against the tuned one, with intervals."""
    tasks = [
        task
        for task, experiment in experiments.items()
        if any(experiment.get("prices", m) for m in METHODS[task] if m.is_default)
    ]
    if not tasks:
        return None
    figure, axes = grid(plt, 1, len(tasks), sharey=True)
    for ax, task in zip(axes[0], tasks, strict=True):
        for k, method in enumerate(method for method in METHODS[task] if method.is_default):
            of = tables.price(experiments[task], method)
            style = "o-" if method.mode == "input" else "s--"
            middle = [100 * d.mean for d in of.values()]
            errors = [[100 * (d.mean - d.low) for d in of.values()], [100 * (d.high - d.mean) for d in of.values()]]
            x = [h * (1.0 + 0.04 * k) for h in of]
            ax.errorbar(
                x,
                middle,
                errors,
                fmt=style,
                color=OF_BASES[method.base],
                label=f"{method.base}, {method.mode}",
                markersize=3,
                linewidth=1,
                elinewidth=0.5,
            )
        ax.axhline(tables.ALLOWED, color="#0f172a", linewidth=0.6)
        ax.set(xscale="log", ylim=(-40, 60), title=task, xlabel="hyper_lr")
    axes[0][0].set_ylabel("worse than tuned by, %")
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes.flat), key=lambda of: len(of[1]))
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7)
    return figure


def preconditioners(plt: Any, experiment: Experiment) -> Any:
    """M M^T of every 3 x 3 convolution of one network: the matrix, its first and last eigenvectors as kernels, and spectra."""
    import torch

    cases = {}
    for base in BASES:
        default = next(m for m in METHODS[experiment.task] if (m.base, m.mode) == (base, "spatial") and m.is_default)
        case = experiment.get("report", default.name)
        if case and "preconditioners" in case["runs"]["best"][0]:
            found = [record.get("preconditioners") for record in case["runs"]["best"]]
            cases[base] = [of for of in found if of]
    if not cases:
        return None
    layers = [name for name, of in next(iter(cases.values()))[0].items() if "matrix" in of]
    figure, axes = grid(plt, len(cases), 4 * len(layers) + 1, width_ratios=[*[2, 1, 1, 1] * len(layers), 3])
    figure.set_size_inches(2.1 * len(layers) * 2.4 + 3.4, 2.0 * len(cases))
    for row, (base, records) in zip(axes, cases.items(), strict=True):
        for k, layer in enumerate(layers):
            P = torch.tensor(records[0][layer]["matrix"], dtype=torch.float64)
            values, vectors = torch.linalg.eigh(P)
            vectors = vectors * vectors.sum(0).sign()
            shown = [(P, f"{base}, convolution {k + 1}", P.abs().max())]
            shown += [(vectors[:, i].view(3, 3), f"{values[i]:.3g}", 0.7) for i in (-1, -2, 0)]
            for ax, (image, title, size) in zip(row[4 * k : 4 * k + 4], shown, strict=True):
                ax.imshow(image, cmap="RdBu_r", vmin=-size, vmax=size)
                ax.set_title(title, fontsize=7)
                ax.set_axis_off()
        for layer in records[0]:
            spectra = [sorted(record[layer]["eigenvalues"], reverse=True) for record in records]
            middle = [statistics.median(of) for of in zip(*spectra, strict=True)]
            places = [i / max(len(middle) - 1, 1) for i in range(len(middle))]
            name = f"convolution {layers.index(layer) + 1}" if layer in layers else "linear"
            row[-1].plot(places, middle, label=f"{name}, {len(middle)}", linewidth=1)
        row[-1].set(yscale="log")
        row[-1].set_title("eigenvalues, median of seeds", fontsize=7)
        row[-1].tick_params(labelsize=6, which="both")
        legend(row[-1])
    return figure
