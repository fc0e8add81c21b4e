"""Training on two gloo ranks under DeepSpeed, torchtitan and Accelerate. Each function leaves its weights in the folder: runs of
precond's class, of torch's, and one that a checkpoint interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from families import CLASSES
from support.methods import ALL
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import precond

IMPLEMENTATIONS = ("for-loop", "foreach", "fused", "fused_opt_states_bf16")
#: What can step on flat shards of float32: all but those that ask for matrices, layers or a closure.
SHARDABLE = [
    m for m in ALL if not m.whole and not m.closure and m.dtype == torch.float32 and m.name not in ("dual_unit", "muon")
]

#: DeepSpeed replaces an instance of torch.optim.Adagrad by torch's own class: precond.Adagrad does not step there.
ZERO = [(method, 1) for method in SHARDABLE if method.name != "adagrad"]
ZERO += [(method, 3) for method in SHARDABLE if method.name in ("adamw", "adagradw", "lion", "dual_global", "fop")]
ZERO += [(method, stage) for method in SHARDABLE for stage in (0, 2) if method.name in ("adamw", "fop")]


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every rank has its own."""
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + step)
    return torch.randn(4, 8, generator=generator), torch.randn(4, 3, generator=generator)


def compared(train: Callable[..., Any], ours: Any, theirs: Any, folder: str) -> dict[str, Any]:
    """The weights of the runs that a test compares, or the error that stopped one."""
    try:
        return {
            "ours": train(ours),
            "theirs": None if theirs is None else train(theirs),
            "half": train(ours, stop=2, save=folder),
            "resumed": train(ours, start=2, load=folder),
        }
    except BaseException:  # as CheckpointException is
        return {"error": traceback.format_exc()}


def leave(results: dict[str, Any], folder: str) -> None:
    if dist.get_rank() == 0:
        torch.save(results, f"{folder}/results.pt")


def run_deepspeed(folder: str) -> None:
    import deepspeed

    deepspeed.logger.setLevel(logging.ERROR)
    # It would compile its all-reduce through shared memory; without, gloo reduces.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def train(make, stage, start=0, stop=4, load=None, save=None):
        net = model_of(0 if load is None else 99)
        config = dict(
            train_micro_batch_size_per_gpu=4,
            gradient_accumulation_steps=2,
            gradient_clipping=0.3,
            zero_allow_untested_optimizer=True,
            zero_optimization=dict(stage=stage),
        )
        engine, *_ = deepspeed.initialize(model=net, optimizer=make(net), config=config)
        if load is not None:
            engine.load_checkpoint(load)
        for step in range(2 * start, 2 * stop):
            x, y = data(step)
            engine.backward((engine(x) - y).square().mean())
            engine.step()
        if save is not None:
            engine.save_checkpoint(save)
        params = list(net.parameters())
        with deepspeed.zero.GatheredParameters(params) if stage == 3 else contextlib.nullcontext():
            return [p.detach().clone() for p in params]

    results = {}
    for method, stage in ZERO:

        def at_stage(make, stage=stage, **options):
            return train(make, stage, **options)

        results[f"{method}-{stage}"] = compared(at_stage, method.make, method.stock, f"{folder}/{method}-{stage}")
    leave(results, folder)


def run_torchtitan(folder: str) -> None:
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.components.optimizer.optimizer import ParamGroupConfig
    from torchtitan.tools.logging import logger

    logger.setLevel(logging.ERROR)

    class Ours(OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
            return getattr(precond, name)

    class Stock(OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
            return getattr(torch.optim, name)

    def train(container, row, implementation, start=0, stop=4, load=None, save=None):
        net = model_of(0 if load is None else 99)
        for module in (net[0], net[2], net):
            fully_shard(module)
        # torch's Adagrad takes it from the defaults alone, and these options are a group's.
        kwargs = {name: value for name, value in row.kwargs.items() if name != "initial_accumulator_value"}
        groups = [
            ParamGroupConfig(
                pattern=pattern, optimizer_name=row.cls.__name__, optimizer_kwargs=kwargs | {"weight_decay": decay}
            )
            for pattern, decay in (("bias$", 0.0), (".*", 0.1))
        ]
        config = OptimizersContainer.Config(implementation=implementation, param_groups=groups)
        optimizers = container(config, model_parts=[net])
        if load is not None:
            states = {"model": net.state_dict(), "optimizer": optimizers}
            dcp.load(states, checkpoint_id=load)
            net.load_state_dict(states["model"])
        for step in range(start, stop):
            x, y = data(step)
            (net(x) - y).square().mean().backward()
            optimizers.step()
            optimizers.zero_grad()
        if save is not None:
            dcp.save({"model": net.state_dict(), "optimizer": optimizers}, checkpoint_id=save)
        (optimizer,) = optimizers
        states = [optimizer.state[p][key] for p in net.parameters() for key in sorted(optimizer.state[p])]
        return [t.full_tensor() if isinstance(t, DTensor) else t.clone() for t in [*net.parameters(), *states]]

    results = {}
    for row in CLASSES:
        for implementation in IMPLEMENTATIONS if row.rule == "adamw" else ("for-loop",):

            def with_implementation(container, row=row, implementation=implementation, **options):
                return train(container, row, implementation, **options)

            # torch's fused AdamW takes moments of bfloat16 on a GPU alone.
            stock = Stock if row.peer is not None and implementation != "fused_opt_states_bf16" else None
            where = f"{folder}/{row}-{implementation}"
            results[f"{row}-{implementation}"] = compared(with_implementation, Ours, stock, where)
    leave(results, folder)


def run_accelerate(folder: str) -> None:
    """FSDP2: ``prepare`` puts stand-ins into the optimizer's groups, and later the sharded parameters."""
    import accelerate
    from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # asked for, and not used: the group is there

    def train(make, start=0, stop=4, load=None, save=None):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1
        )
        accelerator = accelerate.Accelerator(cpu=True)
        # On a CPU it would choose DistributedDataParallel.
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = accelerate.DistributedType.FSDP, plugin
        net = model_of(0 if load is None else 99)
        net, optimizer = accelerator.prepare(net, make(net))
        assert all(isinstance(p, DTensor) for p in net.parameters())
        if load is not None:
            load_fsdp_model(plugin, accelerator, net, load)
            load_fsdp_optimizer(plugin, accelerator, optimizer, net, load)
        for step in range(start, stop):
            x, y = data(step)
            accelerator.backward((net(x) - y).square().mean())
            accelerator.clip_grad_norm_(net.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
        if save is not None:
            Path(save).mkdir(exist_ok=True)
            save_fsdp_model(plugin, accelerator, net, save)
            save_fsdp_optimizer(plugin, accelerator, optimizer, net, save)
        return [p.detach().full_tensor() for p in net.parameters()]

    results = {}
    for method in SHARDABLE:
        # torch's Adagrad made its states of parameters that FSDP2 has replaced.
        stock = None if method.name == "adagrad" else method.stock
        results[str(method)] = compared(train, method.make, stock, f"{folder}/{method}")
    leave(results, folder)
