"""Speed of Muon's products on a GPU against torch's, with targets: Newton-Schulz of batches of matrices in bfloat16.

``torch`` is the iteration of ``torch.optim.Muon``, matrix by matrix; ``batched`` the same steps as batched products. First every
contender's directions are compared with float64 and with torch's; what is off is not timed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from precond._methods import newton_schulz

from . import gpu, orthogonal, record, timing

#: Count and shape of the matrices, and the target against torch's.
CENSUS = {"6 of 1024 x 8192": (6, 1024, 8192, 0.75), "6 of 8192 x 8192": (6, 8192, 8192, 0.75)}
OPTIONS = orthogonal.group()

Turn = Callable[[Tensor], Tensor]


def torchs(u: Tensor) -> Tensor:
    """torch's, one matrix after another."""
    return torch.stack([orthogonal.torchs(each, OPTIONS) for each in u])


def batched(u: Tensor) -> Tensor:
    """Ours without a kernel for symmetric products, one step a block: torch's operations."""
    with (
        mock.patch.object(newton_schulz, "kernels", return_value=None),
        mock.patch.object(newton_schulz, "blocks_of", lambda m, n, coefs, *_: [1] * len(coefs)),
    ):
        return newton_schulz.orthogonalized(u, OPTIONS)


def ours(method: str | None) -> Turn:
    """What Muon does."""
    return lambda u: newton_schulz.orthogonalized(u, {**OPTIONS, "method": method})


CONTENDERS: dict[str, Turn] = {"torch": torchs, "batched": batched, "precond": ours(None), "precond gram": ours("gram")}
#: By contender the method whose rounding it may have.
METHOD_OF = {"torch": None, "batched": None, "precond": None, "precond gram": "gram"}


def wrong(device: str) -> dict[str, str]:
    """Contenders whose directions are not those of float64 within their rounding, and by how much, at odd sizes too."""
    found: dict[str, str] = {}
    for shape in ((3, 96, 96), (2, 257, 1031), (2, 640, 2049)):
        u = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
        expected = torch.stack([orthogonal.expected(each, OPTIONS)[0] for each in u])

        def off(turn: Turn, u: Tensor = u, expected: Tensor = expected) -> float:
            return float((turn(u).double() - expected).norm() / expected.norm())

        limit = off(torchs)
        for name, turn in CONTENDERS.items():
            try:
                error = off(turn)
            except Exception as failed:
                found[name] = record.short(failed)
                continue
            if not error <= limit + orthogonal.MORE[METHOD_OF[name]]:
                found[name] = f"off by {error:.3f} of its norm at {shape}, torch's by {limit:.3f}"
    return found


def measure(
    name: str, device: str, scale: float, rounds: int, clock: timing.Clock, refused: dict[str, str]
) -> dict[str, Any]:
    """One census."""
    count, rows, columns, target = CENSUS[name]
    rows, columns = (max(16, int(n * scale)) for n in (rows, columns))
    u = torch.randn(count, rows, columns, device=device).bfloat16()
    calls = {what: functools.partial(turn, u) for what, turn in CONTENDERS.items() if what not in refused}
    times, broken = clock.interleaved(calls, rounds)
    contenders: dict[str, Any] = {what: {"error": why} for what, why in {**refused, **broken}.items()}
    operations = 5 * count * (4 * rows**2 * columns + 2 * rows**3)
    for what, found in times.items():
        ms = statistics.median(found.device)
        contenders[what] = {**found.summary(), "tflop_per_s_of_torchs_operations": operations / ms / 1e9}
    targets = [
        {
            "of": what,
            "to": "torch",
            "value": statistics.median(a / b for a, b in zip(found.device, times["torch"].device, strict=True)),
            "target": target,
        }
        for what, found in times.items()
        if what != "torch" and "torch" in times
    ]
    return {"contenders": contenders, "targets": [{**goal, "met": goal["value"] <= target} for goal in targets]}


def lines(results: list[dict[str, Any]]) -> Iterator[str]:
    """A table of results."""
    yield "| case | contender | device ms | host ms | Tflop/s of torch's operations | of torch |"
    yield "|---|---|---|---|---|---|"
    for result in results:
        ratios = {goal["of"]: goal for goal in result.get("targets", [])}
        for name, row in result.get("contenders", {"": result}).items():
            if "error" in row:
                yield f"| {result['case']} | {name} | {row['error'].replace('|', '/')} | | | |"
                continue
            goal = ratios.get(name)
            of = (
                ""
                if goal is None
                else f"{goal['value']:.3f} (<= {goal['target']}: {'met' if goal['met'] else 'missed'})"
            )
            flops = row["tflop_per_s_of_torchs_operations"]
            yield f"| {result['case']} | {name} | {row['device_ms']:.3f} | {row['host_ms']:.3f} | {flops:.0f} | {of} |"


def line(result: dict[str, Any]) -> str:
    """A case in one line, for the log."""
    return "; ".join(
        f"{name} {row['error'] if 'error' in row else format(row['device_ms'], '.3f') + ' ms'}"
        for name, row in result["contenders"].items()
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run, times mean nothing")
    parser.add_argument("--scale", type=float, help="of the sides (default 1; dry run 1/64)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds per case (default 10; dry run 2)")
    record.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench products: no CUDA device here; nothing was measured")
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit("bench products: torch.optim.Muon is of torch 2.9 and later; nothing was measured")
    scale = arguments.scale or (1.0 if device == "cuda" else 1 / 64)
    rounds = arguments.rounds or (10 if device == "cuda" else 2)
    path = arguments.out / f"{gpu.stem(device)}-products.json"
    settings = {"scale": scale, "rounds": rounds}
    results = record.Record(path, timing.environment() | gpu.device_facts(device), settings, fresh=arguments.fresh)
    names = record.chosen(CENSUS, arguments.only)
    refused = wrong(device)
    for name, why in refused.items():
        print(f"{name}: {why}", flush=True)
    clock = timing.Clock(device)
    measures = {name: functools.partial(measure, name, device, scale, rounds, clock, refused) for name in names}
    results.measure(measures, line, end=record.end_of(arguments))
    text = "\n".join(lines(results.results(CENSUS)))
    print(f"\n{results.run}\n\n{text}\n\nwritten to {path}")
    if failed := results.failed(names) + [name for name in refused if name.startswith("precond")]:
        raise SystemExit(f"bench products: failed: {'; '.join(failed)}")
