"""What the host takes beside the kernels: for DTensor parameters, on a mesh of one process, and for released gradients. And what
it updates for a device, against DeepSpeed.
"""

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


#: Parameters that the host updates for a device, and goals: of the bytes of a copy per second, and of DeepSpeed's time.
OFFLOADED, OF_COPY, OF_DEEPSPEED = (32 << 10, 1 << 10), 0.85, 1 / 3


def of_offload(seconds: float, copy: float) -> dict[str, object]:
    """The host's part of an offloaded step of bfloat16 parameters: the CPU backend, against DeepSpeed's ``CPUAdam``, whose
    extension is compiled here. ``copy``: GB/s of torch's.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    def ours(**options: Any) -> Callable[..., Any]:
        return lambda params: precond.AdamW(params, **options)

    # Bytes that a step reads and writes of a parameter.
    contenders = {
        "precond split24 + int8": (ours(weight_format="split24", state_format="int8"), 12.25),
        "precond stochastic + int8": (ours(weight_format="stochastic", state_format="int8"), 10.06),
        "precond, fp32 states": (ours(state_format="fp32"), 22.0),
        "DeepSpeed, fp32 states": (DeepSpeedCPUAdam, 22.0),
        "DeepSpeed, bf16 states": (lambda params: DeepSpeedCPUAdam(params, fp32_optimizer_states=False), 14.0),
    }
    calls = {}
    for name, (make, _) in contenders.items():
        p = torch.nn.Parameter(torch.randn(OFFLOADED).bfloat16())
        p.grad = torch.randn(OFFLOADED).bfloat16()
        calls[name] = make([p]).step
    times = timing.interleaved(calls, seconds)
    elements = torch.Size(OFFLOADED).numel()
    speed = {
        name: elements * size / statistics.median(times[name]) / 1e9 / copy for name, (_, size) in contenders.items()
    }
    best = "precond split24 + int8"
    of_copy = {
        "of": f"{best}, per byte of a copy",
        "ratio": 1 / speed[best],
        "target": 1 / OF_COPY,
        "met": speed[best] >= OF_COPY,
    }
    ratios = {name: timing.ratio(times, best, name) for name in contenders if name.startswith("DeepSpeed")}
    return {
        "ms": {name: statistics.median(values) * 1e3 for name, values in times.items()},
        "ms_quartiles": timing.ms_quartiles(times),
        "of a copy": speed,
        "percent_of_copy": 100 * speed[best],
        "gb_per_s": copy * speed[best],
        "targets": [
            {"of": best, "to": name, "ratio": r, "target": OF_DEEPSPEED, "met": r <= OF_DEEPSPEED}
            for name, r in ratios.items()
        ]
        + [of_copy],
    }
