"""Speed of the GPU backends against torch.optim on one card, with targets.

A time on the device is that of several steps which were queued beforehand; a time on the host is that of one step alone. The
table has medians of interleaved rounds in one process, the file their quartiles too. Percent are of a copy in the same run.
Inputs are random and larger than the cache. A backend whose bits are not the CPU's is not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import shutil
import statistics
import subprocess
import warnings
from collections.abc import Callable
from typing import Any

import torch

import precond
from precond import _C
from precond._core import backend as _backend

from . import gpu_parity, record, timing

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
    #: Of contenders that keep other states than the case is about; None where nobody counted.
    own_bytes: dict[str, float | None] = dataclasses.field(default_factory=dict)

    def rates(self, name: str, ms: float, copy: float) -> dict[str, float | None]:
        """GB/s of a contender and its percentage of a copy, by the bytes that it must move."""
        moved = self.own_bytes.get(name, self.bytes_per_element)
        if moved is None:
            return {"gb_per_s": None, "percent_of_copy": None}
        gbs = sum(torch.Size(shape).numel() for shape in self.shapes) * moved / ms / 1e6
        return {"gb_per_s": gbs, "percent_of_copy": 100 * gbs / copy}


def cases(scale: float, device: str = "cuda") -> list[Case]:
    """All cases; on a CPU, for a dry run, the cpu backend stands in for the others."""
    cuda, triton = ("cuda", "triton") if device == "cuda" else ("cpu", "cpu")

    def adamw(**options: object) -> dict[str, Make]:
        own = {"betas": (0.9, 0.99), **options}
        return {
            "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
            "precond cuda": lambda params: precond.AdamW(params, backend=cuda, **own),
            "precond triton": lambda params: precond.AdamW(params, backend=triton, **own),
        }

    def other(name: str, **options: object) -> dict[str, Make]:
        """A class of the family, and torch's of that name where it is fused."""
        # torch has no fused RMSprop
        form = "foreach" if name == "RMSprop" else "fused"
        return {
            f"torch {form}": lambda params: getattr(torch.optim, name)(params, **{form: True}, **options),
            "precond cuda": lambda params: getattr(precond, name)(params, backend=cuda, **options),
            "precond triton": lambda params: getattr(precond, name)(params, backend=triton, **options),
        }

    def stored(weight_format: str, state_format: str) -> dict[str, Make]:
        """AdamW with formats of few bits; what torch needs for the same precision, and another library's."""

        def own(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
            group = {"params": params, "weight_format": weight_format, "state_format": state_format}
            return precond.AdamW([group], backend=cuda, betas=(0.9, 0.99))

        def masters(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
            copies = [torch.nn.Parameter(p.detach().float()) for p in params]
            for copy, p in zip(copies, params, strict=True):
                copy.grad = None if p.grad is None else p.grad.float()
            return torch.optim.AdamW(copies, fused=True)

        return {"torch fused fp32": masters, "precond cuda": own, "FlashOptim": peer("FlashOptim")}

    def riding(**options: object) -> dict[str, Make]:
        """AdamW with something in its pass, beside torch's without."""
        return {name: make for name, make in adamw(**options).items() if name != "precond triton"}

    def schedule_free() -> dict[str, Make]:
        return {
            "torch fused": adamw()["torch fused"],
            "precond cuda": lambda params: precond.ScheduleFreeAdamW(params, backend=cuda),
        }

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
    plain_bytes = {"torch fused": 28.0}
    others = {"torch fused fp32": 28.0, "FlashOptim": None}
    against_others = {"precond cuda": adamw()["precond cuda"], **{name: peer(name) for name in PEERS}}
    return [
        Case("AdamW fp32, one tensor", [(billion,)], F32, adamw(), 28,
             [("precond cuda", "copy", 95), ("precond cuda", "torch fused", 1.0), triton_target]),
        Case("AdamW fp32 with an average, one tensor", [(billion,)], F32, riding(ema_decay=0.999), 36, [], plain_bytes),
        Case("AdamW fp32 with masks, one tensor", [(billion,)], F32, riding(cautious="both"), 28, []),
        Case("AdamW fp32 with statistics, one tensor", [(billion,)], F32, riding(statistics=True), 28, []),
        Case("AdamW fp32 with a limit, one tensor", [(billion,)], F32, riding(max_update_rms=1.0), 44, [], plain_bytes),
        Case("schedule-free AdamW fp32, one tensor", [(billion,)], F32, schedule_free(), 28, []),
        Case("AdamW fp32, Llama-8B shapes", llama_shapes(billion), F32, adamw(), 28,
             [("precond cuda", "copy", 95), ("precond cuda", "torch fused", 1.0)]),
        Case("AdamW bf16, one tensor", [(billion,)], BF16, adamw(), 14,
             [*of_copy, ("precond cuda", "torch fused", 1.0), triton_target]),
        Case("AdamW fp16, one tensor", [(billion,)], F16, adamw(), 14, of_copy),
        Case("AdamW fp32 with bf16 states", [(billion,)], F32, adamw(state_format="bf16"), 20, of_copy, plain_bytes),
        Case("SGD with momentum fp32, one tensor", [(billion,)], F32, other("SGD", lr=1e-3, momentum=0.9), 20, of_copy),
        Case("Adagrad fp32, one tensor", [(billion,)], F32, other("Adagrad"), 20, of_copy),
        Case("RMSprop fp32, one tensor", [(billion,)], F32, other("RMSprop"), 20, of_copy),
        Case("clip folded in, AdamW fp32, one tensor", [(billion,)], F32, clipped(), 32,
             [("precond cuda", "torch clip, fused", 0.8), ("precond triton", "torch clip, fused", 0.8)]),
        Case("AdamW fp32, 1000 x 1024", [(1024,)] * 1000, F32, adamw(), 28, small),
        Case("AdamW fp32 with statistics, 1000 x 1024", [(1024,)] * 1000, F32, riding(statistics=True), 28, []),
        Case("AdamW fp32, 10,000 x 64", [(64,)] * 10_000, F32, adamw(), 28, small),
        Case("AdamW bf16, 20,000 mixed MoE tensors", moe_shapes(billion), BF16, adamw(), 14, []),
        # Two scales of 2 bytes for 64 elements, read and written: 1/8 byte.
        Case("AdamW bf16 split24 with int8 states", [(billion,)], BF16, stored("split24", "int8"), 12.125, split, others),
        Case("AdamW bf16 stochastic with int8 states", [(billion,)], BF16, stored("stochastic", "int8"), 10.125, few_bits,
             others),
        Case("AdamW bf16 stochastic with int4 states", [(billion,)], BF16, stored("stochastic", "int4"), 8.125, few_bits,
             others),
        # Last, because torchao compiles its step.
        Case("AdamW bf16, one tensor, against other libraries", [(billion,)], BF16, against_others, 14, [],
             dict.fromkeys(PEERS)),
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


def peer(name: str) -> Make:
    """Another library's optimizer, imported when it is made: a library that is missing or broken is one failed contender."""
    module, cls = PEERS[name]
    return lambda params: getattr(importlib.import_module(module), cls)(params, lr=1e-3)


def copy_bandwidth(clock: timing.Clock, device: str, elements: int) -> float:
    """GB/s of a copy on the device, read plus written."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    times, failed = clock.interleaved({"copy": lambda: target.copy_(source)}, 10)
    if failed:
        raise RuntimeError(f"the copy failed: {failed['copy']}")
    return 2 * 4 * elements / statistics.median(times["copy"].device) / 1e6


def run_case(
    case: Case, clock: timing.Clock, device: str, rounds: int, copy: float, refused: dict[str, str]
) -> dict[str, object]:
    """Times of all contenders; ``refused``: why a contender is not to be timed."""
    elements = sum(torch.Size(shape).numel() for shape in case.shapes)
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(case.dtype)) for shape in case.shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device=device).to(case.dtype)
    # The contenders share parameters and gradients, each with its own states: a billion fp32 parameters each would not fit.
    failed = {name: refused[name] for name in case.contenders if name in refused}
    steps: dict[str, Callable[[], object]] = {}
    for name, make in case.contenders.items():
        if name not in failed:
            try:
                steps[name] = make(params).step
            except Exception as error:
                failed[name] = record.short(error)
            if name in failed:
                clock.recover()
    times, broken = clock.interleaved(steps, rounds)
    failed |= broken
    contenders: dict[str, Any] = {name: {"error": failed[name]} for name in failed}
    for name, found in times.items():
        contenders[name] = {**found.summary(), **case.rates(name, statistics.median(found.device), copy)}
    targets = []
    for what, base, limit in case.targets:
        if what not in times or (base != "copy" and base not in times):
            continue
        if base == "copy":
            value = contenders[what]["percent_of_copy"]
            met = value >= limit
        else:
            # Of neighbouring runs: what disturbs the machine disturbs both.
            value = statistics.median(a / b for a, b in zip(times[what].device, times[base].device, strict=True))
            met = value <= limit
        targets.append({"of": what, "to": base, "value": value, "target": limit, "met": met})
    return {
        "elements": elements,
        "tensors": len(case.shapes),
        "copy_gb_per_s": copy,
        "contenders": {name: contenders[name] for name in case.contenders},
        "targets": targets,
    }


def line(result: dict[str, Any]) -> str:
    """A case in one line, for the log."""
    parts = []
    for name, row in result["contenders"].items():
        if "error" in row:
            parts.append(f"{name}: {row['error']}")
        else:
            waits = "" if row["queued_ahead"] else ", with waits of the host"
            percent = row["percent_of_copy"]
            of_copy = "" if percent is None else f"{percent:.0f} % of copy, "
            parts.append(f"{name} {row['device_ms']:.3f} ms ({of_copy}host {row['host_ms']:.3f}{waits})")
    return "; ".join(parts)


def table(results: list[dict]) -> str:
    lines = ["| case | contender | device ms | host ms | GB/s | % of copy |", "|---|---|---|---|---|---|"]
    for result in results:
        for name, row in result.get("contenders", {"": result}).items():
            if "error" in row:
                lines.append(f"| {result['case']} | {name} | {row['error'].replace('|', '/')} | | | |")
                continue
            waits = "" if row["queued_ahead"] else " (with waits of the host)"
            rates = ["" if row[key] is None else f"{row[key]:.0f}" for key in ("gb_per_s", "percent_of_copy")]
            lines.append(
                f"| {result['case']} | {name} | {row['device_ms']:.3f}{waits} | {row['host_ms']:.3f} | "
                f"{rates[0]} | {rates[1]} |"
            )
    lines += ["", "| case | measured | target | |", "|---|---|---|---|"]
    for result in results:
        for goal in result.get("targets", []):
            unit = "% of copy" if goal["to"] == "copy" else f"x {goal['to']}"
            bound = ">=" if goal["to"] == "copy" else "<="
            verdict = "met" if goal["met"] else "missed"
            lines.append(
                f"| {result['case']}, {goal['of']} | {goal['value']:.3f} {unit} | {bound} {goal['target']} | {verdict} |"
            )
    return "\n".join(lines)


def page(run: dict[str, Any], table: str) -> str:
    """A run's table, and what a reader needs to know of it."""
    facts = {**run["environment"], **run["settings"], **{k: v for k, v in run.items() if not isinstance(v, dict)}}
    known = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if name != "device")
    return f"# {run['environment']['device']}\n\n`python -m bench gpu`: {known}.\n\n{table}\n"


def device_facts(device: str) -> dict[str, object]:
    """What a reader needs to know of the card; without its clocks, which change from one run to the next."""
    facts: dict[str, object] = {"device": "dry run on the CPU", "cuda_kernels": _C.cuda}
    if device == "cuda":
        facts |= {"device": torch.cuda.get_device_name(), "torch_cuda": torch.version.cuda}
        facts["driver"] = nvidia_smi("driver_version")
    return facts


def nvidia_smi(query: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def stem(device: str) -> str:
    """The name of the card's result files."""
    return torch.cuda.get_device_name().lower().replace(" ", "-") if device == "cuda" else "dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run, times mean nothing")
    parser.add_argument("--scale", type=float, help="of the billion parameters (default 1; quick 0.25; dry run 1e-4)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds per case (default 20; quick 7; dry run 2)")
    parser.add_argument(
        "--parity", choices=("quick", "full"), help="rules compared first (default full; quick: what is timed)"
    )
    record.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench gpu: no CUDA device here; nothing was measured")
    if device == "cpu":
        torch.set_num_threads(1)  # a dry run beside other work
    end = record.end_of(arguments)
    warnings.simplefilter("ignore", precond.PrecisionWarning)  # 16-bit states are what is timed
    short = arguments.quick or device == "cpu"
    scale = arguments.scale or (1e-4 if device == "cpu" else 0.25 if short else 1.0)
    rounds = arguments.rounds or (2 if device == "cpu" else 7 if short else 20)
    tier = arguments.parity or ("quick" if short else "full")
    settings = {"scale": scale, "rounds": rounds, "quick": arguments.quick}
    # A record of other sizes never replaces the full one.
    suffix = "-quick" if arguments.quick else "" if device == "cpu" or scale == 1 else f"-scale-{scale:g}"
    path = arguments.out / f"{stem(device)}{suffix}.json"
    results = record.Record(path, timing.environment() | device_facts(device), settings, fresh=arguments.fresh)
    by_name = {case.name: case for case in cases(scale, device)}
    names = record.chosen(by_name, arguments.only)
    clock = timing.Clock(device)
    if all(results.has(name) for name in names):
        print(f"0 of {len(names)} cases to measure, the others are in {path}")
    else:
        measure(results, {name: by_name[name] for name in names}, clock, arguments, (scale, rounds, tier, end))
    known = results.results(by_name)
    text = page(results.run, table(known))
    if others := results.others(by_name):
        text += f"\n{others}"
    record.write(path.with_suffix(".md"), text)
    print(f"{text}\nwritten to {path}")
    failed = results.failed(names) + sorted(
        f"{result['case']}, {name}"
        for result in known
        if result["case"] in names
        for name, row in result.get("contenders", {}).items()
        if "error" in row and name.startswith("precond ")
    )
    if failed:
        raise SystemExit(f"bench gpu: failed: {'; '.join(failed)}")


def measure(
    results: record.Record,
    wanted: dict[str, Case],
    clock: timing.Clock,
    arguments: argparse.Namespace,
    how: tuple[float, int, str, float | None],
) -> None:
    """Parity, the copy, and the cases that are not known yet."""
    scale, rounds, tier, end = how
    device = arguments.device
    standing = {"precond cuda": "cuda", "precond triton": "triton"}
    refused = {
        name: why for name, backend in standing.items() if device == "cuda" and (why := _backend.why_not(backend))
    }
    backends = {
        name: (backend, "cuda") if device == "cuda" else ("cpu", "cpu")
        for name, backend in standing.items()
        if name not in refused
    }
    # Once for an environment: a run that goes on after a cut has its answer in the file.
    if not {"full", tier} & set(results.run.get("parity", [])):
        wrong = gpu_parity.wrong_backends(backends, tier)
        for name, why in wrong.items():
            print(f"{name}: {why}", flush=True)
        refused |= wrong
        if not wrong:
            results.run["parity"] = [*results.run.get("parity", []), tier]
            results.save()
    copy = copy_bandwidth(clock, device, int(5e8 * scale) + 1024)
    results.run["copy_gb_per_s"] = copy
    results.run["clocks_sm_and_memory"] = nvidia_smi("clocks.sm,clocks.mem")
    print(f"copy: {copy:.0f} GB/s", flush=True)

    def timed(case: Case) -> dict[str, Any]:
        try:
            return run_case(case, clock, device, rounds, copy, refused)
        finally:
            if clock.gpu:
                torch.cuda.empty_cache()

    results.measure({name: functools.partial(timed, case) for name, case in wanted.items()}, line, end=end)
