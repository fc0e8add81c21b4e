"""Worst errors of every rule against float64, in fp32 ulp of the operands, over seeds and mixes of dtypes.

Fails where one is beyond its tolerance in tests/families. Steep rules are held to what operands a few ulp away give.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from typing import Any

import torch
from families import ALL_RULES
from support.parity import DTYPES, worst_error

import precond

from . import record, timing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, help="default 10; quick 1")
    record.add_arguments(parser)


def measured(row: Any, seeds: int) -> dict[str, Any]:
    """The worst error of a rule; an AssertionError beyond its tolerance."""
    worst = 0.0
    for seed in range(seeds):
        torch.manual_seed(seed)
        for dtypes in DTYPES:
            worst = max(worst, worst_error(row, [(5,), (70_001,), (33, 65)], *dtypes))
    return {"ulp": worst, "steep": row.steep}


def line(result: dict[str, Any]) -> str:
    return f"{result['ulp']:.2f} ulp"


def run(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore", precond.PrecisionWarning)
    end = record.end_of(arguments)
    seeds = arguments.seeds or (1 if arguments.quick else 10)
    path = arguments.out / f"errors{'-quick' if arguments.quick else ''}.json"
    results = record.Record(path, timing.environment(), {"seeds": seeds}, fresh=arguments.fresh)
    cases = {row.rule: functools.partial(measured, row, seeds) for row in ALL_RULES}
    names = record.chosen(cases, arguments.only)
    results.measure({name: cases[name] for name in names}, line, end=end)
    print("| rule | worst error of p and states, ulp | |\n|---|---|---|")
    for result in results.results(names):
        if "error" not in result:
            print(f"| {result['case']} | {result['ulp']:.2f} | {'steep' if result['steep'] else ''} |")
    if failed := results.failed(names):
        raise SystemExit(f"bench errors: beyond the tolerance: {'; '.join(failed)}")
