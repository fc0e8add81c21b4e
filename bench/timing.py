"""Interleaved medians in one process, and where they were measured."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import precond
from precond import _C


class ClippedTorch:
    """What ``max_grad_norm`` replaces: torch's clip_grad_norm_, which writes the gradients, and its fused AdamW."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.params = params
        self.optimizer = torch.optim.AdamW(params, fused=True)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()


def interleaved(contenders: dict[str, Callable[[], object]], seconds: float, least: int = 7) -> dict[str, list[float]]:
    """Seconds per call of each contender, A B A B: at least ``least`` rounds, more while time is left."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
        call()
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < least or time.perf_counter() < end:
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        if len(next(iter(times.values()))) >= 2000:
            break
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median of the ratios of neighbouring runs: what disturbs the machine disturbs both."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    def git(*command: str) -> str:
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    dirty = git("status", "--porcelain", "--", "csrc", "precond", "triton_kernels", "bench", "CMakeLists.txt")
    return head + ("+changes" if dirty else "") if head else "unknown"


def environment() -> dict[str, object]:
    """What a reader needs to repeat a measurement."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.selected_isa(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset (libgomp spins for a while, then sleeps)"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "precond": precond.__version__,
        "compiler": _C.compiler,
        "commit": commit(),
    }
