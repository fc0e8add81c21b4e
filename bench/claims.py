"""What the papers claim, tried: searches on validation that end at no edge, reports on the test set with seeds of their own.

One JSON file for each task, rewritten after each search and each report: a run that was cut off goes on where it stopped.
Tables and pictures show what the files have. FOP's four tasks take two and a half hours on two cores, none more than 100
minutes; the ten of Adam or Gauss-Newton (``--tasks regression-full ...``) an hour, the 13 of BNP (``--tasks dense-1
...``) 70 minutes. Fashion-MNIST needs Debian's dataset-fashion-mnist (or PRECOND_FASHION_MNIST, a folder
with its files), reinforcement learning gymnasium.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import ROOT, record, timing
from .papers import jobs
from .papers.jobs import METHODS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: all")
    parser.add_argument(
        "--only", metavar="REGEX", default="", help="only the methods whose name contains or matches this"
    )
    parser.add_argument("--fresh", action="store_true", help="search and report again what the files have already")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes of one thread; default: the cores"
    )
    parser.add_argument("--no-reports", action="store_true", help="only what a default is chosen by")
    parser.add_argument("--show", action="store_true", help="only tables and pictures, of what the files have")
    parser.add_argument("--overhead", action="store_true", help="only the time of a step, which needs a quiet machine")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "claims", help="folder of the files")


class Experiment:
    """The file of a task: cases "search NAME", "prices NAME" and "report NAME"."""

    def __init__(self, folder: Path, task: str, *, fresh: bool = False) -> None:
        self.task = task
        settings = {
            "task": jobs.TASKS[task].settings(),
            **{kind: getattr(jobs.TASKS[task], kind) for kind in ("searched", "runoff")},
            "finalists": jobs.FINALISTS,
        }
        environment = timing.environment()
        # Losses hang on torch's kernels; where the rest was measured stands in each case.
        self.record = record.Record(folder / f"{task}.json", {"torch": environment.pop("torch")}, settings)
        #: Cases that count as missing.
        self.stale = set(self.record.by_name) if fresh else set()
        self.failed: set[tuple[str, Any]] = set()
        self.where = {key: environment[key] for key in ("cpu", "precond", "commit")}

    def get(self, kind: str, method: Any | str) -> dict[str, Any] | None:
        """The case of these settings, if the method, its seeds and the search that it follows are as they are now."""
        if isinstance(method, str):
            method = jobs.named(self.task, method)
        name = f"{kind} {method.name}"
        if not self.record.has(name) or name in self.stale:
            return None
        case, now = self.record.by_name[name][1], {"method": method.described()}
        if kind != "search":
            task, searched = jobs.TASKS[self.task], self.get("search", method)
            now["searched"] = searched and searched["best"]
            now["seeds"] = list(task.priced if kind == "prices" else task.reported)
        if kind == "report":
            now["tried"] = jobs.tried(method)
        return case if all(case.get(key) == value for key, value in now.items()) else None

    def todo(self, method: Any) -> list[str]:
        """The jobs that are left of a method, in their order. What follows a search is of its best point."""
        kinds = ("search", "prices", "report") if method.is_default else ("search", "report")
        return [kind for kind in kinds if self.get(kind, method) is None]

    def ready(self, method: Any) -> str:
        """The next job, empty where there is none, where it waits for its base, and where one has failed."""
        kind = next(iter(self.todo(method)), "")
        if kind == "report" and method.base != method.name and self.get("search", method.base) is None:
            return ""
        return "" if (kind, method) in self.failed else kind

    def known(self, method: Any) -> list[dict[str, Any]]:
        """Points of an earlier search of the same task, method and seeds, by whatever rule it chose."""
        run, case = self.record.by_name.get(f"search {method.name}", ({}, {}))
        same = ("task", "searched")
        if f"search {method.name}" in self.stale or not run or case.get("method") != method.described():
            return []
        now = self.record.run["settings"]
        return case["points"] if all(run["settings"][key] == now[key] for key in same) else []

    def job(self, kind: str, method: Any) -> functools.partial[dict[str, Any]]:
        searched = self.get("search", method)
        if kind == "search":
            return functools.partial(jobs.search, self.task, method.name, self.known(method))
        if kind == "prices":
            return functools.partial(jobs.prices, self.task, method.name, searched)
        priced = self.get("prices", method) if method.is_default else None
        return functools.partial(jobs.report, self.task, method.name, searched, self.get("search", method.base), priced)

    def add(self, kind: str, method: Any, found: dict[str, Any], seconds: float) -> None:
        if kind != "search":
            found["searched"] = self.get("search", method)["best"]  # type: ignore[index]
        about = {"seconds": round(seconds), "where": self.where, "method": method.described()}
        self.record.add(f"{kind} {method.name}", {**found, **about})
        self.stale.discard(f"{kind} {method.name}")

    def fail(self, kind: str, method: Any, error: Exception) -> None:
        """Remember a job as failed, in this run: the next one tries again."""
        self.failed.add((kind, method))
        tqdm.write(f"{self.task}: {kind} {method.name}: {record.short(error)}")


def timed(job: functools.partial[dict[str, Any]], position: int) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    return job(position=position), time.perf_counter() - started


def end_with_the_parent() -> None:
    """Let a worker end when the command is killed: it would train on, and wait for more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def work(experiments: dict[str, Experiment], methods: dict[str, list[Any]], workers: int, kinds: Sequence[str]) -> None:
    """Every job that is left, ``workers`` at a time; a report follows the searches it needs."""
    context = multiprocessing.get_context("spawn")
    pairs = [(task, method) for task, of in methods.items() for method in of]
    left = sum(len([kind for kind in experiments[task].todo(method) if kind in kinds]) for task, method in pairs)
    free, running = list(range(1, workers + 1)), {}
    with (
        concurrent.futures.ProcessPoolExecutor(workers, context, end_with_the_parent) as pool,
        tqdm(total=left, desc="searches and reports") as bar,
    ):
        while True:
            busy = {(task, method) for task, method, *_ in running.values()}
            for task, method in pairs:
                if free and (task, method) not in busy and (kind := experiments[task].ready(method)) in kinds:
                    job = experiments[task].job(kind, method)
                    future = pool.submit(timed, job, free[0])
                    running[future] = task, method, kind, free.pop(0)
            if not running:
                return
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                task, method, kind, position = running.pop(future)
                free.append(position)
                if (error := future.exception()) is None:
                    experiments[task].add(kind, method, *future.result())
                elif isinstance(error, Exception):
                    experiments[task].fail(kind, method, error)
                else:
                    raise error
                bar.update()


