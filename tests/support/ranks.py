"""Runs a test's code as the ranks of one gloo group, each a process of its own."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

START = """
import copy, math, os, sys, torch, precond, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=ranks)
mesh = init_device_mesh("cpu", (ranks,))
torch.manual_seed(0)
"""

# On its way out an interpreter now and then aborts in a thread of gloo's ("terminate called without an active exception").
END = """
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


# Imported once for all ranks of a worker of pytest: torch alone takes 3 s, and a launch that forks 0.07.
PRELOADED = (
    "torch",
    "torch._dynamo",  # by fully_shard
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "precond",
)


@functools.cache
def server() -> BaseContext:
    """Forks a process for each rank from one that has imported PRELOADED, without this one's backend."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    hidden = {
        name: os.environ.pop(name) for name in ("PRECOND_BACKEND", "PRECOND_TEST_EXTENSION") if name in os.environ
    }
    try:
        forkserver.ensure_running()
    finally:
        os.environ.update(hidden)
    return context


def _run(program: str, arguments: list[str], output: str) -> None:
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    warnings.simplefilter("ignore")
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<rank>", "exec"), {"__name__": "__main__"})


def launch(program: str, arguments: list[list[str]]) -> None:
    """Run a program in processes beside each other, one for each list of arguments, which it sees in ``sys.argv`` from 1 on;
    fail with what they printed unless all end with 0. Their environment is that of the first launch of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(k) for k in range(len(arguments))]
        processes = [
            server().Process(target=_run, args=(program, own, str(output)))
            for own, output in zip(arguments, outputs, strict=True)
        ]
        started = []
        try:
            for process in processes:
                process.start()
                started.append(process)
            end = time.monotonic() + 240
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in started:
                process.kill()
                process.join()
        failed = [
            f"exit code {code}\n{output.read_text(errors='replace')[-2000:] if output.exists() else ''}"
            for code, output in zip(codes, outputs, strict=True)
            if code != 0
        ]
    assert not failed, "\n".join(failed)


def on_two_ranks(code: str, folder: Path) -> None:
    """Run code on two ranks; it sees ``rank``, ``mesh``, ``dist`` and what every test needs."""
    on_ranks(2, code, folder)


def on_ranks(ranks: int, code: str, folder: Path) -> None:
    """Run code on so many ranks."""
    launch(START + code + END, [[str(rank), str(ranks), f"{folder}/store-{ranks}"] for rank in range(ranks)])


# Ranks are more than cores: threads that wait would spin on the core of another rank.
CALL = """
import importlib, os, sys, torch
rank, ranks, module, function, folder = sys.argv[1:]
os.environ.update(OMP_NUM_THREADS="1", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks)
torch.set_num_threads(1)
import torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=int(rank), world_size=int(ranks))
getattr(importlib.import_module(module), function)(folder)
"""


def call_on_ranks(ranks: int, module: str, function: str, folder: Path) -> None:
    """Call a function of a module of tests on every rank with the folder, where it leaves what it found."""
    launch(CALL + END, [[str(rank), str(ranks), module, function, str(folder)] for rank in range(ranks)])


class Results:
    """What each rank says of each scenario of a module (support.shards), by the number of ranks: all of one number share their
    processes.
    """

    def __init__(self, module: str, folder: Path) -> None:
        self._module, self._folder, self._found = module, folder, {}

    def __call__(self, ranks: int) -> list[dict[str, str]]:
        if ranks not in self._found:
            call_on_ranks(ranks, self._module, "run", self._folder)
            self._found[ranks] = [torch.load(self._folder / f"{ranks}-{rank}.pt") for rank in range(ranks)]
        return self._found[ranks]

    def check(self, name: str, ranks: int) -> None:
        """No rank has an error."""
        for rank, result in enumerate(self(ranks)):
            assert not result[name], f"rank {rank}: {result[name]}"
