"""Speed of the CPU backend against torch.optim, with targets.

Every case runs its contenders in turn in one process and reports the median of the ratios. A contender is first compared
with the float64 reference and not timed if it fails. GB/s count the bytes a step must move: each parameter, gradient and
state once per read and once per write.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from optimizers import OPTIMIZERS
from tqdm import tqdm

import precond

from . import ROOT, timing

MILLION = 1 << 20
F32, BF16 = torch.float32, torch.bfloat16
HOST = "host time of a step on 1000 tiny tensors"
IMPORT = "import of precond after torch"


@dataclasses.dataclass
class Case:
    """A census of tensors, the contenders, and the targets: (contender, base, largest ratio)."""

    name: str
    shape: tuple[int, ...]
    count: int
    dtype: torch.dtype
    contenders: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]
    targets: list[tuple[str, tuple[str, ...], float]]
    bytes_per_element: float
    timed: str = "precond"


def check_parity() -> None:
    """Refuse to time a kernel that is wrong: every rule and dtype, a few steps against the float64 reference."""
    from test_parity import DTYPES, run

    for row in tqdm(OPTIMIZERS, desc="parity", leave=False):
        for dtypes in DTYPES:
            run(row, [(5,), (70_001,), (33, 65)], *dtypes)


def parameters(case: Case) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(case.count):
        p = torch.nn.Parameter(torch.randn(case.shape, generator=generator).to(case.dtype))
        p.grad = torch.randn(case.shape, generator=generator).to(case.dtype)
        params.append(p)
    return params


def adamw_cases() -> list[Case]:
    def fused(params):
        return torch.optim.AdamW(params, fused=True)

    def foreach(params):
        return torch.optim.AdamW(params, foreach=True)

    def ours(params):
        return precond.AdamW(params, betas=(0.9, 0.99))

    def with_l1(params):
        return precond.AdamW(params, l1_decay=1e-3)

    large = {"torch fused": fused, "precond": ours}
    small = {"torch fused": fused, "torch foreach": foreach, "precond": ours}
    n = 32 * MILLION
    return [
        Case("AdamW fp32, one tensor of 32M", (n,), 1, F32, large, [("precond", ("torch fused",), 1.02)], 28),
        Case("AdamW bf16, one tensor of 32M", (n,), 1, BF16, large, [("precond", ("torch fused",), 0.7)], 14),
        Case(
            "AdamW fp32, 1000 tensors of 1000",
            (1000,),
            1000,
            F32,
            small,
            [("precond", ("torch fused",), 0.12), ("precond", ("torch foreach",), 0.05)],
            28,
        ),
        Case(
            "AdamW fp32, 10,000 tensors of 64",
            (64,),
            10_000,
            F32,
            small,
            [("precond", ("torch fused", "torch foreach"), 0.1)],
            28,
        ),
        Case(
            "AdamW with l1_decay against without, 32M",
            (n,),
            1,
            F32,
            {"precond": ours, "precond l1": with_l1},
            [("precond l1", ("precond",), 1.15)],
            28,
            "precond l1",
        ),
        Case(
            "SGD with momentum fp32, one tensor of 32M",
            (n,),
            1,
            F32,
            {
                "torch fused": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, fused=True),
                "precond": lambda params: precond.SGD(params, lr=1e-3, momentum=0.9),
            },
            [],
            20,
        ),
    ]


def copy_bandwidth() -> float:
    """GB/s of torch's own copy of 128 MiB, read plus written."""
    source = torch.randn(32 * MILLION)
    target = torch.empty_like(source)
    times = timing.interleaved({"copy": lambda: target.copy_(source)}, 1.0)["copy"]
    return 2 * source.numel() * 4 / statistics.median(times) / 1e9


