"""The tables of docs/theory.md, expected against measured; the papers' trainings are in bench/claims.py.

About 3 minutes of one core. Fails where a row is out of its tolerance. Writes JSON, and one PNG for each paper into the folder of
its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import ROOT, record, timing
from .papers import QUICK, TABLES, Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}: seconds")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), help="only these tables")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing")
    parser.add_argument("--threads", type=int, default=1, help="default 1: tensors are small")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "theory.json", help="what is kept")


def number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if float(value).is_integer() and 10 <= abs(value) < 1e6 else f"{value:.4g}"


def table(rows: list[Row]) -> str:
    lines = [("table", "", "expected", "measured", "tolerance", "within")]
    lines += [
        (
            r.table,
            r.name,
            number(r.expected),
            number(r.measured),
            r.rule,
            r.verdict,
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def finite(value: Any) -> Any:
    """The same without infinities and NaN, which JSON does not have: None."""
    if isinstance(value, dict):
        return {key: finite(of) for key, of in value.items()}
    if isinstance(value, list):
        return [finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    path = arguments.json
    report = json.loads(path.read_text()) if path.exists() else {}
    now = {"environment": timing.environment(), "date": time.strftime("%Y-%m-%d")}
    names = arguments.only or (QUICK if arguments.quick else list(TABLES))
    rows: list[Row] = []
    kept, figures, seconds = (report.setdefault(key, {}) for key in ("tables", "figures", "seconds"))
    with tqdm(names, desc="tables", mininterval=0.5) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            before, drawn = time.perf_counter(), {}
            found = []
            for row in TABLES[name](drawn):
                found.append(row)
                bar.set_postfix_str(f"{name}: {len(found)} rows", refresh=False)
            rows += found
            figures |= drawn
            seconds[name] = round(time.perf_counter() - before, 1)
            kept[name] = [dataclasses.asdict(row) | {"within": row.within} for row in found]
            record.write(path, json.dumps(finite(report | now), indent=1) + "\n")
    print(table(rows))
    failed = [row for row in rows if row.fails]
    off = [row for row in rows if row.within is False]
    known, total = len(off) - len(failed), sum(seconds[name] for name in names)
    print(f"\n{len(rows)} rows, {len(off)} out of tolerance, {known} of them known, {total:.0f} s")
    for row in off:
        if row.reason:
            print(f"{row.table}, {row.name}: {row.reason}")
    record.write(path, json.dumps(finite(report | now), indent=1) + "\n")
    if not arguments.no_plots:
        from .papers import plots

        plots.draw(finite(report), path.with_suffix(""))
    if failed:
        raise SystemExit(1)
