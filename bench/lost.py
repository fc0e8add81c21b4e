"""What rounding loses of updates over a training in bfloat16: the demo's GPT with weights rounded to nearest, stochastically and
split, and the statistics of each step. Draws one picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import precond

from . import ROOT, demo, timing

#: Weight formats with the colours of their lines.
FORMATS = {"nearest": (None, "#9aa5b1"), "stochastic": ("stochastic", "#0f766e"), "split24": ("split24", "#c2410c")}
#: Steps that a line is the mean of: one step's share depends on its gradient.
_WINDOW = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    demo.add_arguments(parser)
    parser.set_defaults(out=ROOT / "bench" / "results" / "lost-updates.png")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all")


def one(
    name: str, text: torch.Tensor, steps: int, arguments: argparse.Namespace, quiet: bool = False
) -> dict[str, Any]:
    """Losses, lost shares and shares that arrive, of each step."""
    found: dict[str, Any] = {"lost": [], "arrived": []}

    def note(optimizer: Any, *_: Any) -> None:
        of = dict(zip(optimizer.statistics.columns, optimizer.statistics.total.tolist(), strict=True))
        for column in ("lost", "arrived"):
            found[column].append(of[column])

    def make(params: Any) -> torch.optim.Optimizer:
        optimizer = precond.AdamW(
            params,
            lr=3e-3,
            betas=(0.9, 0.99),
            weight_decay=0.1,
            weight_format=FORMATS[name][0],
            state_format="fp32",
            statistics=True,
        )
        optimizer.register_step_post_hook(note)
        return optimizer

    ran = demo.train(name, make, text, steps, arguments, quiet, dtype=torch.bfloat16)
    return {"loss": ran.losses, **found, "held_out": ran.held_out}


def smooth(values: list[float]) -> list[float]:
    return [statistics.mean(values[max(0, i - _WINDOW + 1) : i + 1]) for i in range(len(values))]


def draw(runs: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    titles = {
        "lost": "elements whose update leaves them as they were",
        "arrived": "share of the update that arrives",
        "loss": "training loss, nats per byte",
    }
    for axes, (column, what) in zip(panels, titles.items(), strict=True):
        for name, run in runs.items():
            axes.plot(smooth(run[column]), color=FORMATS[name][1], linewidth=1.8, label=name)
        axes.set(xlabel="step", title=what)
        if column != "loss":
            axes.set_ylim(-0.03, 1.25 if column == "arrived" else 1.03)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    panels[0].legend(frameon=False, loc="upper left")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    text = demo.standard_library_text()
    steps = arguments.steps
    runs = {name: one(name, text, steps, arguments) for name in FORMATS}
    last = slice(-steps // 4, None)
    print(f"\n{'':12} {'lost':>7} {'arrived':>8} {'loss':>8} {'held out':>9}   (means of the last quarter)")
    for name, found in runs.items():
        lost, arrived, loss = (statistics.mean(found[column][last]) for column in ("lost", "arrived", "loss"))
        print(f"{name:12} {lost:7.3f} {arrived:8.3f} {loss:8.4f} {found['held_out']:9.4f}")
    title = f"Byte-level GPT in bfloat16, AdamW with float32 states, {steps} steps"
    draw(runs, arguments.out, title)
    path = arguments.out.with_suffix(".json")
    rounded = {
        name: {key: [round(x, 5) for x in value] if isinstance(value, list) else value for key, value in found.items()}
        for name, found in runs.items()
    }
    settings = {"steps": steps, "batch": arguments.batch, "width": arguments.width, "layers": arguments.layers}
    document = {"environment": timing.environment(), "settings": settings, "runs": rounded}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"drawn in {arguments.out}, numbers in {path}")