def run_case(case: Case, seconds: float, copy: float) -> dict[str, object]:
    optimizers = {name: make(parameters(case)) for name, make in case.contenders.items()}
    times = timing.interleaved({name: opt.step for name, opt in optimizers.items()}, seconds)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    elements = case.count * torch.Size(case.shape).numel()
    gbs = elements * case.bytes_per_element / medians[case.timed] / 1e6
    targets = []
    for contender, bases, limit in case.targets:
        base = min(bases, key=medians.__getitem__)
        value = timing.ratio(times, contender, base)
        targets.append({"of": contender, "to": base, "ratio": value, "target": limit, "met": value <= limit})
    return {
        "case": case.name,
        "ms": medians,
        "rounds": len(times[case.timed]),
        "gb_per_s": gbs,
        "percent_of_copy": 100 * gbs / copy,
        "targets": targets,
    }


def host_time(seconds: float) -> dict[str, object]:
    """The Python side of a step: 1000 tensors of 8 elements, against its floor of attribute reads and version bumps."""
    params = parameters(Case("", (8,), 1000, F32, {}, [], 0))
    optimizer = precond.AdamW(params)
    optimizer.step()
    tensors = [t for p in params for t in (p, p.grad, *optimizer.state[p].values())]
    times = timing.interleaved(
        {
            "step": optimizer.step,
            ".grad": lambda: [p.grad for p in params],
            "addresses": lambda: [t.data_ptr() for t in tensors],
            "versions": lambda: torch.autograd.graph.increment_version(params),
        },
        seconds,
    )
    us = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    rest = us["step"] - us[".grad"] - us["addresses"] - us["versions"]
    return {
        "us": us | {"rest": rest},
        "targets": [
            {"of": "step, ms", "ratio": us["step"] / 1e3, "target": 0.4, "met": us["step"] <= 400},
            {"of": "all but .grad, addresses, versions, ms", "ratio": rest / 1e3, "target": 0.05, "met": rest <= 50},
        ],
    }


def import_time() -> dict[str, object]:
    code = "import time, torch; t = time.perf_counter(); import precond; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    ms = statistics.median(times) * 1e3
    return {
        "targets": [{"of": "import, ms", "ratio": ms, "target": 50.0, "met": ms <= 50}],
    }


def table(results: list[dict]) -> str:
    lines = ["| case | ms | GB/s | % of copy | measured | target | |", "|---|---|---|---|---|---|---|"]
    for result in results:
        ms = ", ".join(f"{name} {value:.3g}" for name, value in result.get("ms", {}).items())
        speed = f"{result['gb_per_s']:.1f} | {result['percent_of_copy']:.0f}" if "gb_per_s" in result else " | "
        goals = result["targets"] or [None]
        for i, goal in enumerate(goals):
            left = f"| {result['case']} | {ms} | {speed} |" if i == 0 else "| | | | |"
            if goal is None:
                lines.append(left + " | | |")
                continue
            unit = f"{goal['of']} / {goal['to']}" if "to" in goal else goal["of"]
            verdict = "met" if goal["met"] else "missed"
            lines.append(f"{left} {goal['ratio']:.3f} ({unit}) | <= {goal['target']} | {verdict} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=4.0, help="time per case (default 4)")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()), help="default 2")
    parser.add_argument("--json", type=Path, default=None, help="where to write the results")


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    check_parity()
    copy = copy_bandwidth()
    cases = [case for case in adamw_cases() if arguments.only in case.name]
    results = [run_case(case, arguments.seconds, copy) for case in tqdm(cases, desc="cases", leave=False)]
    for name, measure in {HOST: lambda: host_time(arguments.seconds), IMPORT: import_time}.items():
        if arguments.only in name:
            results.append({"case": name, **measure()})
    report = {"environment": timing.environment(), "copy_gb_per_s": copy, "results": results}
    path = arguments.json or ROOT / "bench" / "results" / "cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | {"date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")
    print(f"{report['environment']}\ncopy: {copy:.1f} GB/s\n\n{table(results)}\n\nwritten to {path}")
