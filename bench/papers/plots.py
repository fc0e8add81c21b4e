"""One picture for each paper, from what bench/theory.py keeps; what is not there is not drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"SGD": "#9aa5b1", "GN^-1": "#0f766e", "GN^-1/2": "#7c3aed", "Adam": "#c2410c"}


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write what the report has data for; return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figures = report.get("figures", {})
    pictures = {"ye": ye, "ghane": ghane, "liu": liu, "moskovitz": moskovitz}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, picture in pictures.items():
        panels = picture(figures)
        if not panels:
            continue
        figure, axes = plt.subplots(
            1, len(panels), figsize=(6.2 * len(panels), 4.6), layout="constrained", squeeze=False
        )
        for ax, panel in zip(axes[0], panels, strict=True):
            panel(ax)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", alpha=0.25)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(frameon=False, fontsize=8)
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)
        written.append(folder / f"{name}.png")
    return written


def ye(figures):
    def fixed_points(ax):
        for (lam, (g, p)), colour in zip(figures["l1"].items(), ("#c2410c", "#0f766e"), strict=True):
            order = sorted(range(len(g)), key=lambda i: -g[i])
            ax.axhline(float(lam) ** 2, color=colour, linewidth=0.8)
            for kept, marker in ((True, "o"), (False, "x")):
                chosen = [(i, g[j]) for i, j in enumerate(order) if (p[j] != 0.0) == kept]
                label = f"$\\lambda$ = {lam}: {'nonzero' if kept else 'zero'} weights"
                ax.plot(*zip(*chosen, strict=True), marker, color=colour, label=label, markersize=5)
        ax.set(yscale="log", xlabel="coordinate, sorted", ylabel="|gradient| at the end")
        ax.set_title("Adam with intrinsic L1: |gradient| = $\\lambda^2$ where a weight is left", fontsize=10)

    def conditioning(ax):
        names = ["Hessian", "with BNP"]
        for k, (case, values) in enumerate(figures["bnp"].items()):
            ax.bar([i + 0.38 * k - 0.19 for i in range(2)], values[3:5], 0.36, label=f"{case} inputs", bottom=0.0)
        ax.set_xticks(range(2), names)
        ax.set(yscale="log", ylabel="condition number")
        ax.set_title("Least squares on unscaled inputs", fontsize=10)

    return [panel for key, panel in (("l1", fixed_points), ("bnp", conditioning)) if key in figures]


def ghane(figures):
    def bias(ax):
        for eta, shift in (("0.2", -0.2), ("1.8", 0.2)):
            values = [max(of[eta], 1e-13) for of in figures["dual"].values()]
            ax.barh([i + shift for i in range(len(values))], values, 0.38, label=f"$\\eta M s_1^2$ = {eta}")
        ax.set_yticks(range(len(figures["dual"])), figures["dual"], fontsize=8)
        ax.set(xscale="log", xlabel="distance to where gradient descent ends, relative")
        ax.set_title("Maps that only mix columns end with gradient descent", fontsize=10)

    def adam(ax):
        lrs = [float(lr) for lr in figures["adam_delta"]]
        deltas = list(figures["adam_delta"].values())
        ax.plot(lrs, deltas, "o-", color=COLOURS["Adam"], label="measured: ||W - W_GD|| / ||W_GD - W_0||")
        ax.plot(lrs, [(1 + x * x) ** 0.5 for x in deltas], "s--", color="#334155", label="c = (1 + $\\delta^2)^{1/2}$")
        ax.set(xscale="log", xlabel="learning rate", ylim=(0, None))
        ax.set_title("Where Adam ends depends on its learning rate", fontsize=10)

    return [panel for key, panel in (("dual", bias), ("adam_delta", adam)) if key in figures]


def liu(figures):
    def losses(key, title):
        def panel(ax):
            for name, curve in figures[key].items():
                ax.plot([max(loss, 1e-20) for loss in curve], color=COLOURS[name], label=name)
            ax.set(yscale="log", xlabel="step", ylabel="suboptimality, best learning rate")
            ax.set_title(title, fontsize=10)

        return panel

    def quadrants(ax):
        rows = [row for row in figures["quadrants"] if row[3] > 1e-11]
        names = sorted({(row[0], row[1]) for row in rows}, key=lambda of: (of[1] == "eigen", of[0] or 1e9))
        for row in rows:
            size, basis, method, expected, low, middle, high = row
            x = names.index((size, basis)) + 0.18 * (list(COLOURS).index(method) - 1.5)
            ax.plot([x, x], [low, high], color=COLOURS[method], linewidth=4, alpha=0.4)
            ax.plot(
                x, middle, "o", color=COLOURS[method], markersize=5, label=method if names[0] == (size, basis) else None
            )
            ax.plot(x, expected, "_", color="black", markersize=9)
        ax.set_xticks(range(len(names)), [f"B = {size or 'all'}\n{basis}" for size, basis in names], fontsize=8)
        ax.set(yscale="log", ylabel="excess loss")
        ax.set_title("Linear regression: groups of 8 seeds; the expected number as a dash", fontsize=10)

    panels = []
    if "block" in figures:
        panels.append(losses("block", "Block-wise covariance, full batch"))
    if "logistic" in figures:
        panels.append(losses("logistic", "Reparameterised logistic regression"))
    if "quadrants" in figures:
        panels.append(quadrants)
    return panels


def moskovitz(figures):
    def quadratic(ax):
        for name, curve in figures["fop"].items():
            ax.plot(curve, label=name, linewidth=2.5 if name == "GD" else 1.3)
        ax.set(yscale="log", xlabel="step", ylabel="loss", ylim=(1e-60, 1e4))
        ax.set_title("A quadratic of condition number 100", fontsize=10)

    return [quadratic] if "fop" in figures else []
