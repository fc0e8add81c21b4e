"""Speed of the CPU backend against torch.optim, with targets.

Every case runs its contenders in turn in one process and reports the median of the ratios. A contender is first compared
with the float64 reference and not timed if it fails. GB/s count the bytes a step must move: each parameter, gradient and
state once per read and once per write.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from optimizers import ALL_RULES, BEYOND, BY_RULE, OPTIMIZERS
from tqdm import tqdm

import precond
from precond import reference

from . import ROOT, methods, timing

MILLION = 1 << 20
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HOST = "host time of a step on 1000 tiny tensors"
IMPORT = "import of precond after torch"


@dataclasses.dataclass
class Case:
    """A census of tensors, the contenders, and the targets: (contender, base, largest ratio)."""

    name: str
    shape: tuple[int, ...]
    count: int
    dtype: torch.dtype
    contenders: dict[str, Callable[[list[torch.nn.Parameter]], Any]]
    targets: list[tuple[str, tuple[str, ...], float]]
    bytes_per_element: float
    timed: str = "precond"
    #: Bytes per element of each contender, where times are compared per byte.
    per_byte: dict[str, int] | None = None
    #: Dtypes of contenders whose parameters are not of ``dtype``.
    dtypes: dict[str, torch.dtype] = dataclasses.field(default_factory=dict)


def check_parity() -> None:
    """Refuse to time a kernel that is wrong: every rule and dtype, a few steps against the float64 reference."""
    from test_parity import DTYPES, run

    torch.manual_seed(0)
    for row in tqdm(ALL_RULES, desc="parity", leave=False):
        for dtypes in DTYPES:
            run(row, [(5,), (70_001,), (33, 65)], *dtypes)
    import test_formats

    for formats in tqdm(test_formats.MIXES, desc="formats", leave=False):
        test_formats.test_every_rule_and_format_matches_the_reference_text(test_formats.BY_RULE["adamw"], *formats)


def parameters(case: Case, contender: str = "") -> list[torch.nn.Parameter]:
    dtype = case.dtypes.get(contender, case.dtype)
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(case.count):
        p = torch.nn.Parameter(torch.randn(case.shape, generator=generator).to(dtype))
        p.grad = torch.randn(case.shape, generator=generator).to(dtype)
        params.append(p)
    return params


def cases() -> list[Case]:
    """The censuses of AdamW, then the family on one large tensor, each against what torch has."""
    n = 32 * MILLION

    def large(name, dtype, bytes_per_element, limit, ours, theirs, peer="torch fused"):
        targets = [("precond", (peer,), limit)]
        return Case(name, (n,), 1, dtype, {peer: theirs, "precond": ours}, targets, bytes_per_element)

    def small(name, size, count, targets):
        return Case(name, (size,), count, F32, {**torch_adamw, "precond": adamw}, targets, 28)

    def adamw(params):
        return precond.AdamW(params, betas=(0.9, 0.99))

    torch_adamw = {
        "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
        "torch foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    }
    fused = {"fused": True}
    return [
        large("AdamW fp32, one tensor of 32M", F32, 28, 1.02, adamw, torch_adamw["torch fused"]),
        large("AdamW bf16, one tensor of 32M", BF16, 14, 0.7, adamw, torch_adamw["torch fused"]),
        large("AdamW fp16, one tensor of 32M", F16, 14, 0.8, adamw, torch_adamw["torch fused"]),
        small(
            "AdamW fp32, 1000 tensors of 1000",
            1000,
            1000,
            [("precond", ("torch fused",), 0.12), ("precond", ("torch foreach",), 0.05)],
        ),
        small("AdamW fp32, 10,000 tensors of 64", 64, 10_000, [("precond", ("torch fused", "torch foreach"), 0.1)]),
        Case(
            "AdamW with l1_decay against without, 32M",
            (n,),
            1,
            F32,
            {"precond": adamw, "precond l1": lambda params: precond.AdamW(params, l1_decay=1e-3)},
            [("precond l1", ("precond",), 1.15)],
            28,
            "precond l1",
        ),
        large("Adam fp32, 32M", F32, 28, 1.02, precond.Adam, lambda params: torch.optim.Adam(params, **fused)),
        large("SGD fp32, 32M", F32, 12, 1.02, precond.SGD, lambda params: torch.optim.SGD(params, **fused)),
        large(
            "SGD with momentum fp32, 32M",
            F32,
            20,
            1.02,
            lambda params: precond.SGD(params, momentum=0.9),
            lambda params: torch.optim.SGD(params, momentum=0.9, **fused),
        ),
        large("Adagrad fp32, 32M", F32, 20, 0.9, precond.Adagrad, lambda params: torch.optim.Adagrad(params, **fused)),
        large(
            "RMSprop fp32, 32M",
            F32,
            20,
            0.2,
            precond.RMSprop,
            lambda params: torch.optim.RMSprop(params, foreach=True),
            "torch foreach",
        ),
        large(
            "clip folded in, AdamW fp32 32M",
            F32,
            32,
            0.8,
            lambda params: precond.AdamW(params, betas=(0.9, 0.99), max_grad_norm=1.0),
            timing.ClippedTorch,
            "torch clip, fused",
        ),
        rules_case("every rule fp32, 16M, time per byte", OPTIMIZERS),
        rules_case("rules beyond the family fp32, 16M, time per byte", [BY_RULE["adamw"], *BEYOND]),
        *format_cases(),
    ]


def format_cases() -> list[Case]:
    """Formats on bfloat16 parameters, against torch's fused AdamW on float32 and on bfloat16 ones of the same number."""
    stock = {"torch fused fp32": F32, "torch fused bf16": BF16}

    def case(weight_format, state_format, bytes_per_element, targets):
        contenders = {name: lambda params: torch.optim.AdamW(params, fused=True) for name in stock}
        contenders["precond"] = lambda params: precond.AdamW(
            params, weight_format=weight_format, state_format=state_format
        )
        limits = [("precond", (name,), limit) for name, limit in zip(stock, targets, strict=False)]
        name = f"AdamW {weight_format} + {state_format}, 32M"
        return Case(name, (32 * 1024, 1024), 1, BF16, contenders, limits, bytes_per_element, dtypes=stock)

    # Without targets but for the first; the others are timed for the notes.
    return [
        case("split24", "int8", 12.25, (1.0, 1.3)),
        case("stochastic", "int8", 10.06, ()),
        case("stochastic", "int4", 8.13, ()),
        case("split32", "fp32", 26, ()),
    ]


