"""A step of Muon on shards, on paper: what each rank sends and multiplies, for a model on a mesh. It makes the plan that the
optimizer makes, from the same shards, and times nothing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from precond._methods.owners import Entry, Plan
from precond._methods.placed import spread_of
from precond._methods.units import matrices_of

#: Newton-Schulz steps; operations of a matrix of m by n are 5 (4 m^2 n + 2 m^3), m <= n.
NS_STEPS = 5
#: Layers, and the matrices of one: name, rows, columns, and the dimension that tensor parallelism cuts.
Model = tuple[int, tuple[tuple[str, int, int, int], ...]]


def llama(layers: int, width: int, hidden: int, kv: int = 1024) -> Model:
    """A model of Llama 3's shapes."""
    attention = (("q", width, width, 0), ("k", kv, width, 0), ("v", kv, width, 0), ("o", width, width, 1))
    return layers, (*attention, ("gate", hidden, width, 0), ("up", hidden, width, 0), ("down", width, hidden, 1))


MODELS = {"llama-70b": llama(80, 8192, 28672), "llama-8b": llama(32, 4096, 14336)}
#: Bytes of an element on its way, bfloat16.
ITEMSIZE = 2


class Sharded(NamedTuple):
    """A matrix and how a mesh has it."""

    name: str
    shape: tuple[int, int]
    placements: tuple[Any, ...]


def fsdp(model: str) -> list[Sharded]:
    """FSDP2 on a mesh of one dimension."""
    return _each(model, lambda _: (Shard(0),))


def hsdp(model: str) -> list[Sharded]:
    """Replicas by shards."""
    return _each(model, lambda _: (Replicate(), Shard(0)))


def fsdp_over_tp(model: str, tp: int) -> list[Sharded]:
    """FSDP2 by tensor parallelism, as torch places them."""
    return _each(model, lambda dim: (Shard(0) if dim else _StridedShard(0, split_factor=tp), Shard(dim)))


def _each(model: str, placed: Any) -> list[Sharded]:
    layers, matrices = MODELS[model]
    return [
        Sharded(f"layers.{layer:03}.{name}", (rows, columns), placed(dim))
        for layer in range(layers)
        for name, rows, columns, dim in matrices
    ]


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
    elements = sum(rows * columns for _, (rows, columns), _ in matrices)
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
    parser.add_argument("--model", choices=list(MODELS), default="llama-70b")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--replicas", type=int, default=8, help="rows of the mesh of HSDP; divides the ranks")
    parser.add_argument("--tp", type=int, default=4, help="of the mesh with tensor parallelism; divides the ranks")


def run(arguments: argparse.Namespace) -> None:
    model, ranks, replicas, tp = arguments.model, arguments.ranks, arguments.replicas, arguments.tp
    for name, size in (("replicas", replicas), ("tp", tp)):
        if size < 1 or ranks % size:
            raise SystemExit(f"--{name} must divide the {ranks} ranks, got {size}")
    meshes: dict[str, tuple[list[Sharded], tuple[int, ...]]] = {
        f"FSDP2 {ranks}": (fsdp(model), (ranks,)),
        f"HSDP {replicas} x {ranks // replicas}": (hsdp(model), (replicas, ranks // replicas)),
        f"FSDP2 {ranks // tp} x TP {tp}": (fsdp_over_tp(model, tp), (ranks // tp, tp)),
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
