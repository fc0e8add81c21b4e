"""What a user meets first: the report, the examples in docstrings, the demo, the public names."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import precond

ROOT = Path(__file__).resolve().parent.parent


def run_module(*arguments, cwd=None, **env):
    result = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_report_names_everything_and_verifies_a_step(tmp_path):
    output = run_module("precond", cwd=tmp_path, TRITON_INTERPRET="0")
    for expected in (
        f"precond {precond.__version__}",
        "torch 2.",
        "instruction set",
        "OpenMP threads",
        "backend cpu        one verified step",
        "backend reference  one verified step",
        "backend cuda       not available: ",
        "backend triton     not available: no GPU",
    ):
        assert expected in output
    assert "backend triton     one verified step" in run_module("precond", cwd=tmp_path, TRITON_INTERPRET="1")


@pytest.mark.parametrize("module", ["_groups", "adagrad", "adam", "lion", "rmsprop", "sgd"])
def test_examples_run(module):
    results = doctest.testmod(importlib.import_module(f"precond.{module}"))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.source
@pytest.mark.filterwarnings("ignore")
def test_the_demo_trains_and_draws(tmp_path):
    picture = tmp_path / "demo.png"
    small = ["--steps", 8, "--batch", 4, "--context", 32, "--width", 32, "--layers", 1]
    output = run_module("bench", "demo", *small, "--out", picture, cwd=ROOT)
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in output.splitlines() if line.startswith(("torch.optim.AdamW", "precond.AdamW"))]
    assert len(rows) == 2
    theirs, ours = rows
    assert abs(float(theirs[1]) - float(ours[1])) < 1e-3
    assert float(ours[4]) == pytest.approx(8.0)


@pytest.mark.source
def test_the_version_lives_in_one_place():
    assert precond.__version__ == precond._C.version
    text = (ROOT / "precond" / "_version.py").read_text()
    assert f'"{precond.__version__}"' in text
    found = subprocess.run(
        ["git", "grep", "-lF", f'"{precond.__version__}"', "--", "*.py", "*.toml", "*.txt", "*.cpp", "*.h"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert found in ([], ["precond/_version.py"])
