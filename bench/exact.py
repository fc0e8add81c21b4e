"""What exact division and square root cost on a GPU: the same kernels compiled with and without, timed A B A B.

Builds one rule of each shape twice for the card. The approximate build exists for this comparison alone: its bits are no
other backend's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import ROOT, record

VARIANTS = {"exact": "ON", "approximate": "OFF"}
TARGET = 1.03
#: dtype, weight_format, state_format of the AdamW that is timed
CASES = {
    "AdamW fp32": (torch.float32, None, None),
    "AdamW bf16": (torch.bfloat16, None, None),
    "AdamW bf16 split24 with int8 states": (torch.bfloat16, "split24", "int8"),
}


def serve(extension: str, elements: int, device: str) -> None:
    """For each name of a case read from stdin, write its milliseconds on the device: what a worker process runs.

    Every variant has a process of its own, because an extension is loaded once; all stay, so that rounds are A B A B.
    """
    from support.device import stand_in_extension

    stand_in_extension(extension)
    import precond

    from . import timing

    clock = timing.Clock(device)
    current, step, pace = "", None, None
    for line in sys.stdin:
        if current != (name := line.strip()):
            current, step = name, None  # frees the last case first
            dtype, weight_format, state_format = CASES[name]
            p = torch.nn.Parameter(torch.randn(elements, device=device).to(dtype))
            p.grad = torch.randn_like(p)
            group = {"params": [p], "weight_format": weight_format, "state_format": state_format}
            step = precond.AdamW([group], betas=(0.9, 0.99), backend=device).step
            for _ in range(3):
                step()
            pace = clock.pace(step)
        print(json.dumps([clock.device_ms(step, pace) for _ in range(3)]), flush=True)


@contextlib.contextmanager
def workers(extensions: dict[str, Path], elements: int, device: str) -> Iterator[dict[str, Any]]:
    """A process per variant that answers the name of a case with its times."""
    with contextlib.ExitStack() as stack:
        found = {}
        for variant, extension in extensions.items():
            command = [sys.executable, "-m", "bench.exact", str(extension), str(elements), device]
            pipe = subprocess.PIPE
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True))
            found[variant] = process
        yield found


def ask(process: Any, name: str) -> list[float]:
    print(name, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"the process that times {name} has ended with {process.wait()}; its stderr says why")
    return json.loads(answer)


def measured(name: str, processes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Medians and quartiles of both variants, and the median ratio of neighbouring runs."""
    from . import timing

    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, process in processes.items():
            times[variant] += ask(process, name)
    ratio = statistics.median(a / b for a, b in zip(times["exact"], times["approximate"], strict=True))
    found = {variant: timing.quartiles(values) for variant, values in times.items()}
    return {
        "ms": {variant: median for variant, (_, median, _) in found.items()},
        "ms_quartiles": {variant: [low, high] for variant, (low, _, high) in found.items()},
        "ratio": ratio,
        "target": TARGET,
        "met": ratio <= TARGET,
    }


def line(result: dict[str, Any]) -> str:
    ms = result["ms"]
    return f"exact {ms['exact']:.3f} ms, approximate {ms['approximate']:.3f} ms, ratio {result['ratio']:.3f}"


def build(variant: str, arch: str) -> Path:
    """The extension of a variant, compiled for one architecture."""
    import pybind11

    import precond

    directory = ROOT / "build" / f"bench_{variant}"
    configure = [
        "cmake", "-S", ROOT, "-B", directory, "-G", "Ninja", "-DPRECOND_FEW_RULES=ON", "-DPRECOND_CUDA=ON",
        f"-DPRECOND_EXACT={VARIANTS[variant]}", f"-DPRECOND_CUDA_ARCHS={arch}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPRECOND_VERSION={precond.__version__}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", directory]):
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    (extension,) = directory.glob("_C*.so")
    return extension


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run, times mean nothing")
    parser.add_argument("--elements", type=int, help="default 5e8; quick 1e8; dry run 1e5")
    parser.add_argument("--rounds", type=int, help="of A B, three times each (default 7; quick 3)")
    parser.add_argument(
        "--build-only", metavar="ARCH", default=None, help="compile for ARCH (90) and stop: needs no GPU"
    )
    record.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    device = arguments.device
    if arguments.build_only is None and device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench exact: no CUDA device here; nothing was measured")
    if arguments.build_only is not None:
        for variant in VARIANTS:
            build(variant, arguments.build_only)
        return
    from . import gpu, timing

    end = record.end_of(arguments)
    names = record.chosen(CASES, arguments.only)
    elements = arguments.elements or (100_000 if device == "cpu" else 10**8 if arguments.quick else 5 * 10**8)
    rounds = arguments.rounds or (3 if arguments.quick or device == "cpu" else 7)
    path = arguments.out / f"{gpu.stem(device)}-exact{'-quick' if arguments.quick else ''}.json"
    settings = {"elements": elements, "rounds": rounds}
    results = record.Record(path, timing.environment() | gpu.device_facts(device), settings, fresh=arguments.fresh)
    todo = [name for name in names if not results.has(name)]
    if not todo:
        extensions = {}
    elif device == "cpu":
        extensions = {variant: Path(timing._C.__file__) for variant in VARIANTS}
    else:
        arch = "{}{}".format(*torch.cuda.get_device_capability())
        extensions = {variant: build(variant, arch) for variant in VARIANTS}
    with workers(extensions, elements, device) as processes:
        cases = {name: functools.partial(measured, name, processes, rounds) for name in names}
        results.measure(cases, line, end=end)
    for result in results.results(names):
        print(f"{result['case']}: {result['error'] if 'error' in result else line(result)}")
    if failed := results.failed(names):
        raise SystemExit(f"bench exact: failed: {', '.join(failed)}")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
