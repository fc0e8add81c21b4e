"""Speed of the CPU backend against torch.optim, with targets.

Every case runs its contenders in turn in one process and reports the median of the ratios. All rules are first compared with
the float64 reference and nothing is timed if one fails. GB/s count the bytes a step must move: each parameter, gradient and
state once per read and once per write.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from families import ALL_RULES, BEYOND, BY_RULE, OPTIMIZERS
from support.formats import MIXES, check_against_reference
from support.parity import DTYPES, worst_error
from tqdm import tqdm

import precond
from precond import reference

from . import host, methods, record, timing

MILLION = 1 << 20
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HOST = "host time of a step on 1000 tiny tensors"
SHARDED = "host time of a step on 1000 DTensor parameters of 64 elements"
OFFLOAD = "the host's part of an offloaded step, 32M bfloat16 parameters"
RELEASED = "host time of a released gradient, 500 parameters of 64 elements"
PLANS = "gradients that come and go, and new plans, on 400 tensors of 64 elements"
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


def check_parity(quick: bool) -> None:
    """Refuse to time a kernel that is wrong: every rule and dtype, a few steps against the float64 reference. ``quick``: small
    tensors and one mix of dtypes, but for AdamW.
    """
    torch.manual_seed(0)
    for row in tqdm(ALL_RULES, desc="parity", leave=False):
        few = quick and row.rule != "adamw"
        for dtypes in DTYPES[: 1 if few else None]:
            worst_error(row, [(5,), (4097 if few else 70_001,), (33, 65)], *dtypes)
    for formats in tqdm(MIXES, desc="formats", leave=False):
        check_against_reference(BY_RULE["adamw"], *formats)


def parameters(case: Case, contender: str = "") -> list[torch.nn.Parameter]:
    dtype = case.dtypes.get(contender, case.dtype)
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(case.count):
        p = torch.nn.Parameter(torch.randn(case.shape, generator=generator).to(dtype))
        p.grad = torch.randn(case.shape, generator=generator).to(dtype)
        params.append(p)
    return params


def cases(quick: bool) -> list[Case]:
    """The censuses of AdamW, then the family on one large tensor, each against what torch has. ``quick``: tensors of a fourth."""
    n = 8 * MILLION if quick else 32 * MILLION
    size = f"{n // MILLION}M"
    of_all = 2 * MILLION if quick else 16 * MILLION

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
        large(f"AdamW fp32, one tensor of {size}", F32, 28, 1.02, adamw, torch_adamw["torch fused"]),
        large(f"AdamW bf16, one tensor of {size}", BF16, 14, 0.7, adamw, torch_adamw["torch fused"]),
        large(f"AdamW fp16, one tensor of {size}", F16, 14, 0.8, adamw, torch_adamw["torch fused"]),
        small(
            "AdamW fp32, 1000 tensors of 1000",
            1000,
            1000,
            [("precond", ("torch fused",), 0.12), ("precond", ("torch foreach",), 0.05)],
        ),
        small("AdamW fp32, 10,000 tensors of 64", 64, 10_000, [("precond", ("torch fused", "torch foreach"), 0.1)]),
        Case(
            f"AdamW with l1_decay against without, {size}",
            (n,),
            1,
            F32,
            {"precond": adamw, "precond l1": lambda params: precond.AdamW(params, l1_decay=1e-3)},
            [("precond l1", ("precond",), 1.15)],
            28,
            "precond l1",
        ),
        large(f"Adam fp32, {size}", F32, 28, 1.02, precond.Adam, lambda params: torch.optim.Adam(params, **fused)),
        large(f"SGD fp32, {size}", F32, 12, 1.02, precond.SGD, lambda params: torch.optim.SGD(params, **fused)),
        large(
            f"SGD with momentum fp32, {size}",
            F32,
            20,
            1.02,
            lambda params: precond.SGD(params, momentum=0.9),
            lambda params: torch.optim.SGD(params, momentum=0.9, **fused),
        ),
        large(
            f"Adagrad fp32, {size}", F32, 20, 0.9, precond.Adagrad, lambda params: torch.optim.Adagrad(params, **fused)
        ),
        large(
            f"RMSprop fp32, {size}",
            F32,
            20,
            0.2,
            precond.RMSprop,
            lambda params: torch.optim.RMSprop(params, foreach=True),
            "torch foreach",
        ),
        large(
            f"clip folded in, AdamW fp32 {size}",
            F32,
            32,
            0.8,
            lambda params: precond.AdamW(params, betas=(0.9, 0.99), max_grad_norm=1.0),
            timing.ClippedTorch,
            "torch clip, fused",
        ),
        rules_case("every rule fp32", OPTIMIZERS, of_all),
        rules_case("rules beyond the family fp32", [BY_RULE["adamw"], *BEYOND], of_all),
        *format_cases(n),
        *format_cases(MILLION)[:3],  # in cache
    ]


def format_cases(n: int) -> list[Case]:
    """Formats on bfloat16 parameters, against torch's fused AdamW on float32 and on bfloat16 ones of the same number."""
    stock = {"torch fused fp32": F32, "torch fused bf16": BF16}

    def case(weight_format, state_format, bytes_per_element, targets):
        contenders = {name: lambda params: torch.optim.AdamW(params, fused=True) for name in stock}
        contenders["precond"] = lambda params: precond.AdamW(
            params, weight_format=weight_format, state_format=state_format
        )
        limits = [("precond", (name,), limit) for name, limit in zip(stock, targets, strict=False)]
        name = f"AdamW {weight_format} + {state_format}, {n // MILLION}M"
        return Case(name, (n // 1024, 1024), 1, BF16, contenders, limits, bytes_per_element, dtypes=stock)

    return [
        case("split24", "int8", 12.25, (1.0, 0.9)),
        case("stochastic", "int8", 10.06, (1.0, 1.0)),
        case("stochastic", "int4", 8.13, (1.0, 1.0)),
        # Without targets, for the notes.
        case("split32", "fp32", 26, ()),
    ]


def rules_case(name: str, rows: list[Any], n: int) -> Case:
    """Rules on one tensor, in time per byte of AdamW's."""
    name = f"{name}, {n // MILLION}M, time per byte"
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
        "ms_quartiles": timing.ms_quartiles(times),
        "rounds": len(times[case.timed]),
        "gb_per_s": gbs,
        "copy_gb_per_s": copy,
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


def plan_times(seconds: float) -> dict[str, object]:
    """Steps in which another quarter of the parameters has no gradient each time, against the same quarter; and steps with a new
    plan against torch's loop.
    """
    calls: dict[str, Callable[[], object]] = {}
    targets: list[dict[str, Any]] = []

    def stepping(cls: type[torch.optim.Optimizer], **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
        params = parameters(Case("", (8, 8), 400, F32, {}, [], 0))
        optimizer = cls(params, **options)
        optimizer.step()
        return params, optimizer

    def coming_and_going(stride: int) -> Callable[[], object]:
        params, optimizer = stepping(precond.AdamW)
        gradients, numbers = [p.grad for p in params], itertools.count()

        def step() -> None:
            first = next(numbers) * stride
            for i, (p, g) in enumerate(zip(params, gradients, strict=True), first):
                p.grad = None if i % 4 == 0 else g
            optimizer.step()

        return step

    def planned_anew(optimizer: Any) -> None:
        optimizer.engine.forget_plans()
        optimizer.step()

    calls |= {"same set": coming_and_going(0), "changing set": coming_and_going(1)}
    targets.append({"of": "changing set", "to": "same set", "target": 3.0})
    for name, cls, peer, options in (
        ("AdamW", precond.AdamW, torch.optim.AdamW, {}),
        ("SGD momentum", precond.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        ("SGD", precond.SGD, torch.optim.SGD, {"lr": 0.1}),
    ):
        _, ours = stepping(cls, **options)
        _, loop = stepping(peer, foreach=False, **options)
        calls |= {f"{name} new plan": functools.partial(planned_anew, ours), f"{name} torch loop": loop.step}
        targets.append({"of": f"{name} new plan", "to": f"{name} torch loop", "target": 2.0})
    times = timing.interleaved(calls, seconds)
    for target in targets:
        target["ratio"] = timing.ratio(times, target["of"], target["to"])
        target["met"] = target["ratio"] <= target["target"]
    return {
        "ms": {name: statistics.median(values) * 1e3 for name, values in times.items()},
        "ms_quartiles": timing.ms_quartiles(times),
        "targets": targets,
    }


def import_time(runs: int) -> dict[str, object]:
    code = "import time, torch; t = time.perf_counter(); import precond; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(runs)
    ]
    ms = statistics.median(times) * 1e3
    return {
        "targets": [{"of": "import, ms", "ratio": ms, "target": 50.0, "met": ms <= 50}],
    }


def table(results: list[dict]) -> str:
    lines = ["| case | ms | GB/s | % of copy | measured | target | |", "|---|---|---|---|---|---|---|"]
    for result in results:
        if "error" in result:
            lines.append(f"| {result['case']} | {result['error'].replace('|', '/')} | | | | | |")
            continue
        case = result["case"] + (f", {100 * result['products']:.0f} % products" if "products" in result else "")
        ms = result.get("ms", {})
        if len(ms) > 4:
            named = {name for target in result["targets"] for name in (target.get("to"), target["of"])}
            ms = {name: value for name, value in ms.items() if name in named}
        ms = ", ".join(f"{name} {value:.3g}" for name, value in ms.items())
        speed = f"{result['gb_per_s']:.1f} | {result['percent_of_copy']:.0f}" if "gb_per_s" in result else " | "
        goals = result["targets"] or [None]
        for i, goal in enumerate(goals):
            left = f"| {case} | {ms} | {speed} |" if i == 0 else "| | | | |"
            if goal is None:
                lines.append(left + " | | |")
                continue
            unit = f"{goal['of']} / {goal['to']}" if "to" in goal else goal["of"]
            verdict = "met" if goal["met"] else "missed"
            lines.append(f"{left} {goal['ratio']:.3f} ({unit}) | <= {goal['target']} | {verdict} |")
    return "\n".join(lines)


def line(result: dict[str, Any]) -> str:
    """A case in one line, for the log."""
    times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in list(result.get("ms", {}).items())[:4])
    goals = ", ".join(f"{goal['ratio']:.3f} of {goal.get('to', goal['of'])}" for goal in result["targets"])
    return "; ".join(part for part in (times, goals) if part)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="time per case (default 4; quick 0.3)")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()), help="default 2")
    record.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    end = record.end_of(arguments)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", precond.PrecisionWarning)  # 16-bit states are what is timed
    quick = arguments.quick
    seconds = arguments.seconds or (0.3 if quick else 4.0)
    path = arguments.out / f"cpu{'-quick' if quick else ''}.json"
    results = record.Record(path, timing.environment(), {"seconds": seconds, "quick": quick}, fresh=arguments.fresh)

    def timed(case: Case) -> dict[str, object]:
        return run_case(case, seconds, results.run["copy_gb_per_s"])

    measures = {case.name: functools.partial(timed, case) for case in cases(quick)}
    measures |= methods.cases(seconds / 2, quick)
    measures |= {HOST: lambda: host_time(seconds), PLANS: lambda: plan_times(seconds)}
    measures |= {SHARDED: lambda: host.of_shards(seconds), RELEASED: lambda: host.of_releases(seconds)}
    measures |= {IMPORT: lambda: import_time(2 if quick else 5)}
    if not quick and importlib.util.find_spec("deepspeed"):
        measures |= {OFFLOAD: lambda: host.of_offload(seconds, results.run["copy_gb_per_s"])}
    names = record.chosen(measures, arguments.only)
    if not all(results.has(name) for name in names):
        check_parity(quick)
        results.run["copy_gb_per_s"] = copy_bandwidth()
    results.measure({name: measures[name] for name in names}, line, end=end)
    print(f"\n{results.run}\n\n{table(results.results(measures))}\n")
    print(f"{results.others(measures)}written to {path}")
    if failed := results.failed(names):
        raise SystemExit(f"bench cpu: failed: {'; '.join(failed)}")
