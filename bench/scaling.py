"""A step of Muon on shards, on paper: what each rank sends and multiplies, for a model on a mesh; with --memory, the bytes that a
rank has of each kind of optimizer. It makes the plan that the optimizer makes, from the same shards, and times nothing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from precond._methods.owners import Entry, Plan
from precond._methods.placed import spread_of
from precond._methods.units import matrices_of

from . import memory
from .models import MODELS, Engine, fsdp, fsdp_over_tp, hsdp

#: Newton-Schulz steps; operations of a matrix of m by n are 5 (4 m^2 n + 2 m^3), m <= n.
NS_STEPS = 5
#: Bytes of an element on its way, bfloat16.
ITEMSIZE = 2


class Sharded(NamedTuple):
    """A matrix, or a batch of them, and how a mesh has it."""

    name: str
    shape: tuple[int, ...]
    placements: tuple[Any, ...]


def matrices_on(model: str, engine: Engine) -> list[Sharded]:
    """The hidden matrices of a model, as an engine places them."""
    matrices = [weight for weight in MODELS[model]() if weight.role == "matrix"]
    return [Sharded(weight.name, weight.shape, engine(weight).placements) for weight in matrices]


def plan_of(matrices: Sequence[Sharded], mesh: tuple[int, ...]) -> Plan:
    """The plan that all ranks of a mesh make."""
    everywhere = tuple(itertools.product(*map(range, mesh)))
    entries = []
    for name, shape, placements in sorted(matrices, key=lambda matrix: matrix.name):
        pieces, replicas = spread_of(shape, placements, mesh, everywhere, None)
        of = matrices_of(shape, None, None, name)
        entries.append(Entry(name, shape, str(placements), of, pieces, replicas))
    return Plan(entries, len(everywhere), ITEMSIZE)


def figures(matrices: Sequence[Sharded], mesh: tuple[int, ...]) -> dict[str, float]:
    """What a plan costs: of a step and a rank, unless it says otherwise."""
    plan = plan_of(matrices, mesh)
    sent = plan.sent()
    there, back = ([each[way] for each in sent] for way in (0, 1))
    both = [sum(each) for each in sent]
    # 5 (4 m^2 n + 2 m^3) of a matrix that costs m^2 (2 n + m).
    operations = [2 * NS_STEPS * cost for cost in plan.costs]
    elements = sum(math.prod(matrix.shape) for matrix in matrices)
    placements = matrices[0].placements
    pieces = math.prod(size for size, one in zip(mesh, placements, strict=True) if not one.is_replicate())
    local = elements * ITEMSIZE / pieces
    batches: dict[tuple[int, int], int] = {}
    for a in plan.assigned:
        if a.batch is not None:
            place = a.owner, a.batch
            batches[place] = batches.get(place, 0) + a.unit.block.rows * a.unit.block.columns * a.unit.number * ITEMSIZE
    return {
        "matrices": len(plan.assigned),
        "elements": elements,
        "bytes of a rank's bfloat16 shards": local,
        "bytes sent, gradients, mean": statistics.mean(there),
        "bytes sent, results, mean": statistics.mean(back),
        "bytes sent, largest": max(both),
        "bytes sent per byte of shards, mean": statistics.mean(both) / local,
        "bytes sent per byte of shards, largest": max(both) / local,
        "operations, mean": statistics.mean(operations),
        "operations, largest": max(operations),
        "operations, largest over mean": max(operations) / statistics.mean(operations),
        "operations of everyone doing all": sum(operations),
        "all-to-alls": 2 * plan.batches,
        "bytes of an owner's largest batch": max(batches.values(), default=0),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(MODELS), help="default llama-70b; with --memory the three of the page")
    parser.add_argument("--memory", action="store_true", help="bytes of a rank instead, on the meshes of the page")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--replicas", type=int, default=8, help="rows of the mesh of HSDP; divides the ranks")
    parser.add_argument("--tp", type=int, default=4, help="of the mesh with tensor parallelism; divides the ranks")


def run(arguments: argparse.Namespace) -> None:
    if arguments.memory:
        chosen = list(memory.MESHES) if arguments.model is None else [arguments.model]
        if not set(chosen) <= set(memory.MESHES):
            raise SystemExit(f"--memory knows meshes for {', '.join(memory.MESHES)}, got --model {arguments.model}")
        print("\n".join(memory.tables(chosen)), end="")
        return
    model, ranks, replicas, tp = arguments.model or "llama-70b", arguments.ranks, arguments.replicas, arguments.tp
    for name, size in (("replicas", replicas), ("tp", tp)):
        if size < 1 or ranks % size:
            raise SystemExit(f"--{name} must divide the {ranks} ranks, got {size}")
    meshes: dict[str, tuple[list[Sharded], tuple[int, ...]]] = {
        f"FSDP2 {ranks}": (matrices_on(model, fsdp(ranks)), (ranks,)),
        f"HSDP {replicas} x {ranks // replicas}": (
            matrices_on(model, hsdp(replicas, ranks // replicas)),
            (replicas, ranks // replicas),
        ),
        f"FSDP2 {ranks // tp} x TP {tp}": (matrices_on(model, fsdp_over_tp(ranks // tp, tp)), (ranks // tp, tp)),
    }
    found = {name: figures(*of) for name, of in meshes.items()}
    print(f"| {model}, {ranks} ranks | {' | '.join(found)} |")
    print("|---" * (1 + len(found)) + "|")
    for row in next(iter(found.values())):
        print(f"| {row} | {' | '.join(written(each[row]) for each in found.values())} |")


def written(value: float) -> str:
    """Whole numbers below a million as they are, others in three digits."""
    if float(value).is_integer() and value < 1e6:
        return str(int(value))
    return f"{value:.2f}" if value < 1000 else f"{value:.2e}".replace("e+0", "e").replace("e+", "e")
