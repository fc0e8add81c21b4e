"""The result file of a benchmark: rewritten after each case, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import ROOT

#: After this time ``--quick`` begins no further case; the last one and the import of torch fit into two minutes.
QUICK_SECONDS = 100


def add_arguments(parser: argparse.ArgumentParser, *, out: bool = True) -> None:
    """The flags that every benchmark with a record takes; ``out``: also the directory of its files."""
    parser.add_argument(
        "--only", metavar="REGEX", default="", help="only the cases whose name contains or matches this"
    )
    parser.add_argument("--quick", action="store_true", help="two minutes: smaller and shorter, in a file of its own")
    parser.add_argument("--fresh", action="store_true", help="measure again what the result file has already")
    if out:
        parser.add_argument(
            "--out", type=Path, default=ROOT / "bench" / "results", help="directory of the result files"
        )


def chosen(names: Iterable[str], only: str) -> list[str]:
    """The names that ``--only`` picks."""
    names = list(names)
    found = [name for name in names if only in name or re.search(only, name)]
    if not found:
        raise SystemExit(f"--only {only!r} matches no case; there are: {'; '.join(names)}")
    return found


def write(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a run that is killed, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


class Record:
    """Results by the name of their case, and the run that each comes from: environment, settings, date.

    A case counts as measured if its result has the same environment and settings as this run, and no error. Results of other
    runs stay in the file until their case is measured again.
    """

    def __init__(
        self, path: Path, environment: dict[str, Any], settings: dict[str, Any], *, fresh: bool = False
    ) -> None:
        self.path = path
        # As JSON gives them back, so that they compare equal.
        environment, settings = json.loads(json.dumps([environment, settings]))
        report = json.loads(path.read_text()) if path.exists() else {}
        runs = report.get("runs", [])
        #: Each result with the run that it comes from; in the file a run is its position.
        self.by_name = {r["case"]: (runs[r.pop("run")], r) for r in report.get("results", []) if "run" in r}
        same = [run for run in runs if (run["environment"], run["settings"]) == (environment, settings)]
        if same and not fresh:
            self.run = same[-1]
        else:
            self.run = {"environment": environment, "settings": settings, "date": time.strftime("%Y-%m-%d")}

    def has(self, name: str) -> bool:
        run, result = self.by_name.get(name, ({}, {}))
        return run is self.run and "error" not in result

    def add(self, name: str, result: dict[str, Any]) -> None:
        self.by_name[name] = (self.run, {"case": name, **result})
        self.save()

    def save(self) -> None:
        # This run is the last, so that it goes on where it was cut off though an older one has the same settings.
        others = {id(run): run for run, _ in self.by_name.values() if run is not self.run}
        runs = [*others.values(), self.run]
        position = {id(run): k for k, run in enumerate(runs)}
        results = [{**result, "run": position[id(run)]} for run, result in self.by_name.values()]
        write(self.path, json.dumps({"runs": runs, "results": results}, indent=1) + "\n")

    def results(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """What is known of these cases, in their order."""
        return [self.by_name[name][1] for name in names if name in self.by_name]

    def others(self, names: Iterable[str]) -> str:
        """A line on results of other runs, empty if there are none: what is under a table that shows them too."""
        found = [name for name in names if name in self.by_name and self.by_name[name][0] is not self.run]
        return f"Of another run, whose environment is in {self.path.name}: {'; '.join(found)}.\n" if found else ""

    def measure(
        self,
        cases: dict[str, Callable[[], dict[str, Any]]],
        line: Callable[[dict[str, Any]], str],
        *,
        end: float | None = None,
    ) -> None:
        """Measure what is not known yet; each case gets its result or its error, and a line. ``end``: on time.monotonic()."""
        todo = [name for name in cases if not self.has(name)]
        print(f"{len(todo)} of {len(cases)} cases to measure, the others are in {self.path}", flush=True)
        for k, name in enumerate(tqdm(todo, desc="cases", leave=False)):
            if end is not None and time.monotonic() > end:
                tqdm.write(f"time is up, {len(todo) - k} cases left: run it again")
                break
            try:
                result = cases[name]()
            except Exception as error:
                result = {"error": short(error)}
            self.add(name, result)
            text = f"error: {result['error']}" if "error" in result else line(result)
            tqdm.write(f"{name}: {text}")
            sys.stdout.flush()
            if text.startswith("error: DeviceLost"):
                raise SystemExit(f"stopped after {name!r}: a new run goes on with the rest")

    def failed(self, names: Iterable[str]) -> list[str]:
        """Cases with an error."""
        return [result["case"] for result in self.results(names) if "error" in result]


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def end_of(arguments: argparse.Namespace) -> float | None:
    """When ``--quick`` begins no further case, on time.monotonic(); None without it."""
    return time.monotonic() + QUICK_SECONDS if arguments.quick else None