def rules_case(name: str, rows: list[Any]) -> Case:
    """Rules on one tensor, in time per byte of AdamW's."""
    n = 16 * MILLION
    contenders = {row.rule: functools.partial(row.cls, **row.kwargs) for row in rows}
    # The table's hyper-parameters, but for a step that keeps 16M values finite over thousands of steps.
    contenders = {rule: functools.partial(make, lr=1e-6) for rule, make in contenders.items()}
    targets = [(rule, ("adamw",), 1.2) for rule in contenders if rule != "adamw"]
    per_byte = {rule: 12 + 8 * len(reference.RULES[rule].states) for rule in contenders}
    return Case(name, (n,), 1, F32, contenders, targets, 28, "adamw", per_byte)


def copy_bandwidth() -> float:
    """GB/s of torch's own copy of 128 MiB, read plus written."""
    source = torch.randn(32 * MILLION)
    target = torch.empty_like(source)
    times = timing.interleaved({"copy": lambda: target.copy_(source)}, 1.0)["copy"]
    return 2 * source.numel() * 4 / statistics.median(times) / 1e9


def run_case(case: Case, seconds: float, copy: float) -> dict[str, object]:
    optimizers = {name: make(parameters(case, name)) for name, make in case.contenders.items()}
    times = timing.interleaved({name: opt.step for name, opt in optimizers.items()}, seconds)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    elements = case.count * torch.Size(case.shape).numel()
    gbs = elements * case.bytes_per_element / medians[case.timed] / 1e6
    targets = []
    for contender, bases, limit in case.targets:
        base = min(bases, key=medians.__getitem__)
        value = timing.ratio(times, contender, base)
        if case.per_byte:
            value *= case.per_byte[base] / case.per_byte[contender]
        targets.append({"of": contender, "to": base, "ratio": value, "target": limit, "met": value <= limit})
    if case.per_byte:  # forty rules: the worst stands for all
        targets = [max(targets, key=lambda target: target["ratio"])]
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
        ms = result.get("ms", {})
        if len(ms) > 4:
            ms = {name: ms[name] for name in ("adamw", result["targets"][0]["of"])}
        ms = ", ".join(f"{name} {value:.3g}" for name, value in ms.items())
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
    warnings.simplefilter("ignore", precond.PrecisionWarning)  # 16-bit states are what is timed
    check_parity()
    copy = copy_bandwidth()
    chosen = [case for case in cases() if arguments.only in case.name]
    results = [run_case(case, arguments.seconds, copy) for case in tqdm(chosen, desc="cases", leave=False)]
    results += methods.results(arguments.seconds / 2, arguments.only)
    for name, measure in {HOST: lambda: host_time(arguments.seconds), IMPORT: import_time}.items():
        if arguments.only in name:
            results.append({"case": name, **measure()})
    report = {"environment": timing.environment(), "copy_gb_per_s": copy, "results": results}
    path = arguments.json or ROOT / "bench" / "results" / "cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | {"date": time.strftime("%Y-%m-%d")}, indent=1) + "\n")
    print(f"{report['environment']}\ncopy: {copy:.1f} GB/s\n\n{table(results)}\n\nwritten to {path}")
