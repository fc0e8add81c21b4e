"""What the host takes beside the kernels: for DTensor parameters, on a mesh of one process, and for released gradients."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import AdamW

import precond

from . import timing

COUNT, SHAPE = 1000, (8, 8)
#: Of sharded to plain parameters, by the same class.
LIMIT = 1.3


def _parameters(mesh: object) -> list[torch.nn.Parameter]:
    """Plain ones where there is no mesh."""
    made = []
    for _ in range(COUNT):
        p, g = torch.randn(SHAPE), torch.randn(SHAPE)
        if mesh is not None:
            p, g = (distribute_tensor(t, mesh, [Shard(0)]) for t in (p, g))
        made.append(torch.nn.Parameter(p))
        made[-1].grad = g
    return made


def of_shards(seconds: float) -> dict[str, object]:
    """Steps of sharded and of plain parameters, of ours and of torch's."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            calls: dict[str, Callable[[], object]] = {}
            contenders = {
                "precond": (precond.AdamW, {}),
                "torch fused": (AdamW, {"fused": True}),
                "torch foreach": (AdamW, {"foreach": True}),
            }
            for name, (cls, options) in contenders.items():
                for kind, of in (("plain", None), ("sharded", mesh)):
                    optimizer = cls(_parameters(of), **options)
                    optimizer.step()
                    calls[f"{name} {kind}"] = optimizer.step
            times = timing.interleaved(calls, seconds)
        finally:
            dist.destroy_process_group()
    ratios = {name: timing.ratio(times, f"{name} sharded", f"{name} plain") for name in contenders}
    return {
        "ms": {name: statistics.median(values) * 1e3 for name, values in times.items()},
        "ms_quartiles": timing.ms_quartiles(times),
        "ratios": ratios,
        "targets": [
            {
                "of": "precond sharded",
                "to": "precond plain",
                "ratio": ratios["precond"],
                "target": LIMIT,
                "met": ratios["precond"] <= LIMIT,
            }
        ],
    }


def of_releases(seconds: float) -> dict[str, object]:
    """A backward pass and a step, released and not: microseconds for each parameter."""
    count, calls = 500, {}
    for name, released, options in (
        ("step", False, {}),
        ("released", True, {}),
        ("step, clipped", False, {"max_grad_norm": 1.0}),
        ("released, clipped", True, {"max_grad_norm": 1.0}),
    ):
        params = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(SHAPE)) for _ in range(count)])
        optimizer = precond.AdamW(params.parameters(), **options)
        if released:
            precond.release_gradients(params, optimizer, clip="previous" if options else None)

        def call(params: Any = params, optimizer: Any = optimizer) -> None:
            torch.stack([p.square().sum() for p in params]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        calls[name] = call
    times = timing.interleaved(calls, seconds)
    return {
        "us per parameter": {name: statistics.median(values) * 1e6 / count for name, values in times.items()},
        "ms_quartiles": timing.ms_quartiles(times),
        "targets": [],
    }
