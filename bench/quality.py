"""Training quality of the formats: the demo's GPT in bfloat16, several seeds, and for each seed the difference of every
combination from float32 weights and states. Takes an hour or more; stopped at any time, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import precond

from . import ROOT, demo, record, timing

#: split32 with float32 states takes the steps of float32 weights, bit for bit: the same forward in bfloat16 for all.
BASE = "fp32"
COMBINATIONS = {
    BASE: ("split32", "fp32"),
    "split24 + int8": ("split24", "int8"),
    "stochastic + int8": ("stochastic", "int8"),
    "stochastic + int4": ("stochastic", "int4"),
    "split24 + int4": ("split24", "int4"),
    "split32 + bf16": ("split32", "bf16"),
    # For contrast, what torch does with bfloat16 parameters.
    "nearest": (None, None),
}
#: By how many standard deviations of the base over seeds a new format may be worse than the one before.
WORSE = 0.25
#: Largest mean difference, in standard deviations of the base over seeds.
TARGETS = {name: 1.0 if "int4" in name else 0.5 for name in COMBINATIONS if name not in (BASE, "nearest")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    demo.add_arguments(parser)
    record.add_arguments(parser, out=False)
    parser.set_defaults(steps=None)
    parser.add_argument("--seeds", type=int, help="default 3; quick 2, of 10 steps instead of 2000")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all")
    parser.add_argument("--json", type=Path, help="kept and extended (default bench/results/quality.json)")
    parser.add_argument(
        "--against", type=Path, help="compare with this earlier file, seed by seed: are new formats worse?"
    )


def one(name: str, seed: int, text: torch.Tensor, arguments: argparse.Namespace) -> dict[str, object]:
    """The losses of one combination and seed: the mean of the last hundred steps, and on held out text."""
    weight_format, state_format = COMBINATIONS[name]

    def make(params):
        return precond.AdamW(
            params, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1, weight_format=weight_format, state_format=state_format
        )

    run = demo.train(
        f"{name}, seed {seed}",
        make,
        text,
        arguments.steps,
        arguments,
        seed=seed,
        dtype=torch.bfloat16,
        held_out_batches=4 if arguments.quick else 64,
    )
    return {
        "combination": name,
        "seed": seed,
        "training": statistics.mean(run.losses[-100:]),
        "held_out": run.held_out,
        "state_bytes": run.state_bytes,
        "seconds": run.seconds,
        "commit": timing.commit(),
    }


def summary(runs: list[dict]) -> list[dict[str, object]]:
    """Per combination the mean difference from the base, seed by seed, in its standard deviations over seeds."""
    found = {(run["combination"], run["seed"]): run for run in runs}
    rows = []
    for name in COMBINATIONS:
        seeds = sorted(seed for other, seed in found if other == name and (BASE, seed) in found)
        if name == BASE or len(seeds) < 2:
            continue
        row: dict[str, object] = {"combination": name, "seeds": len(seeds)}
        for loss in ("training", "held_out"):
            base = [found[BASE, seed][loss] for seed in seeds]
            differences = [found[name, seed][loss] - b for seed, b in zip(seeds, base, strict=True)]
            deviation = statistics.stdev(base)
            row[loss] = statistics.mean(differences)
            row[f"{loss}_deviations"] = statistics.mean(differences) / deviation
            row[f"{loss}_seed_deviation"] = deviation
        row["target"] = TARGETS.get(name)
        rows.append(row)
    return rows


def against(runs: list[dict], earlier: list[dict]) -> list[dict[str, object]]:
    """Per combination and loss the mean difference from the same seeds of an earlier file, and its standard error, in the
    standard deviations of the earlier base over seeds. Worse: more than ``WORSE`` of them, by two standard errors.
    """
    new, old = ({(run["combination"], run["seed"]): run for run in some} for some in (runs, earlier))
    rows = []
    for name in COMBINATIONS:
        seeds = sorted(seed for other, seed in new if other == name and (name, seed) in old and (BASE, seed) in old)
        if len(seeds) < 2:
            continue
        row: dict[str, object] = {"combination": name, "seeds": len(seeds)}
        for loss in ("training", "held_out"):
            deviation = statistics.stdev(old[BASE, seed][loss] for seed in seeds)
            differences = [(new[name, seed][loss] - old[name, seed][loss]) / deviation for seed in seeds]
            mean, error = statistics.mean(differences), statistics.stdev(differences) / len(seeds) ** 0.5
            row |= {loss: mean, f"{loss}_error": error, f"{loss}_worse": mean - 2 * error > WORSE}
        rows.append(row)
    return rows


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    text = demo.standard_library_text()
    end = record.end_of(arguments)
    quick = arguments.quick
    path = arguments.json or ROOT / "bench" / "results" / f"quality{'-quick' if quick else ''}.json"
    arguments.steps = arguments.steps or (10 if quick else 2000)
    seeds = arguments.seeds or (2 if quick else 3)
    report = json.loads(path.read_text()) if path.exists() and not arguments.fresh else {"runs": []}
    settings = {k: getattr(arguments, k) for k in ("steps", "batch", "context", "width", "layers")}
    if report.setdefault("settings", settings) != settings:
        raise ValueError(f"settings must be those of {path}, {report['settings']}, got {settings}")
    done = {(run["combination"], run["seed"]) for run in report["runs"]}
    # Always the base, from which the others are differences.
    names = dict.fromkeys([BASE, *record.chosen(COMBINATIONS, arguments.only)])
    todo = [(n, s) for s in range(seeds) for n in names if (n, s) not in done]
    todo.sort(key=lambda run: run[0] not in TARGETS and run[0] != BASE)
    for k, (name, seed) in enumerate(tqdm(todo, desc="runs")):
        if end is not None and time.monotonic() > end:
            tqdm.write(f"time is up, {len(todo) - k} runs left: run it again")
            break
        report["runs"].append(one(name, seed, text, arguments))
        report |= {"environment": timing.environment(), "date": time.strftime("%Y-%m-%d")}
        report["summary"] = summary(report["runs"])
        record.write(path, json.dumps(report, indent=1) + "\n")
    print("| combination | training loss, from fp32 | in seed deviations | held out | in seed deviations | target |")
    print("|---|---|---|---|---|---|")
    for row in report.get("summary", []):
        figures = [f"{row[k]:+.4f}" for k in ("training", "training_deviations", "held_out", "held_out_deviations")]
        print(f"| {row['combination']} | {' | '.join(figures)} | {row['target'] or ''} |")
    if arguments.against is None:
        return
    earlier = json.loads(arguments.against.read_text())
    if earlier["settings"] != settings:
        raise ValueError(f"settings of --against must be those of {path}, {settings}, got {earlier['settings']}")
    print("\n| combination, against the earlier file | seeds | training loss, in seed deviations | held out | worse |")
    print("|---|---|---|---|---|")
    for row in against(report["runs"], earlier["runs"]):
        figures = [f"{row[loss]:+.2f} +- {row[f'{loss}_error']:.2f}" for loss in ("training", "held_out")]
        worse = [loss for loss in ("training", "held_out") if row[f"{loss}_worse"]]
        print(f"| {row['combination']} | {row['seeds']} | {' | '.join(figures)} | {', '.join(worse) or 'no'} |")
