"""What rides along in the pass of a step, against the step alone and against what does the same in passes of its own.

Contenders take turns in one process, and every ratio is a median of ratios. Each part is first compared with the reference
backend, and nothing is timed if one differs.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import precond
from precond._core.extras import need

from . import record, timing
from .cpu import F32, MILLION, Case, copy_bandwidth, line, run_case, table

Params = list[torch.nn.Parameter]


class AveragedTorch:
    """torch's fused AdamW, and then the update of its averaged model."""

    def __init__(self, params: Params) -> None:
        self.optimizer = torch.optim.AdamW(params, fused=True)
        self.model = torch.nn.ParameterList(params)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.999))

    def step(self) -> None:
        self.optimizer.step()
        self.averaged.update_parameters(self.model)


def adamw(**options: Any) -> Any:
    """A maker of AdamW, with parts."""
    return lambda params: precond.AdamW(params, **options)


def package(params: Params) -> torch.optim.Optimizer:
    """The schedule-free AdamW of its authors."""
    optimizer = need("schedulefree", "bench parts").AdamWScheduleFree(params, foreach=True)
    optimizer.train()
    return optimizer


EMA = dict(ema_decay=0.999)


def cases(quick: bool) -> list[Case]:
    """``quick``: tensors of a fourth."""
    n = 8 * MILLION if quick else 32 * MILLION
    size = f"{n // MILLION}M"

    def case(name: str, contenders: dict[str, Any], targets: list[Any], bytes_per_element: float, **more: Any) -> Case:
        shape, count = more.pop("census", ((n,), 1))
        return Case(name, shape, count, F32, contenders, targets, bytes_per_element, **more)

    small = ((1000,), 1000)
    return [
        case(
            f"an average fp32, AdamW {size}, time per byte",
            {"AdamW": adamw(), "with ema": adamw(**EMA)},
            [("with ema", ("AdamW",), 1.05)],
            36,
            timed="with ema",
            per_byte={"AdamW": 28, "with ema": 36},
        ),
        case(
            f"an average fp32, AdamW {size}, against two passes",
            {"torch fused, swa_utils": AveragedTorch, "with ema": adamw(**EMA)},
            [("with ema", ("torch fused, swa_utils",), 0.85)],
            36,
            timed="with ema",
        ),
        case(
            "an average fp32, AdamW, 1000 tensors of 1000",
            {"torch fused, swa_utils": AveragedTorch, "AdamW": adamw(), "with ema": adamw(**EMA)},
            [("with ema", ("AdamW",), 1.35)],
            36,
            census=small,
            timed="with ema",
        ),
        case(
            f"cautious, AdamW {size}",
            {"AdamW": adamw(), "update": adamw(cautious="update"), "decay": adamw(cautious="decay")},
            [("update", ("AdamW",), 1.03), ("decay", ("AdamW",), 1.03)],
            28,
            timed="update",
        ),
        case(
            f"statistics of every step, AdamW {size}",
            {"AdamW": adamw(), "statistics": adamw(statistics=True), "every 100th": adamw(statistics=100)},
            [("statistics", ("AdamW",), 1.05)],
            28,
            timed="statistics",
        ),
        case(
            "statistics of every step, AdamW, 1000 tensors of 1000",
            {"AdamW": adamw(), "statistics": adamw(statistics=True)},
            [("statistics", ("AdamW",), 1.1)],
            28,
            census=small,
            timed="statistics",
        ),
        case(
            f"updates that need a sum first, AdamW {size}, time per byte",
            {"AdamW": adamw(), "max_update_rms": adamw(max_update_rms=1.0)},
            [("max_update_rms", ("AdamW",), 1.05)],
            44,
            timed="max_update_rms",
            per_byte={"AdamW": 28, "max_update_rms": 44},
        ),
        case(
            f"schedule-free AdamW {size}",
            {"schedulefree, foreach": package, "ScheduleFreeAdamW": precond.ScheduleFreeAdamW},
            [("ScheduleFreeAdamW", ("schedulefree, foreach",), 0.4)],
            28,
            timed="ScheduleFreeAdamW",
        ),
    ]


def check() -> None:
    """Raise where a part is not what the reference backend makes of it."""
    parts = (
        EMA,
        dict(ema_decay="equal"),
        dict(cautious="both"),
        dict(cautious="update", **EMA),
        dict(max_update_rms=0.5),
    )
    for options in (*parts, dict(statistics=True), dict(cautious="update", cautious_rescale=True)):
        runs = []
        for backend in (None, "reference"):
            torch.manual_seed(0)
            p = torch.nn.Parameter(torch.randn(4097))
            optimizer = precond.AdamW([p], lr=1e-2, weight_decay=0.1, backend=backend, **options)
            for _ in range(5):
                p.grad = torch.randn(4097)
                optimizer.step()
            runs.append([p.detach(), *(t for t in optimizer.state[p].values())])
            if optimizer.statistics is not None:
                runs[-1].append(optimizer.statistics.values)
        for ours, expected in zip(*runs, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="time per case (default 8; quick 0.3)")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()), help="default 2")
    record.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    end = record.end_of(arguments)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", precond.PrecisionWarning)
    seconds = arguments.seconds or (0.3 if arguments.quick else 8.0)
    path = arguments.out / f"parts{'-quick' if arguments.quick else ''}.json"
    settings = {"seconds": seconds, "quick": arguments.quick}
    results = record.Record(path, timing.environment(), settings, fresh=arguments.fresh)

    def timed(case: Case) -> dict[str, object]:
        return run_case(case, seconds, results.run["copy_gb_per_s"])

    measures = {case.name: functools.partial(timed, case) for case in cases(arguments.quick)}
    names = record.chosen(measures, arguments.only)
    if not all(results.has(name) for name in names):
        check()
        results.run["copy_gb_per_s"] = copy_bandwidth()
    results.measure({name: measures[name] for name in names}, line, end=end)
    print(f"\n{results.run}\n\n{table(results.results(measures))}\n")
    print(f"{results.others(measures)}written to {path}")
    if failed := results.failed(names):
        raise SystemExit(f"bench parts: failed: {'; '.join(failed)}")
