"""The scripts of examples/, as users run them: they learn, and a resumed run ends where the uninterrupted one did."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.source

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHARED = "tiny"  # what the scripts import


@dataclasses.dataclass(frozen=True)
class Run:
    """How to run a script for seconds."""

    #: Libraries that it imports.
    needs: tuple[str, ...]
    options: tuple[str, ...]
    #: The checkpoint in the middle and the one at the end.
    half: str
    end: str
    #: Processes of torchrun, or None: python alone.
    ranks: int | None = None


STEPS = ("--steps", "6", "--save-every", "3")
EPOCHS = ("--epochs", "2", "--save-every", "1")
RUNS = {
    "accelerate_loop": Run(("accelerate", "sklearn", "tqdm"), EPOCHS, "epoch-1", "epoch-2"),
    "deepspeed_zero": Run(("deepspeed", "sklearn", "tqdm"), STEPS, "step-3", "step-6", ranks=2),
    "fsdp2": Run(("tqdm",), STEPS, "step-3", "step-6", ranks=2),
    "huggingface": Run(("transformers", "accelerate"), STEPS, "checkpoint-3", "checkpoint-6"),
    "lightning_module": Run(("lightning", "sklearn"), EPOCHS, "epoch=0-step=30.ckpt", "epoch=1-step=60.ckpt"),
    "torchtitan_container": Run(("torchtitan", "tqdm"), STEPS, "step-3", "step-6", ranks=2),
}


def result(script: str, run: Run, folder: Path, output: Path, *options: str) -> tuple[str, float, str]:
    """What is measured, its value before, and what is printed from its value after on."""
    # A port of its own: the default one may be another test's.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.ranks)]
    command = [sys.executable, *(torchrun if run.ranks else []), str(EXAMPLES / f"{script}.py"), *run.options]
    done = subprocess.run(
        [*command, "--output", str(output), *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # other tests have the other cores
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (found,) = re.findall(r"(?ms)^(held-out loss|test accuracy): ([\d.]+) [^\n]*, ([\d.]+ at .*)", done.stdout)
    return found[0], float(found[1]), found[2]


@pytest.mark.parametrize("script", sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != SHARED))
def test_an_example_learns_and_its_checkpoint_continues(library, tmp_path, script):
    assert script in RUNS, f"examples/{script}.py needs a row in RUNS"
    run = RUNS[script]
    for name in run.needs:
        if importlib.util.find_spec(name) is None:  # importing those that are here would take as long as the runs
            library(name)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    what, before, end = result(script, run, tmp_path, straight)
    after = float(end.split()[0])
    assert before - after > 0.3 if what == "held-out loss" else after - before > 0.2
    _, _, again = result(script, run, tmp_path, resumed, "--resume", str(straight / run.half))
    # It began behind the middle, and ends with the same digits, which weights without their states would not.
    assert not (resumed / run.half).exists()
    assert (resumed / run.end).exists()
    assert again == end


def test_no_row_is_of_a_script_that_is_gone():
    assert not [name for name in RUNS if not (EXAMPLES / f"{name}.py").exists()]
