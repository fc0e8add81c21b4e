"""Runs a test's code as the ranks of one gloo group, each a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
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


def launch(commands: list[list[str]]) -> None:
    """Run commands beside each other; fail with what they printed unless all return 0."""
    env = {
        name: value for name, value in os.environ.items() if name not in ("PRECOND_BACKEND", "PRECOND_TEST_EXTENSION")
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    processes = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    failed = [(p.returncode, output[-2000:]) for p, output in zip(processes, outputs, strict=True) if p.returncode]
    assert not failed, "\n".join(f"exit code {code}\n{output}" for code, output in failed)


def on_two_ranks(code: str, folder: Path) -> None:
    """Run code on two ranks; it sees ``rank``, ``mesh``, ``dist`` and what every test needs."""
    on_ranks(2, code, folder)


def on_ranks(ranks: int, code: str, folder: Path) -> None:
    """Run code on so many ranks."""
    command = [sys.executable, "-W", "ignore", "-c", START + code + END]
    launch([[*command, str(r), str(ranks), f"{folder}/store-{ranks}"] for r in range(ranks)])


# Ranks are more than cores: threads that wait would spin on the core of another rank.
CALL = """
import importlib, os, sys, warnings
rank, ranks, module, function, folder, *sys.path[:0] = sys.argv[1:]
os.environ.update(OMP_NUM_THREADS="1", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks)
warnings.simplefilter("ignore")
import torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=int(rank), world_size=int(ranks))
getattr(importlib.import_module(module), function)(folder)
"""


def call_on_ranks(ranks: int, module: str, function: str, folder: Path) -> None:
    """Call a function of a module of tests on every rank with the folder, where it leaves what it found."""
    tests = str(Path(__file__).parent.parent)
    launch(
        [
            [sys.executable, "-c", CALL + END, str(rank), str(ranks), module, function, str(folder), tests]
            for rank in range(ranks)
        ]
    )


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
