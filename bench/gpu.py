"""Speed of the GPU backends against torch.optim on one card, with targets.

Device milliseconds from events, host milliseconds of the call alone, interleaved medians in one process after a parity check.
Percent of a copy measured in the same run. Inputs are random and larger than the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import precond
from precond import _C, _backend

from . import ROOT, timing

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Make = Callable[[list[torch.nn.Parameter]], Any]


def llama_shapes(parameters: int) -> list[tuple[int, ...]]:
    """The 291 tensors of an 8B Llama, each matrix with both sides scaled so that all have about ``parameters`` elements."""
    width, hidden, vocabulary, kv = 4096, 14336, 128256, 1024
    layer = [
        (width, width),
        (kv, width),
        (kv, width),
        (width, width),
        (hidden, width),
        (hidden, width),
        (width, hidden),
    ]
    shapes = [(vocabulary, width), *[*layer, (width,), (width,)] * 32, (width,), (vocabulary, width)]
    scale = (parameters / sum(torch.Size(shape).numel() for shape in shapes)) ** 0.5
    return [tuple(max(8, int(n * scale) // 8 * 8) for n in shape) for shape in shapes]


@dataclasses.dataclass
class Case:
    """A census of tensors, the contenders and the bytes that a step must move per parameter."""

    name: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    contenders: dict[str, Make]
    bytes_per_element: float
    targets: list[tuple[str, str, float]]  # (what, base or "copy", limit)


def cases(scale: float) -> list[Case]:
    def adamw(**options: object) -> dict[str, Make]:
        own = {"betas": (0.9, 0.99), **options}
        makers: dict[str, Make] = {
            "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
            "precond cuda": lambda params: precond.AdamW(params, backend="cuda", **own),
            "precond triton": lambda params: precond.AdamW(params, backend="triton", **own),
        }
        return {name: make for name, make in makers.items() if not why_absent(name)}

    def other(name: str, **options: object) -> dict[str, Make]:
        """A class of the family, and torch's of that name where it is fused."""
        makers: dict[str, Make] = {
            "torch fused": lambda params: getattr(torch.optim, name)(params, fused=True, **options),
            "precond cuda": lambda params: getattr(precond, name)(params, backend="cuda", **options),
            "precond triton": lambda params: getattr(precond, name)(params, backend="triton", **options),
        }
        if name == "RMSprop":  # torch has no fused one
            makers["torch foreach"] = lambda params: torch.optim.RMSprop(params, foreach=True, **options)
            del makers["torch fused"]
        return {contender: make for contender, make in makers.items() if not why_absent(contender)}

    def stored(weight_format: str, state_format: str) -> dict[str, Make]:
        """AdamW with formats of few bits; what torch needs for the same precision, and another library's."""

        def own(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
            group = {"params": params, "weight_format": weight_format, "state_format": state_format}
            return precond.AdamW([group], backend="cuda", betas=(0.9, 0.99))

        def masters(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
            copies = [torch.nn.Parameter(p.detach().float()) for p in params]
            for copy, p in zip(copies, params, strict=True):
                copy.grad = None if p.grad is None else p.grad.float()
            return torch.optim.AdamW(copies, fused=True)

        makers: dict[str, Make] = {"torch fused fp32": masters, "precond cuda": own}
        flash = peer("FlashOptim")
        return {name: make for name, make in makers.items() if not why_absent(name)} | (
            {} if flash is None else {"FlashOptim": flash}
        )

    def clipped() -> dict[str, Make]:
        ours = adamw(max_grad_norm=1.0)
        return {"torch clip, fused": timing.ClippedTorch} | {k: v for k, v in ours.items() if k != "torch fused"}

    billion = int(1e9 * scale)
    triton_target = ("precond triton", "precond cuda", 1.1)
    small = [("precond cuda", "torch fused", 0.2)]
    of_copy = [("precond cuda", "copy", 92)]
    split = [
        ("precond cuda", "copy", 85),
        ("precond cuda", "torch fused fp32", 0.6),
        ("precond cuda", "FlashOptim", 0.5),
    ]
    few_bits = [("precond cuda", "copy", 80)]
    ours = {name: make for name, make in adamw().items() if name == "precond cuda"}
    return [
        Case("AdamW fp32, one tensor", [(billion,)], F32, adamw(), 28,
             [("precond cuda", "copy", 95), ("precond cuda", "torch fused", 1.0), triton_target]),
        Case("AdamW fp32, Llama-8B shapes", llama_shapes(billion), F32, adamw(), 28,
             [("precond cuda", "copy", 95), ("precond cuda", "torch fused", 1.0)]),
        Case("AdamW bf16, one tensor", [(billion,)], BF16, adamw(), 14,
             [*of_copy, ("precond cuda", "torch fused", 1.0), triton_target]),
        Case("AdamW fp16, one tensor", [(billion,)], F16, adamw(), 14, of_copy),
        Case("AdamW fp32 with bf16 states", [(billion,)], F32, adamw(state_format="bf16"), 20, of_copy),
        Case("SGD with momentum fp32, one tensor", [(billion,)], F32, other("SGD", lr=1e-3, momentum=0.9), 20, of_copy),
        Case("Adagrad fp32, one tensor", [(billion,)], F32, other("Adagrad"), 20, of_copy),
        Case("RMSprop fp32, one tensor", [(billion,)], F32, other("RMSprop"), 20, of_copy),
        Case("clip folded in, AdamW fp32, one tensor", [(billion,)], F32, clipped(), 32,
             [("precond cuda", "torch clip, fused", 0.8), ("precond triton", "torch clip, fused", 0.8)]),
        Case("AdamW fp32, 1000 x 1024", [(1024,)] * 1000, F32, adamw(), 28, small),
        Case("AdamW fp32, 10,000 x 64", [(64,)] * 10_000, F32, adamw(), 28, small),
        Case("AdamW bf16, 20,000 mixed MoE tensors", moe_shapes(billion), BF16, adamw(), 14, []),
        Case("AdamW bf16, one tensor, against other libraries", [(billion,)], BF16, ours | peers(), 14, []),
        # Two scales of 2 bytes for 64 elements, read and written: 1/8 byte.
        Case("AdamW bf16 split24 with int8 states", [(billion,)], BF16, stored("split24", "int8"), 12.125, split),
        Case("AdamW bf16 stochastic with int8 states", [(billion,)], BF16, stored("stochastic", "int8"), 10.125, few_bits),
        Case("AdamW bf16 stochastic with int4 states", [(billion,)], BF16, stored("stochastic", "int4"), 8.125, few_bits),
    ]  # fmt: skip


def moe_shapes(parameters: int) -> list[tuple[int, ...]]:
    """A mixture of experts stored expert by expert: of 20,000 tensors a third are matrices, the others norms, biases and
    routers; the matrices scaled so that all have about ``parameters`` elements.
    """
    matrices, vectors, routers = 6600, 13_000, 400
    square = max(64.0, (parameters - vectors * 512 - routers * 64 * 512) / matrices)
    side = int(square**0.5) // 8 * 8
    return [(side, side)] * matrices + [(512,)] * vectors + [(64, 512)] * routers


#: Optimizers of other libraries, timed where they are installed: module, class.
PEERS = {
    "FlashOptim": ("flashoptim", "FlashAdamW"),
    "optimi": ("optimi", "AdamW"),
    "bitsandbytes 8-bit": ("bitsandbytes.optim", "AdamW8bit"),
    "torchao 8-bit": ("torchao.optim", "AdamW8bit"),
}


def peer(name: str) -> Make | None:
    """Another library's optimizer; None, with the reason printed, where it does not import or take a parameter."""
    module, cls = PEERS[name]
    try:
        make: Make = functools.partial(getattr(importlib.import_module(module), cls), lr=1e-3)
        make([torch.nn.Parameter(torch.zeros(4096, dtype=BF16))])
    except Exception as error:
        print(f"{name} is not timed: {type(error).__name__}: {error}")
        return None
    return make


def peers() -> dict[str, Make]:
    return {name: make for name in PEERS if (make := peer(name)) is not None}


def why_absent(contender: str) -> str:
    """Why a contender cannot run here; empty if it can."""
    return _backend.why_not(contender.removeprefix("precond ")) if contender.startswith("precond ") else ""


class Clock:
    """Milliseconds on the device and on the host of one call. Without a GPU (a dry run of this file) both are the host's."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        if not self.gpu:
            start = time.perf_counter()
            call()
            ms = (time.perf_counter() - start) * 1e3
            return ms, ms
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        start = time.perf_counter()
        call()
        host = (time.perf_counter() - start) * 1e3
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), host


def interleaved(
    clock: Clock, calls: dict[str, Callable[[], object]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call))
    return times


def check_parity(device: str) -> None:
    """Refuse to time a kernel that is wrong: every rule and dtype, bit for bit with the CPU backend."""
    from cases import bits_equal, random_values
    from optimizers import BY_STATES, OPTIMIZERS

    plain = [(row, dtype, None, None) for row in OPTIMIZERS for dtype in (F32, BF16, F16)]
    stored = [(row, BF16, *formats) for row in BY_STATES for formats in (("split24", "int8"), ("stochastic", "int4"))]
    for row, dtype, weight_format, state_format in plain + stored:
        values = [random_values(shape, dtype) for shape in ((5,), (1025,), (40_000,), (100, 640))]
        results = []
        for backend in ("cpu", *(name for name in ("cuda", "triton") if not _backend.why_not(name))):
            if weight_format is not None and backend == "triton":
                continue
            where = "cpu" if backend == "cpu" else device
            params = [torch.nn.Parameter(v.to(where, copy=True)) for v in values]
            group = {"params": params, "weight_format": weight_format, "state_format": state_format}
            optimizer = row.cls([group], **row.kwargs, backend=backend)
            torch.manual_seed(1)
            for _ in range(4):
                for p in params:
                    p.grad = random_values(p.shape, dtype).to(where)
                optimizer.step()
            results.append((backend, [p.detach().cpu() for p in params]))
        for backend, tensors in results[1:]:
            if not all(bits_equal(a, b) for a, b in zip(tensors, results[0][1], strict=True)):
                raise AssertionError(
                    f"{row.rule} {dtype} {weight_format} {state_format} on {backend} differs from the cpu backend: "
                    "nothing is timed"
                )


def copy_bandwidth(clock: Clock, device: str, elements: int) -> float:
    """GB/s of a copy on the device, read plus written."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    times = interleaved(clock, {"copy": lambda: target.copy_(source)}, 10)["copy"]
    return 2 * 4 * elements / statistics.median(ms for ms, _ in times) / 1e6


def run_case(case: Case, clock: Clock, device: str, rounds: int, copy: float) -> dict[str, object]:
    elements = sum(torch.Size(shape).numel() for shape in case.shapes)
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(case.dtype)) for shape in case.shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device=device).to(case.dtype)
    # The contenders share parameters and gradients, each with its own states: a billion fp32 parameters each would not fit.
    optimizers = {name: make(params) for name, make in case.contenders.items()}
    times = interleaved(clock, {name: o.step for name, o in optimizers.items()}, rounds)
    result: dict[str, object] = {"case": case.name, "elements": elements, "tensors": len(case.shapes), "contenders": {}}
    for name, values in times.items():
        ms = statistics.median(device_ms for device_ms, _ in values)
        gbs = elements * (28 if name == "torch fused fp32" else case.bytes_per_element) / ms / 1e6
        result["contenders"][name] = {  # type: ignore[index]
            "device_ms": ms,
            "host_ms": statistics.median(host_ms for _, host_ms in values),
            "gb_per_s": gbs,
            "percent_of_copy": 100 * gbs / copy,
        }
    result["targets"] = []
    for what, base, limit in case.targets:
        if what not in times or (base != "copy" and base not in times):
            continue
        if base == "copy":
            value = result["contenders"][what]["percent_of_copy"]  # type: ignore[index]
            met = value >= limit
        else:
            pairs = zip(times[what], times[base], strict=True)
            value = statistics.median(a / b for (a, _), (b, _) in pairs)
            met = value <= limit
        result["targets"].append({"of": what, "to": base, "value": value, "target": limit, "met": met})  # type: ignore[attr-defined]
    return result


