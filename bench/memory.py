"""Bytes of a rank: weights, gradients, states, and what a step needs besides, by a formula for each kind of optimizer. Called by
scaling.py; a test holds the formulas to the bytes of real optimizers on real ranks.

It makes the plans that optimizers make and allocates nothing.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import Replicate

from precond._core.formats.layout import SMALLEST_CODED
from precond._core.formats.names import GROUP, STATE_FORMATS
from precond._methods.kronecker import _BATCH_ELSEWHERE
from precond._methods.newton_schulz import CHUNK
from precond._methods.owners import Entry, Plan
from precond._methods.placed import spread_of
from precond._methods.rotated import _weight
from precond._methods.units import matrices_of, seen
from precond.bases import blocks

from .models import MODELS, Engine, Placed, Weight, ddp, experts, experts_apart, fsdp, fsdp_over_tp, hsdp

Shape = tuple[int, ...]
#: Of a step counter; of numbers in float32, and of what Muon multiplies.
STEP, WIDE, HALF = 4, 4, 2


class Kind(NamedTuple):
    """An optimizer: what steps hidden matrices, AdamW all else; and the formats of all parameters."""

    matrices: str = "adamw"
    dtype: torch.dtype = torch.float32
    state_format: str | None = None
    weight_format: str | None = None
    ema_format: str | None = None
    #: Of SOAP.
    one_sided: bool = False
    longest: int = 10000
    frequency: int = 10

    @property
    def is_split(self) -> bool:
        """True where 16-bit weights have remainders, or draw random bits."""
        return self.weight_format in ("stochastic", "split24") and self.dtype.itemsize == HALF


KINDS = {
    "AdamW, fp32": Kind(),
    "AdamW, bf16 with fp32 states": Kind(dtype=torch.bfloat16, state_format="fp32"),
    "AdamW, bf16 split24 + int8": Kind(dtype=torch.bfloat16, state_format="int8", weight_format="split24"),
    "Muon + AdamW, fp32": Kind("muon"),
    "Muon + AdamW, bf16 split24 + int8": Kind("muon", torch.bfloat16, "int8", "split24"),
    "SOAP + AdamW, fp32": Kind("soap"),
    "SOAP one-sided + AdamW, fp32": Kind("soap", one_sided=True),
}


class Bytes(NamedTuple):
    """Of a rank."""

    weights: int = 0
    gradients: int = 0
    states: int = 0
    #: Buffers that stay from step to step, in no checkpoint.
    buffers: int = 0
    #: What a step allocates and frees: at most so much at once.
    step: int = 0

    def __add__(self, other: tuple[int, ...]) -> Bytes:  # type: ignore[override]
        return Bytes(*(a + b for a, b in zip(self, other, strict=True)))


# One formula for each kind of state. ``here`` is what a rank has of a tensor of shape ``whole``.


def takes_codes(whole: Shape) -> bool:
    """True where codes are used: parameters of two dimensions or more, of some size, with rows that groups fill."""
    return len(whole) > 1 and math.prod(whole) >= SMALLEST_CODED and math.prod(whole[1:]) % GROUP == 0


def state(here: Shape, whole: Shape, state_format: str | None, dtype: torch.dtype) -> int:
    """A mean, a second moment or an average."""
    n = math.prod(here)
    if state_format is None:
        return n * dtype.itemsize
    stored = STATE_FORMATS[state_format]
    if not isinstance(stored, str):
        return n * stored.itemsize
    if not takes_codes(whole):
        return n * WIDE
    codes = n if state_format == "int8" else n // 2
    return codes + n // GROUP * torch.bfloat16.itemsize


def beside(here: Shape, whole: Shape, kind: Kind) -> int:
    """The remainder of a split weight, and its average."""
    half = kind.dtype.itemsize == HALF
    per = {"split24": 1, "split32": 2}.get(kind.weight_format or "", 0) if half else 0
    average = 0 if kind.ema_format is None else state(here, whole, kind.ema_format, kind.dtype)
    return per * math.prod(here) + average


def adamw(here: Shape, whole: Shape, kind: Kind) -> int:
    """Two states of the shard, and a counter."""
    return 2 * state(here, whole, kind.state_format, kind.dtype) + beside(here, whole, kind) + STEP


def draws(whole: Shape, kind: Kind, *, shard: bool = False) -> bool:
    """True where a matrix's weight, average or state is rounded stochastically; ``shard``: a state that shards have."""
    formats = {kind.ema_format} if shard else {kind.ema_format, kind.state_format}
    short = {"bf16", "fp16"} & (formats if kind.matrices == "soap" else {kind.ema_format})
    return kind.is_split or bool(short) or (takes_codes(whole) and bool(formats & {"int8", "int4"}))