def run(arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.overhead:
        from .papers import overhead

        overhead.measure(arguments.out / "overhead.json")
        return
    experiments = {
        task: Experiment(arguments.out, task, fresh=arguments.fresh and not arguments.show) for task in arguments.tasks
    }
    methods = {}
    record.chosen((method.name for task in arguments.tasks for method in METHODS[task]), arguments.only)
    for task in arguments.tasks:
        chosen = [
            method
            for method in METHODS[task]
            if arguments.only in method.name or re.search(arguments.only, method.name)
        ]
        # A method is compared with its base, and takes its learning rate.
        bases = {method.base for method in chosen}
        methods[task] = [method for method in METHODS[task] if method in chosen or method.name in bases]
    if not arguments.show:
        work(
            experiments,
            methods,
            max(arguments.workers, 1),
            ("search", "prices") if arguments.no_reports else ("search", "prices", "report"),
        )
    from .papers import contenders, normal_tables, normalisers, pictures, quadrants, rules, tables

    # Of all tasks of a paper of which one was asked for.
    for of, name, kind, draw in (
        (contenders.METHODS, "tables.txt", tables.text, pictures.draw),
        (rules.METHODS, "gauss-newton.txt", quadrants.text, quadrants.draw),
        (normalisers.METHODS, "bnp.txt", normal_tables.text, normal_tables.draw),
    ):
        if set(of) & set(arguments.tasks):
            shown = {task: experiments.get(task) or Experiment(arguments.out, task) for task in of}
            text = kind(shown)
            print(text)
            record.write(arguments.out / name, text + "\n")
            draw(shown, arguments.out)
