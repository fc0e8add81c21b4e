"""The result lines of ``.ci/gpu/run``: ``$OUT/gpu.jsonl``, a line of JSON for each thing as soon as it is known.

``results.py begin | part NAME STATUS SECONDS NOTE | summary LOGS`` is what the script calls; the parts that are Python programs
import ``say`` and ``finish``. A command begins with a line that names commit and machine, so one file can hold several.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "hypothesis", "setuptools")
#: What paths in tracebacks are relative to.
TREE = Path(__file__).resolve().parents[2]
#: Lines of the summary, and their length.
LINES, WIDTH = 60, 180


def path() -> Path:
    return Path(os.environ["OUT"]) / "gpu.jsonl"


def say(**row: Any) -> None:
    """Write a line, and print it into the part's log."""
    text = json.dumps(row)
    with path().open("a") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(text, flush=True)


def attempt(what: str, case: str, function: Callable[[], bool]) -> bool:
    """What the function returns; an exception becomes a line, counts as False, and the run goes on."""
    try:
        return function()
    except Exception as error:
        say(
            what=what,
            case=case,
            error=f"{type(error).__name__}: {error}"[:400],
            at=traceback.format_exc()[-1500:].replace(f"{TREE}/", ""),
        )
        return False


def finish(what: str, verdict: str, cases: dict[str, Callable[[], bool]], seconds: float = math.inf) -> NoReturn:
    """Run the cases, none after ``seconds``; end the process with a line that counts them, and an error unless all are good."""
    end = time.monotonic() + seconds
    good = done = 0
    for case, function in cases.items():
        if time.monotonic() > end:
            break
        good += attempt(what, case, function)
        done += 1
    left = f", no time for {len(cases) - done} more" if done < len(cases) else ""
    print(f"{good} of {done} {verdict}{left}")
    raise SystemExit(good < done)


def begin() -> None:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    card = ""
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        card = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    say(what="begin", commit=os.environ["PRECOND_COMMIT"], date=time.strftime("%Y-%m-%d %H:%M"), card=card,
        cores=os.cpu_count(), python=platform.python_version(), versions=versions)  # fmt: skip


def last_command() -> list[dict[str, Any]]:
    """The lines since the last ``begin``."""
    rows = [json.loads(line) for line in path().read_text().splitlines()]
    first = max((k for k, row in enumerate(rows) if row["what"] == "begin"), default=0)
    return rows[first:]


def failed_tests(logs: Path) -> Iterator[str]:
    """The tests that failed, from pytest's XML files."""
    for file in sorted(logs.glob("*.xml")):
        try:
            suite = xml.etree.ElementTree.parse(file)
        except xml.etree.ElementTree.ParseError:  # its process was ended while it wrote
            continue
        for case in suite.iter("testcase"):
            problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
            if problem is not None:
                message = (problem.get("message") or "").splitlines() or [""]
                yield f"{file.stem}: {case.get('name')}: {message[0]}"


def summary(logs: Path) -> None:
    """What a reader wants first, in at most ``LINES`` lines."""
    rows = last_command()
    said: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        said.setdefault(row["what"], []).append(row)
    head = rows[0]
    lines = [f"{head['card'] or 'no GPU'}, torch {head['versions'].get('torch')}, commit {head['commit']}"]
    lines += [f"{row['part']:9} {row['status']:9} {row['seconds']:4} s  {row['note']}" for row in said.get("part", [])]

    compared = said.get("parity", [])
    if compared:
        equal = sum(row.get("equal", False) for row in compared)
        lines.append(f"parity: {equal} of {len(compared)} cases equal")
    wrong = [f"{row['what']}, {row['case']}: {row['error']}" for row in rows if "error" in row]
    wrong += [f"{row['what']}, {row['case']}: differs in {', '.join(row['wrong'])}" for row in rows if row.get("wrong")]
    wrong += list(failed_tests(logs))
    shown = 12
    lines += [f"  {text}" for text in wrong[:shown]]
    if len(wrong) > shown:
        lines.append(f"  and {len(wrong) - shown} more: gpu.jsonl, logs.tgz")

    lines += [f"copy: {row['gb_per_s']:.0f} GB/s" for row in said.get("copy", [])]
    timed = [row for row in said.get("speed", []) + said.get("small", []) if "error" not in row]
    if timed:
        lines.append(f"{'case':42} {'':18} {'device ms':>10} {'host ms':>8} {'GB/s':>6} {'% of copy':>9}")
    for row in timed:
        lines.append(
            f"{row['case']:42} {row['who']:18} {row['device_ms']:10.3f} {row['host_ms']:8.3f} {row['gb_per_s']:6.0f} "
            f"{row['percent_of_copy']:9.1f}{'' if row['queued_ahead'] else ' with waits of the host'}"
        )
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"and {len(lines) - LINES + 1} more lines: gpu.jsonl"]
    print("\n".join(line[:WIDTH] for line in lines))


def main() -> None:
    command, *rest = sys.argv[1:]
    if command == "begin":
        begin()
    elif command == "part":
        name, status, seconds, note = rest
        say(what="part", part=name, status=status, seconds=int(seconds), note=note[:300])
    else:
        summary(Path(rest[0]))


if __name__ == "__main__":
    main()