def muon(here: Shape, whole: Shape, kind: Kind) -> int:
    """A state of the shard."""
    counter = STEP if draws(whole, kind) or kind.ema_format is not None else 0
    return state(here, whole, kind.state_format, kind.dtype) + beside(here, whole, kind) + counter


@functools.cache
def sides(whole: Shape, longest: int, one_sided: bool) -> collections.Counter[int]:
    """The lengths of the sides of SOAP's blocks that have a basis: those longer than 1; one-sided, the shorter one."""
    found: collections.Counter[int] = collections.Counter()
    for block in blocks(seen(whole, True)[1:], longest):
        rows, columns = (part.stop - part.start for part in block)
        if rows > 1 and not (one_sided and columns < rows):
            found[rows] += 1
        if columns > 1 and not (one_sided and rows <= columns):
            found[columns] += 1
    return found


def held(whole: Shape, kind: Kind) -> int:
    """What the owner of a matrix alone has of SOAP's states, and a rank that has it whole: means, factors and bases."""
    squares = sum(2 * n * n * number * WIDE for n, number in sides(whole, kind.longest, kind.one_sided).items())
    return 2 * state(whole, whole, kind.state_format, kind.dtype) + squares


def soap(here: Shape, whole: Shape, kind: Kind) -> int:
    """Of a matrix what each rank has, whoever owns it."""
    return beside(here, whole, kind) + STEP


def buffers(here: Shape, whole: Shape, kind: Kind) -> int:
    """Of a shard of a matrix: Muon's averages in bfloat16 or SOAP's directions in float32, and the copy of a counter that a
    second draw takes.
    """
    if kind.matrices == "muon":
        return math.prod(here) * HALF + (STEP if kind.ema_format is not None and draws(whole, kind) else 0)
    return math.prod(here) * WIDE + (STEP if draws(whole, kind, shard=True) else 0)


def coordinates(whole: Shape, kind: Kind, *, sharded: bool) -> int:
    """Where SOAP has the coordinates of a matrix that it holds, in float32, and a counter for each pass that draws."""
    counters = int(draws(whole, kind)) * (1 + (sharded and not draws(whole, kind, shard=True)))
    return math.prod(whole) * WIDE + STEP * counters


# What a step allocates.


def travelling(plan: Plan, kind: Kind) -> list[int]:
    """Of each rank the most that is there at once: what comes in this batch, all of the next one and of the results before, and
    work, or the results that leave.
    """
    gathers, returns = (collections.Counter[tuple[int, int]]() for _ in range(2))
    comes, stacks, work = (collections.Counter[tuple[int, int]]() for _ in range(3))
    alike: dict[tuple[int, int], collections.Counter[Shape]] = {}
    for a in plan.assigned:
        if a.batch is None:
            continue
        place = a.batch, a.owner
        alike.setdefault(place, collections.Counter())[a.unit.shape[1:]] += a.unit.number
        for rank in a.others(a.sources):
            size = a.holders[rank].numel * plan.itemsize
            gathers[a.batch, rank] += size
            gathers[place] += size
            comes[place] += size
        for rank in a.others(tuple(a.holders)):
            size = a.holders[rank].numel * plan.itemsize
            returns[a.batch, rank] += size
            returns[place] += size
    for place, shapes in alike.items():
        stacks[place] = sum(rows * columns * number * plan.itemsize for (rows, columns), number in shapes.items())
        work[place] = max(worked(shape, number, kind) for shape, number in shapes.items())
    return [
        max(
            (
                comes[b, rank]
                + gathers[b + 1, rank]
                + returns[b - 1, rank]
                + 2 * stacks[b, rank]
                + max(work[b, rank], returns[b, rank])
                for b in range(plan.batches)
            ),
            default=0,
        )
        for rank in range(plan.ranks)
    ]