def table(results: list[dict]) -> str:
    lines = ["| case | contender | device ms | host ms | GB/s | % of copy |", "|---|---|---|---|---|---|"]
    for result in results:
        for name, row in result["contenders"].items():
            lines.append(
                f"| {result['case']} | {name} | {row['device_ms']:.3f} | {row['host_ms']:.3f} | {row['gb_per_s']:.0f} | "
                f"{row['percent_of_copy']:.0f} |"
            )
    lines += ["", "| case | measured | target | |", "|---|---|---|---|"]
    for result in results:
        for goal in result["targets"]:
            unit = "% of copy" if goal["to"] == "copy" else f"x {goal['to']}"
            bound = ">=" if goal["to"] == "copy" else "<="
            verdict = "met" if goal["met"] else "missed"
            lines.append(
                f"| {result['case']}, {goal['of']} | {goal['value']:.3f} {unit} | {bound} {goal['target']} | {verdict} |"
            )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", help="default cuda; cpu is a dry run of this file, without meaning")
    parser.add_argument("--scale", type=float, default=1.0, help="of the billion parameters (default 1)")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds per case (default 20)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="directory of the result files")


def run(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench gpu: no CUDA device here; nothing was measured")
    warnings.simplefilter("ignore", precond.PrecisionWarning)  # 16-bit states are what is timed
    clock = Clock(arguments.device)
    check_parity(arguments.device)
    copy = copy_bandwidth(clock, arguments.device, int(5e8 * arguments.scale) + 1024)
    results = []
    for case in cases(arguments.scale):
        print(case.name, flush=True)
        results.append(run_case(case, clock, arguments.device, arguments.rounds, copy))
        if clock.gpu:
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if clock.gpu else "dry-run"
    facts = timing.environment() | {"device": name, "cuda_kernels": _C.cuda}
    if clock.gpu:
        import subprocess

        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        facts |= {
            "torch_cuda": torch.version.cuda,
            "driver_and_clocks": subprocess.check_output(query, text=True).strip(),
        }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = name.lower().replace(" ", "-")
    report = {"environment": facts, "copy_gb_per_s": copy, "results": results, "date": time.strftime("%Y-%m-%d")}
    (arguments.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = f"# {name}\n\n`python -m bench gpu`, copy {copy:.0f} GB/s, {facts}\n\n{table(results)}\n"
    (arguments.out / f"{stem}.md").write_text(text)
    print(text)
