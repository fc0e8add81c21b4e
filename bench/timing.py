"""Clocks for the device and the host, interleaved medians in one process, and where they were measured."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import precond
from precond import _C

from . import ROOT
from .record import short


class ClippedTorch:
    """What ``max_grad_norm`` replaces: torch's clip_grad_norm_, which writes the gradients, and its fused AdamW."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.params = params
        self.optimizer = torch.optim.AdamW(params, fused=True)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()


class DeviceLost(RuntimeError):
    """A kernel failed in a way that ends the process's CUDA context."""


@dataclasses.dataclass
class Pace:
    """How a call is timed on the device: calls per pair of events, the spin before them, and whether that was long enough."""

    calls: int
    spin_ms: float
    ahead: bool = True


@dataclasses.dataclass
class Times:
    """Milliseconds of one call, a value per round."""

    device: list[float]
    host: list[float]
    pace: Pace

    def summary(self) -> dict[str, object]:
        """``queued_ahead``: False where the call waits for the device, so that its device time has waits of the host in it."""
        found: dict[str, object] = {}
        for name, values in (("device_ms", self.device), ("host_ms", self.host)):
            low, median, high = quartiles(values)
            found |= {name: median, f"{name}_quartiles": [low, high]}
        return found | {"queued_ahead": self.pace.ahead}


class Clock:
    """Milliseconds of a call on the device and on the host, each apart from the other.

    On a GPU a spin kernel runs while the host queues the calls behind it, so that no time of the host is between the events.
    Without one (a dry run) both times are the host's.
    """

    def __init__(self, device: str) -> None:
        self.gpu = torch.device(device).type == "cuda"
        self.cycles_per_ms = 0.0
        if self.gpu:
            cycles = 20_000_000
            torch.cuda._sleep(cycles)  # the first launch loads it
            begin, end = self._events()
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
            torch.cuda.synchronize()
            self.cycles_per_ms = cycles / begin.elapsed_time(end)

    @staticmethod
    def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.gpu:
            torch.cuda.synchronize()

    def recover(self) -> None:
        """After an error: free memory; raise ``DeviceLost`` where nothing can run in this process any more."""
        if self.gpu:
            try:
                torch.cuda.synchronize()
            except Exception as error:
                raise DeviceLost(short(error)) from None
            torch.cuda.empty_cache()

    def host_ms(self, call: Callable[[], object]) -> float:
        """Of one call with nothing queued before it."""
        self.wait()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    def pace(self, call: Callable[[], object], most: int = 5) -> Pace:
        """Several calls, fewer where the host takes long to queue one, and a spin of twice the time to queue them."""
        if not self.gpu:
            return Pace(1, 0.0)
        host = statistics.median(self.host_ms(call) for _ in range(3))
        calls = max(1, min(most, int(20 / max(host, 1e-3))))
        return Pace(calls, max(1.0, 2 * calls * host))

    def device_ms(self, call: Callable[[], object], pace: Pace) -> float:
        """Of one call. Where the spin ended before the host was done it is repeated with a longer spin and fewer calls.

        Fewer, because a stream takes about a thousand launches before the host has to wait. A call that itself waits for the
        device can never be queued ahead; after four attempts ``pace.ahead`` says so.
        """
        if not self.gpu:
            return self.host_ms(call)
        for attempt in range(4):
            begin, end = self._events()
            torch.cuda.synchronize()
            if pace.ahead:
                torch.cuda._sleep(int(pace.spin_ms * self.cycles_per_ms))
            begin.record()
            for _ in range(pace.calls):
                call()
            end.record()
            ahead = not begin.query()
            torch.cuda.synchronize()
            ms = begin.elapsed_time(end) / pace.calls
            if ahead or not pace.ahead:
                break
            if attempt == 3:
                pace.ahead = False
            pace.spin_ms, pace.calls = 2 * pace.spin_ms, max(1, pace.calls // 2)
        return ms

    def interleaved(
        self, calls: dict[str, Callable[[], object]], rounds: int
    ) -> tuple[dict[str, Times], dict[str, str]]:
        """Times of each call, A B A B, on the device and then on the host; and what the calls that failed raised."""
        times: dict[str, Times] = {}
        failed: dict[str, str] = {}

        def attempt(name: str, part: Callable[[], object]) -> None:
            if name in failed:
                return
            try:
                part()
            except Exception as error:
                failed[name] = short(error)
            if name in failed:  # here the traceback is gone, and the memory that it held
                self.recover()

        def warm(name: str) -> None:
            for _ in range(3 if self.gpu else 1):
                calls[name]()
            times[name] = Times([], [], self.pace(calls[name]))

        def on_device(name: str) -> None:
            times[name].device.append(self.device_ms(calls[name], times[name].pace))

        def on_host(name: str) -> None:
            times[name].host.append(self.host_ms(calls[name]))

        for part in (warm, *[on_device] * rounds, *[on_host] * rounds):
            for name in calls:
                attempt(name, functools.partial(part, name))
        return {name: found for name, found in times.items() if name not in failed}, failed


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high


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


def ms_quartiles(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """The lower and the upper quartile in milliseconds of what ``interleaved`` gives."""
    found = {name: quartiles(values) for name, values in times.items()}
    return {name: [low * 1e3, high * 1e3] for name, (low, _, high) in found.items()}


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
    """The commit, and a digest of what was changed since; outside a checkout ``PRECOND_COMMIT`` names it, or "unknown"."""
    if name := os.environ.get("PRECOND_COMMIT"):
        return name

    def git(*command: str) -> str:
        if shutil.which("git") is None:
            return ""
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    # Not the result files, which a benchmark itself changes.
    paths = ["--", "csrc", "precond", "triton_kernels", "bench", "CMakeLists.txt", ":!bench/results"]
    head = git("rev-parse", "--short=12", "HEAD")
    dirty = git("status", "--porcelain", *paths)
    digest = hashlib.sha256((dirty + git("diff", "HEAD", *paths)).encode()).hexdigest()[:6]
    return head + (f"+changes-{digest}" if dirty else "") if head else "unknown"


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