def worked(shape: Shape, number: int, kind: Kind) -> int:
    """Work on matrices of one shape, besides them and their results."""
    if kind.matrices == "soap":  # coordinates, moves, directions and a batch's operands
        return number * 4 * math.prod(shape) * WIDE + refreshed(shape, number, kind)
    m, n = sorted(shape)
    return min(number, max(1, CHUNK // max(m * n, 1))) * (2 * m * n + 6 * m * m) * HALF


def refreshed(shape: Shape, number: int, kind: Kind) -> int:
    """A refresh has some ten squares for each basis of a batch."""
    found = sides(shape, kind.longest, kind.one_sided)
    at_once = {n: min(number * count, max(1, _BATCH_ELSEWHERE // (n * n))) for n, count in found.items()}
    return max((10 * n * n * count * WIDE for n, count in at_once.items()), default=0)


def whole_at_once(weights: Sequence[Weight], engine: Engine, kind: Kind) -> int:
    """Of a rank that has matrices whole: results of all of them, and work on those of one shape, or on all."""
    alike: collections.Counter[Shape] = collections.Counter()
    for weight in weights:
        if is_mapped(weight, kind) and engine(weight).shards == 1:
            number, *sizes = seen(weight.shape, kind.matrices == "soap")
            alike[tuple(sizes)] += number
    work = [worked(shape, number, kind) for shape, number in alike.items()]
    if kind.matrices == "soap":
        due = [refreshed(shape, number, kind) for shape, number in alike.items()]
        return sum(work) - sum(due) + max(due, default=0)
    return sum(math.prod(shape) * number * HALF for shape, number in alike.items()) + max(work, default=0)


# A rank.


class Members(NamedTuple):
    """The matrices that the ranks of one set share, by the numbers of their plan."""

    weights: list[Weight]
    plan: Plan


@functools.lru_cache(maxsize=4)
def shared(weights: tuple[Weight, ...], engine: Engine, kind: Kind) -> list[Members]:
    """Of each set of ranks the matrices that owners map."""
    alike: dict[int, list[Weight]] = {}
    for weight in weights:
        placed = engine(weight)
        if is_mapped(weight, kind) and placed.shards > 1:
            alike.setdefault(placed.ranks, []).append(weight)
    found = []
    for ranks, own in alike.items():
        own.sort(key=lambda weight: weight.name)
        entries = [entry(weight, engine(weight), kind) for weight in own]
        found.append(Members(own, Plan(entries, ranks, WIDE if kind.matrices == "soap" else HALF)))
    return found


def is_mapped(weight: Weight, kind: Kind) -> bool:
    """True for what the method of hidden matrices steps."""
    return kind.matrices != "adamw" and weight.role != "rest"


def entry(weight: Weight, placed: Placed, kind: Kind) -> Entry:
    """A matrix, or a batch of them, as owners are chosen for it."""
    flatten = kind.matrices == "soap"
    everywhere = tuple(itertools.product(*map(range, placed.mesh)))
    pieces, replicas = spread_of(weight.shape, placed.placements, placed.mesh, everywhere, flatten)
    of = matrices_of(weight.shape, flatten, None, weight.name)
    cost = 1.0
    if kind.matrices == "soap":
        cost = _weight(of.rows[0], of.columns[0], kind.frequency, kind.longest, kind.one_sided)
    return Entry(weight.name, weight.shape, str(placed.placements), of, pieces, replicas, cost)


def of_ranks(weights: Sequence[Weight], engine: Engine, kind: Kind) -> list[Bytes]:
    """What each rank has."""
    ranks = max(engine(weight).ranks for weight in weights)
    options = dict(one_sided=kind.one_sided, longest=kind.longest, frequency=kind.frequency)  # formats choose no owner
    found = [Bytes(step=whole_at_once(weights, engine, kind))] * ranks
    for weights_shared, plan in shared(tuple(weights), engine, Kind(kind.matrices, **options)):
        own = [Bytes(step=at_once) for at_once in travelling(plan, kind)]
        for a in plan.assigned if kind.matrices == "soap" else ():
            whole = weights_shared[a.unit.param].shape
            own[a.owner] += Bytes(states=held(whole, kind), buffers=coordinates(whole, kind, sharded=True))
        found = [each + own[rank % plan.ranks] for rank, each in enumerate(found)]
    alike = collections.Counter((engine(weight), weight.shape, is_mapped(weight, kind)) for weight in weights)
    for (placed, shape, mapped), number in alike.items():
        each = [in_place(placed, shape, rank, kind, mapped) for rank in range(placed.ranks)]
        found = [a + Bytes(*(number * n for n in each[rank % placed.ranks])) for rank, a in enumerate(found)]
    return found


def in_place(placed: Placed, whole: Shape, rank: int, kind: Kind, mapped: bool) -> Bytes:
    """What a rank has of its shard of a parameter."""
    here = placed.here(whole, rank)
    n = math.prod(here) * kind.dtype.itemsize
    if not mapped:
        return Bytes(n, n, adamw(here, whole, kind))
    if kind.matrices == "muon":
        return Bytes(n, n, muon(here, whole, kind), buffers(here, whole, kind))
    if placed.shards > 1:
        return Bytes(n, n, soap(here, whole, kind), buffers(here, whole, kind))
    states = soap(here, whole, kind) + held(whole, kind)
    return Bytes(n, n, states, coordinates(whole, kind, sharded=False))


def checkpoint(weights: Sequence[Weight], kind: Kind) -> int:
    """Bytes of the tensors in a checkpoint of the model and its optimizer, whatever the mesh: each once."""
    alone = Placed((1,), (Replicate(),))
    each = [in_place(alone, weight.shape, 0, kind, is_mapped(weight, kind)) for weight in weights]
    return sum(one.weights + one.states for one in each)


# The tables.

#: Experts on so many rows of so many ranks, or the ranks of FSDP2.
MESHES: dict[str, tuple[int, ...]] = {"llama-7b": (8,), "llama-70b": (64,), "kimi-k2": (64, 16)}


def tables(models: Sequence[str]) -> Iterator[str]:
    """Of each model what the rank with the most has, by kinds; then sums on other meshes, of models without experts."""
    for model in models:
        weights, mesh = MODELS[model](), MESHES[model]
        engine = fsdp(mesh[0]) if len(mesh) == 1 else experts(*mesh)
        name = f"FSDP2 {mesh[0]}" if len(mesh) == 1 else f"experts on {mesh[0]} x FSDP2 {mesh[1]}"
        rows = [row(kind, *apart_for(kind, weights, engine, mesh)) for kind in KINDS.values()]
        yield table(f"{model}, {name}", [*Bytes._fields, "sum", "checkpoint"], rows)
        if len(mesh) == 1:
            ranks = mesh[0]
            rows_of = 8 if ranks % 8 == 0 and ranks > 8 else 2
            engines = {
                name: engine,
                f"HSDP {rows_of} x {ranks // rows_of}": hsdp(rows_of, ranks // rows_of),
                f"FSDP2 {ranks // 4} x TP 4": fsdp_over_tp(ranks // 4, 4),
                f"DDP {ranks}": ddp(ranks),
            }
            sums = [
                [
                    max(map(sum, of_ranks(weights, on, kind))) if fits(weights, on, kind) else None
                    for on in engines.values()
                ]
                for kind in KINDS.values()
            ]
            yield table(f"{model}, sums", list(engines), sums)


def apart_for(
    kind: Kind, weights: list[Weight], engine: Engine, mesh: tuple[int, ...]
) -> tuple[list[Weight], Engine, list[Weight]]:
    """What SOAP steps of experts: each is a parameter. Last, all of them."""
    if kind.matrices != "soap" or len(mesh) == 1:
        return weights, engine, weights
    return *experts_apart(*mesh, weights), experts_apart(1, 1, weights)[0]


def fits(weights: Sequence[Weight], engine: Engine, kind: Kind) -> bool:
    """False where a format that numbers elements has shards that it does not number: those of FSDP2 over a cut of rows."""

    def is_strided(weight: Weight) -> bool:
        return any(type(each).__name__ == "_StridedShard" for each in engine(weight).placements)

    def is_plain(weight: Weight) -> bool:
        whole = kind.matrices == "soap" and is_mapped(weight, kind)  # its states are the owner's
        plain = (None, "fp32")
        return kind.weight_format is None and kind.ema_format in plain and (whole or kind.state_format in plain)

    return all(is_plain(weight) or not is_strided(weight) for weight in weights)


def row(kind: Kind, weights: list[Weight], engine: Engine, everything: list[Weight]) -> list[int]:
    """The bytes of the rank that has the most, their sum, and those of a checkpoint."""
    most = max(of_ranks(weights, engine, kind), key=sum)
    return [*most, sum(most), checkpoint(everything, kind)]


def table(title: str, columns: list[str], rows: Sequence[Sequence[int | None]]) -> str:
    """Gigabytes; a dash for what is refused."""
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, values in zip(KINDS, rows, strict=True):
        lines.append(f"| {name} | {' | '.join('-' if value is None else f'{value / 1e9:.2f}' for value in values)} |")
    return "\n".join(lines) + "\n"
