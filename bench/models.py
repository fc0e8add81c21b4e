"""The weights of public models by their shapes, and how meshes have them: for scaling.py, memory.py and plans.py."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from precond._methods.placed import indices_of


class Weight(NamedTuple):
    """A parameter: what it is for an optimizer, and which dimension tensor parallelism cuts."""

    name: str
    shape: tuple[int, ...]
    #: "matrix": hidden; "experts": a batch of these; "rest": embeddings, the head, gains.
    role: str
    cut: int | None = None


def llama(layers: int, width: int, hidden: int, kv: int, vocabulary: int) -> list[Weight]:
    """A model of Llama's shapes."""
    found = [Weight("embedding", (vocabulary, width), "rest", 0)]
    for layer in range(layers):
        of = f"layers.{layer:03}"
        for name, rows, columns, cut in (
            ("q", width, width, 0),
            ("k", kv, width, 0),
            ("v", kv, width, 0),
            ("o", width, width, 1),
            ("gate", hidden, width, 0),
            ("up", hidden, width, 0),
            ("down", width, hidden, 1),
        ):
            found.append(Weight(f"{of}.{name}", (rows, columns), "matrix", cut))
        found += [Weight(f"{of}.{name}", (width,), "rest") for name in ("attention_norm", "mlp_norm")]
    return [*found, Weight("norm", (width,), "rest"), Weight("head", (vocabulary, width), "rest", 0)]


def kimi_k2() -> list[Weight]:
    """Kimi K2: DeepSeek-V3's architecture of 61 layers, the first one dense, the others with 384 experts and a shared one."""
    width, heads, q_rank, kv_rank, experts, hidden = 7168, 64, 1536, 512, 384, 2048
    nope, rope, value = 128, 64, 128
    found = [Weight("embedding", (163840, width), "rest", 0)]
    for layer in range(61):
        of = f"layers.{layer:03}"
        found += [
            Weight(f"{of}.q_a", (q_rank, width), "matrix"),
            Weight(f"{of}.q_b", (heads * (nope + rope), q_rank), "matrix", 0),
            Weight(f"{of}.kv_a", (kv_rank + rope, width), "matrix"),
            Weight(f"{of}.kv_b", (heads * (nope + value), kv_rank), "matrix", 0),
            Weight(f"{of}.o", (width, heads * value), "matrix", 1),
            *(
                Weight(f"{of}.{name}_norm", (size,), "rest")
                for name, size in (("q_a", q_rank), ("kv_a", kv_rank), ("attention", width), ("mlp", width))
            ),
        ]
        dense = 18432 if layer == 0 else hidden
        kind = "mlp" if layer == 0 else "shared"
        found += [Weight(f"{of}.{kind}.{name}", (dense, width), "matrix", 0) for name in ("gate", "up")]
        found.append(Weight(f"{of}.{kind}.down", (width, dense), "matrix", 1))
        if layer > 0:
            found.append(Weight(f"{of}.router", (experts, width), "rest"))
            found += [Weight(f"{of}.experts.{name}", (experts, hidden, width), "experts") for name in ("gate", "up")]
            found.append(Weight(f"{of}.experts.down", (experts, width, hidden), "experts"))
    return [*found, Weight("norm", (width,), "rest"), Weight("head", (163840, width), "rest", 0)]


MODELS: dict[str, Callable[[], list[Weight]]] = {
    "llama-70b": lambda: llama(80, 8192, 28672, 1024, 128256),
    "llama-8b": lambda: llama(32, 4096, 14336, 1024, 128256),
    "llama-7b": lambda: llama(32, 4096, 11008, 4096, 32000),
    "kimi-k2": kimi_k2,
}


class Placed(NamedTuple):
    """How ranks have a tensor: a mesh of all of them, and its placements."""

    mesh: tuple[int, ...]
    placements: tuple[Any, ...]

    @property
    def ranks(self) -> int:
        """All of them."""
        return math.prod(self.mesh)

    def here(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """What a rank has of a tensor."""
        return _here(self, shape)[rank]

    @property
    def shards(self) -> int:
        """How many pieces a tensor is cut into."""
        cut = zip(self.mesh, self.placements, strict=True)
        return math.prod(size for size, placement in cut if not placement.is_replicate())


@functools.cache
def _here(placed: Placed, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    everywhere = itertools.product(*map(range, placed.mesh))
    return tuple(
        tuple(len(each) for each in indices_of(shape, placed.placements, placed.mesh, here)) for here in everywhere
    )


#: How a mesh has each weight.
Engine = Callable[[Weight], Placed]


def ddp(ranks: int) -> Engine:
    """DDP: all have everything."""
    return lambda _: Placed((ranks,), (Replicate(),))


def fsdp(ranks: int) -> Engine:
    """FSDP2 on a mesh of one dimension."""
    return lambda _: Placed((ranks,), (Shard(0),))


def hsdp(replicas: int, shards: int) -> Engine:
    """Replicas by shards."""
    return lambda _: Placed((replicas, shards), (Replicate(), Shard(0)))


def fsdp_over_tp(shards: int, tp: int) -> Engine:
    """FSDP2 by tensor parallelism, as torch places them."""

    def placed(weight: Weight) -> Placed:
        if weight.cut is None:
            return Placed((shards, tp), (Shard(0), Replicate()))
        first = Shard(0) if weight.cut else _StridedShard(0, split_factor=tp)
        return Placed((shards, tp), (first, Shard(weight.cut)))

    return placed


def experts(parallel: int, shards: int) -> Engine:
    """Experts spread over some ranks, whose rows FSDP2 cuts; all else by FSDP2 over all ranks."""

    def placed(weight: Weight) -> Placed:
        if weight.role == "experts":
            return Placed((parallel, shards), (Shard(0), Shard(1)))
        return Placed((parallel * shards,), (Shard(0),))

    return placed


def experts_apart(parallel: int, shards: int, weights: list[Weight]) -> tuple[list[Weight], Engine]:
    """The same where each expert is a parameter: what a rank knows of them are those of its row, on a mesh of that row."""
    found = []
    for weight in weights:
        if weight.role != "experts":
            found.append(weight)
            continue
        number, *shape = weight.shape
        found += [Weight(f"{weight.name}.{e}", tuple(shape), "expert") for e in range(number // parallel)]

    def placed(weight: Weight) -> Placed:
        return Placed((shards if weight.role == "expert" else parallel * shards,), (Shard(0),))

    return found, placed
