"""What exact division and square root cost on a GPU: the same kernels compiled with and without, timed A B A B.

Builds one rule of each shape twice for the card. The approximate build exists for this comparison alone: its bits are no
other backend's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from . import ROOT

VARIANTS = {"exact": "ON", "approximate": "OFF"}
TARGET = 1.03
# Its own process: an extension is loaded once.
MEASURE = """
import importlib.util, json, statistics, sys
import torch
spec = importlib.util.spec_from_file_location("precond._C", sys.argv[1])
sys.modules["precond._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["precond._C"])
import precond

found = {}
cases = [(torch.float32, None, None), (torch.bfloat16, None, None), (torch.bfloat16, "split24", "int8")]
for dtype, weight_format, state_format in cases:
    p = torch.nn.Parameter(torch.randn(int(sys.argv[2]), device="cuda").to(dtype))
    p.grad = torch.randn_like(p)
    group = {"params": [p], "weight_format": weight_format, "state_format": state_format}
    optimizer = precond.AdamW([group], betas=(0.9, 0.99), backend="cuda")
    times = []
    for _ in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        optimizer.step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    found[f"{dtype} {weight_format or ''} {state_format or ''}".strip()] = statistics.median(times[3:])
print(json.dumps(found))
"""


def build(variant: str, arch: str) -> Path:
    """The extension of a variant, compiled for one architecture."""
    import pybind11

    directory = ROOT / "build" / f"bench_{variant}"
    configure = [
        "cmake", "-S", ROOT, "-B", directory, "-G", "Ninja", "-DPRECOND_FEW_RULES=ON", "-DPRECOND_CUDA=ON",
        f"-DPRECOND_EXACT={VARIANTS[variant]}", f"-DPRECOND_CUDA_ARCHS={arch}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", directory]):
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    (extension,) = directory.glob("_C*.so")
    return extension


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--elements", type=int, default=500_000_000, help="default 5e8")
    parser.add_argument("--rounds", type=int, default=3, help="of A B (default 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="directory of the result file")
    parser.add_argument(
        "--build-only", metavar="ARCH", default=None, help="compile for ARCH (90) and stop: needs no GPU"
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.build_only is None and not torch.cuda.is_available():
        raise SystemExit("bench exact: no CUDA device here; nothing was measured")
    arch = arguments.build_only or "{}{}".format(*torch.cuda.get_device_capability())
    extensions = {variant: build(variant, arch) for variant in VARIANTS}
    if arguments.build_only is not None:
        return
    times: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.rounds):
        for variant, extension in extensions.items():
            command = [sys.executable, "-c", MEASURE, str(extension), str(arguments.elements)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            times[variant].append(json.loads(output))
    results = {}
    for case in times["exact"][0]:
        ms = {variant: statistics.median(found[case] for found in rounds) for variant, rounds in times.items()}
        ratio = ms["exact"] / ms["approximate"]
        results[case] = {"ms": ms, "ratio": ratio, "target": TARGET, "met": ratio <= TARGET}
        print(f"AdamW {case}: exact {ms['exact']:.3f} ms, approximate {ms['approximate']:.3f} ms, ratio {ratio:.3f}")
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}-exact.json").write_text(json.dumps(results, indent=1) + "\n")
