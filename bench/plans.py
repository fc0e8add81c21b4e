"""Host time and memory of the plans of a rank: of the compiled plan of AdamW for the shards of a large model, and of owners for
Muon. Kernels do not run. Addresses are real, in memory that is reserved and never written; one process, with one thread, stands
for the first rank.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import mmap
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import precond
from precond._core import executors
from precond._methods.exchange import Exchange

from . import memory, record, timing
from .models import MODELS, Engine, Weight, experts, experts_apart, fsdp

#: Of Linux: no memory is set aside for pages that nobody touches.
NORESERVE = 0x4000
ROUNDS, QUICK_ROUNDS = 15, 3


class Untouched:
    """Tensors at addresses of their own, whose memory is never written. A new plan reads the scales of codes, on a CPU."""

    def __init__(self, total: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        self._bytes = torch.frombuffer(mmap.mmap(-1, total, flags=flags), dtype=torch.uint8)
        self._used = 0

    def tensor(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """The next one."""
        shape = tuple(shape)
        size = math.prod(shape) * dtype.itemsize
        begin, self._used = self._used, self._used + -(-size // 64) * 64
        return self._bytes[begin : begin + size].view(dtype).view(shape)


def states_of(p: torch.Tensor, whole: tuple[int, ...], kind: memory.Kind, made: Any) -> dict[str, Any]:
    """AdamW's of a parameter; ``made`` gives a tensor of a local shape, placed as the parameter."""
    found: dict[str, Any] = {"step": torch.tensor(1.0)}
    coded = kind.state_format == "int8" and memory.takes_codes(whole)
    for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        found[name] = made(p.shape, dtype if coded else torch.float32, whole)
        if coded:
            row = math.prod(p.shape[1:]) // memory.GROUP
            scale = made((p.shape[0], row), torch.bfloat16, (whole[0], math.prod(whole[1:]) // memory.GROUP))
            found[f"{name}_scale"] = scale
    if kind.weight_format == "split24":
        found |= {"remainder": made(p.shape, torch.int8, whole), "key": hash(whole) & 0xFFFF}
    return found


def optimizer_on(weights: list[Weight], engine: Engine, kind: memory.Kind, *, wrapped: bool) -> tuple[Any, Untouched]:
    """AdamW with states and gradients for what the first rank has; ``wrapped``: as DTensors, as under FSDP2."""
    room = Untouched(1 << 40)
    meshes: dict[tuple[int, ...], Any] = {}
    named, states = [], {}
    for weight in weights:
        mesh, placements = placed = engine(weight)
        if wrapped and mesh not in meshes:
            # A mesh of the first ranks, where experts have others.
            ranks = torch.arange(math.prod(mesh)).view(mesh)
            whole = math.prod(mesh) == dist.get_world_size()
            meshes[mesh] = init_device_mesh("cpu", mesh) if whole else dist.device_mesh.DeviceMesh("cpu", ranks)

        def made(
            shape: Any, dtype: torch.dtype, whole: tuple[int, ...], mesh: Any = mesh, placements: Any = placements
        ) -> Any:
            t = room.tensor(shape, dtype)
            if not wrapped:
                return t
            stride = torch.empty(whole, device="meta").stride()
            return DTensor.from_local(
                t, meshes[mesh], placements, run_check=False, shape=torch.Size(whole), stride=stride
            )

        here = placed.here(weight.shape, 0)
        p = nn.Parameter(made(here, kind.dtype, weight.shape))
        p.grad = made(here, kind.dtype, weight.shape)
        plain = torch.empty(here, device="meta")
        named.append((weight.name, p))
        states[p] = states_of(plain, weight.shape, kind, made)
    optimizer = precond.AdamW(named, state_format=kind.state_format, weight_format=kind.weight_format)
    optimizer.state.update(states)
    return optimizer, room


def ms(call: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None) -> list[float]:
    """Milliseconds of each of some calls."""
    found = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def resident() -> int:
    """Bytes that the process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and quartiles."""
    return {
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "ms_quartiles": {name: statistics.quantiles(values, n=4)[::2] for name, values in times.items()},
    }


def compiled(weights: list[Weight], engine: Engine, kind: memory.Kind, rounds: int, *, wrapped: bool) -> dict[str, Any]:
    """A new plan, and a step that finds its plan, both without the kernels; and what a plan holds."""
    optimizer, room = optimizer_on(weights, engine, kind, wrapped=wrapped)
    run = executors.Compiled.run
    executors.Compiled.run = lambda *_: True  # type: ignore[method-assign]
    try:
        optimizer.step()
        gc.collect()
        before = resident()
        kept = []
        for _ in range(4):  # so many, since one is less than what comes and goes
            optimizer.engine.forget_plans()
            optimizer.step()
            kept.append(optimizer.engine.plans)
        held = (resident() - before) / len(kept)
        kept.clear()
        times = {
            "new plan": ms(optimizer.step, rounds, optimizer.engine.forget_plans),
            "step": ms(optimizer.step, 4 * rounds),
        }
    finally:
        executors.Compiled.run = run  # type: ignore[method-assign]
    return summary(times) | {"tensors": len(weights), "plan_bytes": held, "reserved_bytes": room._used}


def owners(weights: list[Weight], engine: Engine, rounds: int) -> dict[str, Any]:
    """Who orthogonalises what, which all ranks find at the first step, and one rank's part of it."""
    kind = memory.Kind("muon")
    found: dict[str, Any] = {}

    def plan() -> None:
        memory.shared.cache_clear()
        memory.spread_of.cache_clear()
        (found["members"],) = memory.shared(tuple(weights), engine, kind)

    def exchange() -> None:
        of = found["members"].plan
        found["exchange"] = Exchange(of, dist.group.WORLD, dict.fromkeys(range(len(of.entries)), 0))

    times = {"plan of owners": ms(plan, rounds), "exchange": ms(exchange, rounds)}
    return summary(times) | {"tensors": len(found["members"].weights), "matrices": len(found["members"].plan.assigned)}


def cases(rounds: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Those of the page."""
    formats = {name: memory.KINDS[name] for name in ("AdamW, fp32", "AdamW, bf16 split24 + int8")}
    kimi = MODELS["kimi-k2"]()
    censuses: dict[str, tuple[list[Weight], Engine, int]] = {
        "llama-70b, FSDP2 64": (MODELS["llama-70b"](), fsdp(64), 64),
        "kimi-k2, experts in batches on 64 x FSDP2 16": (kimi, experts(64, 16), 1024),
        "kimi-k2, experts apart on 64 x FSDP2 16": (*experts_apart(64, 16, kimi), 1024),
        "kimi-k2, experts apart on 8 x FSDP2 128": (*experts_apart(8, 128, kimi), 1024),
    }
    found: dict[str, Callable[[], dict[str, Any]]] = {}

    def on(ranks: int, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        try:
            return measure()
        finally:
            dist.destroy_process_group()

    for census, (weights, engine, ranks) in censuses.items():
        for name, kind in formats.items():
            for wrapped in (False, True):
                measure = functools.partial(compiled, weights, engine, kind, rounds, wrapped=wrapped)
                what = "DTensors" if wrapped else "plain tensors"
                found[f"{name}, {census}, {what}"] = functools.partial(on, ranks, measure)
    for ranks in (64, 1024):
        dense = MODELS["llama-70b"]()
        measure = functools.partial(owners, dense, fsdp(ranks), min(rounds, 5))
        found[f"Muon's owners, llama-70b, FSDP2 {ranks}"] = functools.partial(on, ranks, measure)
    measure = functools.partial(owners, kimi, experts(64, 16), min(rounds, 3))
    found["Muon's owners, kimi-k2, experts in batches on 64 x FSDP2 16"] = functools.partial(on, 1024, measure)
    return found


def line(result: dict[str, Any]) -> str:
    """A case in one line."""
    times = (
        f"{name} {value:.3g} ({low:.3g} to {high:.3g}) ms"
        for (name, value), (low, high) in zip(result["ms"].items(), result["ms_quartiles"].values(), strict=True)
    )
    size = f"; {result['plan_bytes'] / 1e6:.2f} MB" if "plan_bytes" in result else ""
    return f"{result['tensors']} tensors, {', '.join(times)}{size}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    end = record.end_of(arguments)
    torch.set_num_threads(1)
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    path = arguments.out / f"plans{'-quick' if arguments.quick else ''}.json"
    results = record.Record(path, timing.environment(), {"rounds": rounds}, fresh=arguments.fresh)
    measures = cases(rounds)
    names = record.chosen(measures, arguments.only)
    results.measure({name: measures[name] for name in names}, line, end=end)
    if failed := results.failed(names):
        raise SystemExit(f"bench plans: failed: {'; '.join(failed)}")
